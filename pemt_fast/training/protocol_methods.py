# SPDX-License-Identifier: Apache-2.0
"""The methods that `pemt-fast protocol` compares on a target: PEMT, parts of it, and baselines.

Baselines and their sizes are those of the released code where it says them (github
JachinLin2022/PEMT, configs/baselines): a bottleneck adapter with reduction 16 at 1e-3, LoRA of rank
8 on the attention projections at 6e-4. Its prompt tuning was not read; length and rate are Lester
et al.'s (2021). Its rate of full fine-tuning was not read either; here it is that of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pemt_fast.methods.bottleneck import BottleneckConfig
from pemt_fast.methods.full import FullFineTuningConfig
from pemt_fast.methods.lora import LoraConfig
from pemt_fast.methods.pemt_config import PemtConfig
from pemt_fast.methods.prompt_tuning import PromptTuningConfig
from pemt_fast.methods.task_config import TaskConfig

PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: How it is called there.
        stage: 2: on the frozen sources; 1: on the target alone; 0: nothing is trained.
        changes: Fields of `PemtConfig`.
        config: The config of a method that is no PEMT.
        learning_rate: Of its own; None: that of the targets.
    """

    title: str
    stage: int = 2
    changes: dict[str, Any] = field(default_factory=dict)
    config: TaskConfig | None = None
    learning_rate: float | None = None


METHODS: dict[str, Method] = {
    "pemt": Method("PEMT"),
    "pemt_no_sparsity": Method("PEMT, no Task Sparsity Loss", changes={"aux_weight": 0.0}),
    "pemt_frozen_norms": Method("PEMT, frozen layer norms", changes={"train_layer_norms": False}),
    "pemt_random_prompt": Method("PEMT, random prompt", changes={"prompt_init": "normal"}),
    "single": Method("single adapter", stage=1),
    "adapter": Method(
        "bottleneck adapter", 1, config=BottleneckConfig(reduction_factor=16), learning_rate=1e-3
    ),
    "lora": Method(
        "LoRA", 1, config=LoraConfig(r=8, alpha=8, target_modules=("q", "k", "v", "o")),
        learning_rate=6e-4,
    ),
    "prompt_tuning": Method("prompt tuning", 1, config=PromptTuningConfig(), learning_rate=0.3),
    "full": Method("full fine-tuning", 1, config=FullFineTuningConfig()),
    PLAIN: Method("plain model", stage=0),
}  # fmt: skip


def get_method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METHODS:
        raise ValueError(f"methods must be among {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def method_config(
    method: Method, target: str, description: str, sources: Sequence[str], **settings: Any
) -> PemtConfig | TaskConfig:
    """The config of a method that trains something.

    Args:
        method: It has a stage.
        target: Name of the target.
        description: Sentence of its prompt.
        sources: Directories of the sources, for stage 2.
        **settings: Fields of `PemtConfig` that all its rows share; the method's own come on top.
    """
    if method.config is not None:
        return method.config
    if method.stage == 1:
        settings = {"source_rank": settings["source_rank"]}
    else:
        settings |= {"sources": sources}
    return PemtConfig(
        target=target, stage=method.stage, description=description, **{**settings, **method.changes}
    )
