# SPDX-License-Identifier: Apache-2.0
"""LoRA and Poly directories of `peft`: one task written as a LoRA, Poly as it is, both read.

None of it needs peft to be installed. Written as peft 0.21 writes them: `adapter_config.json` and
`adapter_model.safetensors`. Every method with all of its tasks goes through a directory of peft
with the type `PEMT_FAST` instead, which needs this library to be read (`integrations/peft`).
PEML's prefix is in `peft_prefix.py`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pemt_fast.attach import get_model
from pemt_fast.checkpoint import PEFT_CONFIG_FILE as CONFIG_FILE
from pemt_fast.checkpoint import PEFT_PREFIX as _PREFIX
from pemt_fast.checkpoint import PEFT_WEIGHTS_FILE as WEIGHTS_FILE
from pemt_fast.checkpoint import replace_file
from pemt_fast.interop.linear_tensors import adapter_places, assign
from pemt_fast.linear_model import LinearAdapterModel
from pemt_fast.methods.lora import LoraConfig
from pemt_fast.methods.poly import PolyConfig
from pemt_fast.safe_files import (
    allocate_at_most,
    check_sizes,
    count_elements,
    read_json,
    read_tensors,
)

_NAMES: dict[str, tuple[str, ...]] = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "POLY": ("poly_lora_A", "poly_lora_B", "poly_router.module_logits"),
}

# What changes the arithmetic of a LoRA and has no counterpart here, with the value that means no.
_REFUSED: dict[str, Any] = {
    "use_dora": False, "use_rslora": False, "bias": "none", "lora_bias": False,
    "modules_to_save": None, "fan_in_fan_out": False,
    "layer_replication": None,
}  # fmt: skip


def export_peft_lora(
    model: LinearAdapterModel, directory: str | os.PathLike[str], task: int | str | None = None
) -> None:
    """Write the adapters of one task as a plain LoRA that `peft.PeftModel.from_pretrained` loads.

    A mixture of adapters is the LoRA of their stacked factors: the weights and the scale go into
    `lora_B`, adapters of weight 0 are left out. Poly's averages are one pair.

    Args:
        model: With a method on linear layers.
        directory: Created if needed; both files are written under temporary names and renamed.
        task: Number or name of the task, or `UNSEEN_TASK`; needed where the model has several.

    Raises:
        ValueError: there is no such task, or the method has no adapters on linear layers, or more
            than those.
    """
    if not isinstance(model, LinearAdapterModel):
        raise ValueError(
            "model must have adapters on linear layers alone, got one of "
            f"{type(getattr(model, 'adapter_config', model)).__name__}"
        )
    number = model.task_number(task)
    if getattr(model, "prefixes", dict)():
        raise ValueError("model must be a LoRA alone: there is no place for a prefix of keys and "
                         "values in peft's LoRA")  # fmt: skip
    if not model.adapted_layers():
        method = type(model.adapter_config).__name__
        raise ValueError(f"model must have adapters on linear layers, got one of {method}")
    lora = model.adapter_config
    if type(lora) is LoraConfig:  # its subclasses compute something else
        return _export_as_it_is(model, lora, directory)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in model.adapted_layers().items():
        down, up = layer.factors(number)
        used = (up != 0).any(1)
        if bool(used.any()):
            down, up = down[used], up[used]
        else:  # peft has no LoRA of rank 0
            down, up = down[:1], up[:1]
        dtype = next(p.dtype for n, p in layer.named_parameters() if not n.startswith("base."))
        tensors |= _pair(name, down.to(dtype), up.to(dtype))
        ranks[name] = len(down)
    most = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": other,
        "alpha_pattern": other, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(ranks),
    }  # fmt: skip
    write_peft(model.base_model, config, tensors, directory)


def _export_as_it_is(
    model: LinearAdapterModel, lora: LoraConfig, directory: str | os.PathLike[str]
) -> None:
    """A LoRA with its own rank, alpha and dropout: the same bits."""
    tensors: dict[str, Tensor] = {}
    for name, layer in model.adapted_layers().items():
        mixture: Any = layer.mixture
        tensors |= _pair(name, mixture.w_down.detach(), mixture.w_up.detach())
    config = {
        "peft_type": "LORA", "r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
        "bias": "none", "target_modules": sorted(model.adapted_layers()),
    }  # fmt: skip
    write_peft(model.base_model, config, tensors, directory)


def _pair(layer: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Of `down [R, D]` and `up [R, H]`, as peft names and lays them."""
    values = down.contiguous().cpu(), up.t().contiguous().cpu()
    names = (f"{_PREFIX}{layer}.{ending}" for ending in _NAMES["LORA"])
    return dict(zip(names, values, strict=True))


def export_peft_poly(model: LinearAdapterModel, directory: str | os.PathLike[str]) -> None:
    """Write Poly or MHR, all tasks of it, as the Poly that `peft.PeftModel.from_pretrained` loads.

    Bit by bit the same parameters where `alpha` is 1; another one is multiplied into `poly_lora_B`.
    What peft's Poly does not have is not written: `dropout`, training without `noise`, names of
    tasks, `UNSEEN_TASK`.

    Args:
        model: With a `PolyConfig`.
        directory: As in `export_peft_lora`.

    Raises:
        ValueError: another method. C-Poly's specific skills have weights that Poly's normalised
            sigmoid cannot take.
    """
    poly = model.adapter_config
    if not isinstance(poly, PolyConfig):
        raise ValueError(
            f"model must have a PolyConfig, got a {type(poly).__name__}; export_peft_lora writes "
            "one task of any method on linear layers"
        )
    tensors: dict[str, Tensor] = {}
    splits, skills, rank = poly.num_splits, poly.num_skills, poly.r
    for name, layer in model.adapted_layers().items():
        parts: Any = layer
        a = parts.a.detach().view(splits, skills, rank, -1).transpose(-1, -2)
        b = parts.b.detach().view(splits, skills, rank, -1)
        values = (
            a,
            b if poly.alpha == 1 else poly.alpha * b,
            parts.router.logits.detach().flatten(1),
        )
        for ending, value in zip(_NAMES["POLY"], values, strict=True):
            tensors[f"{_PREFIX}{name}.{ending}"] = value.contiguous().cpu()
    config = {
        "peft_type": "POLY", "poly_type": "poly", "r": rank, "n_tasks": poly.num_tasks,
        "n_skills": skills, "n_splits": splits, "target_modules": sorted(model.adapted_layers()),
    }  # fmt: skip
    write_peft(model.base_model, config, tensors, directory)


def write_peft(
    base_model: Any,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    directory: str | os.PathLike[str],
) -> None:
    """Both files of an adapter of peft for `base_model`; `config` without what all have."""
    model_config = base_model.config
    seq2seq = bool(getattr(model_config, "is_encoder_decoder", False))
    config = {
        **config, "task_type": "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": getattr(model_config, "_name_or_path", "") or None,
    }  # fmt: skip
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    replace_file(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text))


def load_peft(model: Any, directory: str | os.PathLike[str]) -> LinearAdapterModel:
    """Attach a LoRA or Poly that peft wrote to a freshly loaded model.

    A LoRA whose rank differs by layer becomes one of the largest rank, filled up with zeros: the
    same outputs; what is filled up does not train.

    Args:
        model: Any model of transformers with these layers.
        directory: With `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of adapter, an option without counterpart, or tensors that do not
            fit; the message names it, and the model is left as it was.
    """
    folder = Path(directory)
    path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file written by peft's save_pretrained")
    saved = read_json(path)
    tensors, _ = read_tensors(weights)
    elements = count_elements(tensors.values())
    check_sizes(saved, elements, path)
    kind = saved.get("peft_type")
    targets = saved.get("target_modules")
    targets = tuple(targets) if isinstance(targets, list) else targets
    if kind == "LORA":
        config: LoraConfig | PolyConfig = _lora_config(saved, targets, tensors, path)
        tensors = {name: _filled_up(name, t, config.r) for name, t in tensors.items()}
    elif kind == "POLY":
        config = PolyConfig(
            _size(saved, "n_tasks", path), num_skills=_size(saved, "n_skills", path),
            num_splits=_size(saved, "n_splits", path), r=_size(saved, "r", path),
            target_modules=targets,
        )  # fmt: skip
    else:
        raise ValueError(f"{path}: peft_type must be LORA or POLY, got {kind!r}")
    with allocate_at_most(elements, count_elements(model.parameters()), path):
        adapted = get_model(model, config)
    try:
        assign(adapter_places(adapted, _PREFIX, _NAMES[kind]), tensors, weights)
    except ValueError:
        adapted.unload()
        raise
    return adapted


def _size(saved: dict[str, Any], name: str, path: Path) -> int:
    value = saved.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {name} must be an integer of at least 1, got {value!r}")
    return value


def _lora_config(
    saved: dict[str, Any], targets: Any, tensors: dict[str, Tensor], path: Path
) -> LoraConfig:
    for name, default in _REFUSED.items():
        if (saved.get(name) or default) != default:
            raise ValueError(f"{path}: {name} = {saved[name]!r} has no counterpart here")
    rank, alpha = _size(saved, "r", path), saved.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ValueError(f"{path}: lora_alpha must be a number, got {alpha!r}")
    most = rank
    for name, tensor in tensors.items():
        if not name.endswith("lora_A.weight") or tensor.dim() != 2:
            continue
        layer = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        own = _of_layer(saved.get("rank_pattern"), layer, rank, path)
        if len(tensor) != own:
            raise ValueError(
                f"{path}: rank {own} of {layer} does not fit its tensors, which have {len(tensor)}"
            )
        scale = _of_layer(saved.get("alpha_pattern"), layer, alpha, path) / own
        if scale != alpha / rank:
            raise ValueError(
                f"{path}: alpha / rank must be {alpha / rank:g} in all layers, is {scale:g} in "
                f"{layer}; a scale that differs by layer has no counterpart"
            )
        most = max(most, own)
    return LoraConfig(
        r=most, alpha=alpha * most / rank, dropout=saved.get("lora_dropout") or 0.0,
        target_modules=targets,
    )  # fmt: skip


def _of_layer(patterns: Any, layer: str, default: float, path: Path) -> Any:
    """The value for a layer: the first whose key is the end of its name, as peft looks it up."""
    for key, value in (patterns or {}).items():
        # peft takes keys for regular expressions; of a file those are not tried.
        if not re.fullmatch(r"[\w.]+", key) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(
                f"{path}: rank_pattern and alpha_pattern must map names of layers to numbers, got "
                f"{key!r}: {value!r}"
            )
        if layer == key or layer.endswith(f".{key}"):
            return value
    return default


def _filled_up(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A factor of a smaller rank with zeros up to `rank`."""
    if tensor.dim() != 2:
        return tensor
    missing = rank - (tensor.shape[0] if name.endswith("lora_A.weight") else tensor.shape[1])
    if missing <= 0:
        return tensor
    pad = (0, 0, 0, missing) if name.endswith("lora_A.weight") else (0, missing)
    return F.pad(tensor, pad)
