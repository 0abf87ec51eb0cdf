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
from collections.abc import Callable, Mapping
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

# The same config and tensors as peft writes them, with the type it knows the methods by.
PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_TYPE = "PEMT_FAST"
PEFT_PREFIX = "base_model.model."

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
    text = json.dumps(config_values(model.adapter_config), indent=2, sort_keys=True) + "\n"
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
    return read_json(path), _digest(path.read_text())


def config_values(config: MethodConfig[Any]) -> dict[str, object]:
    """What a file says of a config, JSON-ready; `config_from` reads it."""
    return {"format": FORMAT, **config.to_dict()}


def config_from(values: Any, source: object) -> MethodConfig[Any]:
    """The config that `config_values` described.

    Raises:
        ValueError: another format, an unknown method or key; the message names `source`.
    """
    rest = dict(values) if isinstance(values, Mapping) else {}
    if rest.pop("format", None) != FORMAT:
        raise ValueError(f"{source}: expected format {FORMAT}; written by another version?")
    method = rest.pop("method", None)
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"{source}: method must be one of {sorted(_METHODS)}, got {method!r}")
    return _config_class(method).from_dict(rest)  # type: ignore[no-any-return]


def config_classes() -> dict[str, Any]:
    """The class of every method's config, by the method's name in files."""
    return {method: _config_class(method) for method in _METHODS}


def _config_class(method: str) -> Any:
    module, name = _METHODS[method]
    return getattr(importlib.import_module(module), name)


def _sized_config(values: Any, tensors: Mapping[str, Tensor], source: Path) -> MethodConfig[Any]:
    """The config of a file, if these tensors can be what it describes."""
    check_sizes(values, count_elements(tensors.values()), source)
    return config_from(values, source)


def read(directory: str | os.PathLike[str]) -> tuple[MethodConfig[Any], dict[str, Tensor]]:
    """Config and tensors of a saved model, of `write` or of peft (`integrations/peft`)."""
    folder = Path(directory)
    if not (folder / CONFIG_FILE).is_file() and (folder / PEFT_CONFIG_FILE).is_file():
        return _read_peft(folder)
    values, digest = _read_config(folder)
    tensors, metadata = read_tensors(folder / WEIGHTS_FILE)
    config = _sized_config(values, tensors, folder / CONFIG_FILE)
    if metadata.get("pemt_fast_config") != digest:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: belongs to another {CONFIG_FILE} than the one beside it"
        )
    return config, tensors


def _read_peft(folder: Path) -> tuple[MethodConfig[Any], dict[str, Tensor]]:
    path = folder / PEFT_CONFIG_FILE
    saved = read_json(path)
    if saved.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{path}: peft_type must be {PEFT_TYPE}, got {saved.get('peft_type')!r}; "
            "load_peft reads peft's LoRA and Poly"
        )
    tensors, _ = read_tensors(folder / PEFT_WEIGHTS_FILE)
    named = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    return _sized_config(saved.get("pemt_fast"), named, path), named


@torch.no_grad()
def assign(model: AttachedModel, tensors: dict[str, Tensor], source: object) -> None:
    """Copy `tensors` into the attached parameters; nothing may be missing, left over or misfit."""
    check_fits(model, tensors, source)
    own = adapter_state_dict(model)
    for name, tensor in tensors.items():
        own[name].copy_(shard_like(tensor, own[name]))


def check_fits(model: AttachedModel, tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise a `ValueError` unless `tensors` are what `model` has attached, by names and shapes."""
    own = adapter_state_dict(model)
    require_names(own, tensors, f"{source}: does not fit this model")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} must have shape {list(own[name].shape)} for this model, "
                f"got {list(tensor.shape)}"
            )


def require_names(wanted: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Raise a `ValueError` that begins with `what` unless both have the same names."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{what}; missing {missing[:3]}{_more(missing)}, unexpected {extra[:3]}{_more(extra)}"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 3} more" if len(names) > 3 else ""
