# SPDX-License-Identifier: Apache-2.0
"""pemt_fast: mixtures of adapters on T5, as cheap as the hardware allows.

`adapter_mixture` is the fused operator; `get_model` puts a method (PEMT) on a Hugging Face T5.
Importing this package loads nothing else: every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pemt_fast.version import __version__

_EXPORTS = {
    "AdapterModel": "pemt_fast.model",
    "AdapterTrainer": "pemt_fast.training.trainer",
    "BottleneckConfig": "pemt_fast.methods.bottleneck",
    "CPolyConfig": "pemt_fast.methods.poly",
    "FullFineTuningConfig": "pemt_fast.methods.full",
    "GateCallback": "pemt_fast.training.gate_callback",
    "LinearAdapterModel": "pemt_fast.linear_model",
    "LoraConfig": "pemt_fast.methods.lora",
    "MixLoraConfig": "pemt_fast.methods.mix_lora",
    "MoeLoraConfig": "pemt_fast.methods.lora",
    "MtlLoraConfig": "pemt_fast.methods.lora",
    "MultiLoraConfig": "pemt_fast.methods.lora",
    "PemlConfig": "pemt_fast.methods.peml",
    "PemlModel": "pemt_fast.peml_model",
    "PemtConfig": "pemt_fast.methods.pemt_config",
    "PolyConfig": "pemt_fast.methods.poly",
    "PromptTuningConfig": "pemt_fast.methods.prompt_tuning",
    "UNSEEN_TASK": "pemt_fast.nn.routing",
    "adapter_mixture": "pemt_fast.ops",
    "fuse": "pemt_fast.fusing",
    "get_model": "pemt_fast.attach",
    "export_adapterhub": "pemt_fast.interop.adapterhub_files",
    "export_peft_lora": "pemt_fast.interop.peft_files",
    "export_peft_poly": "pemt_fast.interop.peft_files",
    "export_peft_prefix": "pemt_fast.interop.peft_prefix",
    "load": "pemt_fast.attach",
    "load_adapterhub": "pemt_fast.interop.adapterhub_files",
    "load_mttl": "pemt_fast.interop.mttl_files",
    "load_peft": "pemt_fast.interop.peft_files",
    "load_peft_prefix": "pemt_fast.interop.peft_prefix",
    "load_published_pemt": "pemt_fast.interop.published_pemt",
    "published_names": "pemt_fast.interop.published_pemt",
    "shard": "pemt_fast.sharding",
    "skill_mixture": "pemt_fast.ops.skill_mixture",
    "task_sparsity_loss": "pemt_fast.ops",
    "unfuse": "pemt_fast.fusing",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from pemt_fast.attach import get_model, load
    from pemt_fast.fusing import fuse, unfuse
    from pemt_fast.interop.adapterhub_files import export_adapterhub, load_adapterhub
    from pemt_fast.interop.mttl_files import load_mttl
    from pemt_fast.interop.peft_files import export_peft_lora, export_peft_poly, load_peft
    from pemt_fast.interop.peft_prefix import export_peft_prefix, load_peft_prefix
    from pemt_fast.interop.published_pemt import load_published_pemt, published_names
    from pemt_fast.linear_model import LinearAdapterModel
    from pemt_fast.methods.bottleneck import BottleneckConfig
    from pemt_fast.methods.full import FullFineTuningConfig
    from pemt_fast.methods.lora import LoraConfig, MoeLoraConfig, MtlLoraConfig, MultiLoraConfig
    from pemt_fast.methods.mix_lora import MixLoraConfig
    from pemt_fast.methods.peml import PemlConfig
    from pemt_fast.methods.pemt_config import PemtConfig
    from pemt_fast.methods.poly import CPolyConfig, PolyConfig
    from pemt_fast.methods.prompt_tuning import PromptTuningConfig
    from pemt_fast.model import AdapterModel
    from pemt_fast.nn.routing import UNSEEN_TASK
    from pemt_fast.ops import adapter_mixture, task_sparsity_loss
    from pemt_fast.ops.skill_mixture import skill_mixture
    from pemt_fast.peml_model import PemlModel
    from pemt_fast.sharding import shard
    from pemt_fast.training.gate_callback import GateCallback
    from pemt_fast.training.trainer import AdapterTrainer


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pemt_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
