# SPDX-License-Identifier: Apache-2.0
"""Files of a wrapped model: `pemt_fast_config.json` and `pemt_fast_model.safetensors`.

The safetensors file holds what was attached, never T5's own weights, and carries a digest of the
config in its header; a pair that was written at different times is refused. Both are written under
a temporary name and renamed, so a killed process leaves the previous files.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pemt_fast.safe_files import check_sizes, count_elements, read_json, read_tensors
from pemt_fast.sharding import any_sharded, is_writer, require_values, shard_like, whole

if TYPE_CHECKING:
    from pemt_fast.attach import MethodConfig
    from pemt_fast.attached import AttachedModel

CONFIG_FILE = "pemt_fast_config.json"
WEIGHTS_FILE = "pemt_fast_model.safetensors"
FORMAT = 1

# Method name in the config file -> module and class of its config.
_METHODS = {
    "pemt": ("pemt_fast.methods.pemt_config", "PemtConfig"),
    "lora": ("pemt_fast.methods.lora", "LoraConfig"),
    "multi_lora": ("pemt_fast.methods.lora", "MultiLoraConfig"),
    "moe_lora": ("pemt_fast.methods.lora", "MoeLoraConfig"),
    "mtl_lora": ("pemt_fast.methods.lora", "MtlLoraConfig"),
    "mix_lora": ("pemt_fast.methods.mix_lora", "MixLoraConfig"),
    "poly": ("pemt_fast.methods.poly", "PolyConfig"),
    "c_poly": ("pemt_fast.methods.poly", "CPolyConfig"),
    "peml": ("pemt_fast.methods.peml", "PemlConfig"),
    "bottleneck": ("pemt_fast.methods.bottleneck", "BottleneckConfig"),
    "prompt_tuning": ("pemt_fast.methods.prompt_tuning", "PromptTuningConfig"),
    "full": ("pemt_fast.methods.full", "FullFineTuningConfig"),
}


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)`, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def adapter_state_dict(model: AttachedModel) -> dict[str, Tensor]:
    """Attached tensors by their name in `model.named_parameters()`; tied ones once.

    Raises:
        RuntimeError: they are switched off, so that the model's own weights may be in their places,
            or they are partitioned by DeepSpeed.
    """
    if not model.routing.enabled:
        raise RuntimeError("inside disabled() adapters can neither be saved nor loaded: leave it")
    own = model._attachment.untouched_names()
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.removeprefix("base_model.") not in own:
            require_values(name, tensor)
            found.setdefault(id(tensor), (name, tensor.detach()))
    return dict(found.values())


def _digest(config_text: str) -> str:
    return hashlib.sha256(config_text.encode()).hexdigest()[:16]


def write(model: AttachedModel, directory: str | os.PathLike[str]) -> None:
    """Write both files of `model` to `directory`.

    Of a model that is sharded every process must call it; the first one writes, and none goes on
    before the files are there.
    """
    own = adapter_state_dict(model)
    sharded = any_sharded(own.values())
    tensors = {k: whole(v).contiguous().cpu() for k, v in own.items()}
    if not sharded or is_writer():
        _write(model, tensors, directory)
    if sharded:
        torch.distributed.barrier()


def _write(
    model: AttachedModel, tensors: dict[str, Tensor], directory: str | os.PathLike[str]
) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, **model.adapter_config.to_dict()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    metadata = {"format": "pt", "pemt_fast_config": _digest(text)}
    replace_file(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata))
    replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text))


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The values in the config file, and the digest of its text."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
        inside = "the directory does not exist" if found is None else f"found {found[:8]}"
        hint = "; for the authors' files use load_published_pemt" if found and any(
            name in ("lora.pt", "adapter.pt", "task_embedding.pt") for name in found
        ) else ""  # fmt: skip
        raise FileNotFoundError(
            f"{path}: expected a file written by save_pretrained, {inside}{hint}"
        )
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}; written by another version?")
    if not isinstance(method := values.get("method"), str) or method not in _METHODS:
        raise ValueError(f"{path}: method must be one of {sorted(_METHODS)}, got {method!r}")
    return values, _digest(path.read_text())


def read(directory: str | os.PathLike[str]) -> tuple[MethodConfig[Any], dict[str, Tensor]]:
    """Config and tensors of a saved model."""
    folder = Path(directory)
    values, digest = _read_config(folder)
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    check_sizes(values, count_elements(tensors.values()), folder / CONFIG_FILE)
    module, name = _METHODS[values.pop("method")]
    config = getattr(importlib.import_module(module), name).from_dict(values)
    if metadata.get("pemt_fast_config") != digest:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: belongs to another {CONFIG_FILE} than the one beside it"
        )
    return config, tensors


@torch.no_grad()
def assign(model: AttachedModel, tensors: dict[str, Tensor], source: object) -> None:
    """Copy `tensors` into the attached parameters; nothing may be missing, left over or misfit."""
    own = adapter_state_dict(model)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise ValueError(
            f"{source}: does not fit this model; missing {missing[:3]}{_more(missing)}, "
            f"unexpected {extra[:3]}{_more(extra)}"
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} must have shape {list(own[name].shape)} for this model, "
                f"got {list(tensor.shape)}"
            )
    for name, tensor in tensors.items():
        own[name].copy_(shard_like(tensor, own[name]))


def _more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""
