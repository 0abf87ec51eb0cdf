# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of microsoft/mttl: Poly, MHR and LoRA.

mttl need not be installed, and nothing in a file is executed. Which tensors these are is in
`mttl_layout.py`; this file reads mttl's options and attaches the method.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pemt_fast.attach import check_free, get_model
from pemt_fast.interop.linear_tensors import adapter_places, assign
from pemt_fast.interop.mttl_layout import LOGITS, Skills, by_layer, read_skills, spread_logits
from pemt_fast.linear_model import LinearAdapterModel
from pemt_fast.methods.lora import LoraConfig
from pemt_fast.methods.poly import PolyConfig
from pemt_fast.safe_files import allocate_at_most, count_elements, read_json, read_pickle

# What `save_pretrained` of mttl writes into a directory, and the options beside it.
_WEIGHTS_FILES = ("mttl_weights.bin", "checkpoint.ckpt")
_CONFIG_FILE = "mttl_config.json"

# Where mttl's files keep tensors, and options inside options.
_TENSORS = ("state_dict", "module", "expert_weights")
_NESTED = ("hyper_parameters", "expert_info", "modifier_config", "expert_config", "selector_config")

# What changes the arithmetic and has no counterpart here, with the value that means no.
_REFUSED: dict[str, Any] = {
    "poly_average_correction": False, "poly_use_shared_skill": False,
    "module_logits_l2_norm": False, "module_logits_straight_through": False,
    "module_logits_dropout": 0.0, "lora_warmup": False, "lora_merge_after": False,
    "tie_params": None,
}  # fmt: skip

# The only values read; a class name is that of the option's config in the new layout.
_READ: dict[str, tuple[Any, ...]] = {
    "model_modifier": ("poly_lora", "lora", "skilled_lora", "LoRAConfig", "SkilledLoRAConfig"),
    "poly_selector": ("poly",),
    "router_selector": ("poly_router", "PolySelectorConfig", None),
}
_CLASSES = {"modifier_config": "model_modifier", "expert_config": "model_modifier"}
_USED = (
    "lora_alpha", "lora_rank", "lora_dropout", "n_splits", "task_names", "poly_granularity",
    "router_granularity", "module_logits_relaxed_bernoulli", "module_logits_learning_rate",
)  # fmt: skip


def load_mttl(
    model: Any, path: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None
) -> LinearAdapterModel:
    """Attach a Poly, MHR or LoRA that mttl trained to a freshly loaded model.

    A file with selectors becomes a `PolyConfig`, one adapter without a selector a `LoraConfig`:
    `y = W·x + s·(Σ_k w_tk·B_k)·(Σ_k w_tk·A_k)·x`, `w_t = σ(z_t) / Σ σ(z_t)`, with s = 1 / r in the
    old layout and `lora_alpha` / r in the new one. Skills, splits, rank, tasks and layers are those
    of the tensors. Training goes on with the relaxed Bernoulli where it was used, which the new
    layout never does; its row of logits for unknown tasks is uniform, as `UNSEEN_TASK` is.

    A selector that several layers share is copied to each of them: the outputs are equal, and
    training goes on with one per layer. The new layout divides by Σ σ(z) + 1e-8, here it is 1e-12.

    Args:
        model: The model that the adapters were trained on.
        path: Lightning checkpoint, file of an expert library (with its `.meta` beside it, if there
            is one), state dict, or the directory of `save_pretrained`.
        options: mttl's options by its names, for files that do not state them and against what they
            state: `lora_alpha` of a bare state dict, `task_names`, `poly_granularity` or
            `router_granularity`, or `lora_warmup=False` where the warm-up was over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds pickled objects, an option has no counterpart, or
            the tensors do not fit; the message names it, and the model is left as it was.
        RuntimeError: the model carries adapters already.

    Source: github microsoft/mttl, commits ce4ca51 (old) and 3724abf (new).
    """
    check_free(model)
    file, tensors, stated = _read(Path(path))
    stated |= _checked(options or {})
    _refuse(stated, file)
    layers = by_layer(tensors, model, file)
    routed = any(key.endswith(LOGITS) for key in tensors)
    skills = {
        name: read_skills(name, parts, model.get_submodule(name), routed=routed, path=file)
        for name, parts in layers.items()
    }
    sizes = _common(skills, stated, routed=routed, path=file)
    logits = _logits(layers, stated, sizes, file) if routed else {}
    config = _config(stated, sizes, logits, _targets(model, skills), file)
    values, names = _values(skills, logits)
    elements = count_elements(values.values()), count_elements(model.parameters())
    with allocate_at_most(*elements, file):
        adapted = get_model(model, config)
    try:
        assign(adapter_places(adapted, "", names), values, file)
    except ValueError:
        adapted.unload()
        raise
    return adapted


def _read(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file, its tensors and the options stated in it and beside it."""
    if path.is_dir():
        file = next((f for n in _WEIGHTS_FILES if (f := path / n).is_file()), None)
        if file is None:
            found = sorted(p.name for p in path.iterdir())[:8]
            raise FileNotFoundError(
                f"{path}: expected one of {list(_WEIGHTS_FILES)}, found {found}; pass the path of "
                "a Lightning checkpoint itself"
            )
        path = file
    saved = read_pickle(path)
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(saved).__name__}")
    stated: dict[str, Any] = {}
    if (beside := path.with_name(_CONFIG_FILE)).is_file():
        stated = _flat(read_json(beside), beside)
    elif (beside := path.with_suffix(".meta")).is_file() and beside != path:
        stated = _flat(read_pickle(beside), beside)
    tensors = saved
    if key := next((key for key in _TENSORS if isinstance(saved.get(key), dict)), None):
        tensors = saved[key]
        stated |= _flat({k: v for k, v in saved.items() if k in (*_NESTED, "expert_infos")}, path)
    if odd := [k for k, v in tensors.items() if not isinstance(v, Tensor)]:
        raise ValueError(f"{path}: expected tensors only, {odd[0]!r} is none")
    return path, tensors, stated


def _flat(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options of a file in one dict, whichever of its configs they are in."""
    flat = {k: v for k, v in values.items() if k not in _NESTED}
    for name in _NESTED:
        if not isinstance(inner := values.get(name), Mapping):
            continue
        if isinstance(several := inner.get("selectors"), Mapping):
            if len(several) != 1:
                raise ValueError(f"{path}: must have one selector, found {sorted(several)}")
            inner = next(iter(several.values()))
        flat |= _flat(inner, path)
        kind = "router_selector" if name == "selector_config" else _CLASSES.get(name)
        if kind and "class_name" in inner:
            flat[kind] = inner["class_name"].rpartition(".")[2]
    flat.pop("class_name", None)
    for info in flat.pop("expert_infos", None) or ():
        expert = {k: v for k, v in _flat(info, path).items() if k in (*_USED, *_REFUSED, *_READ)}
        if odd := sorted(k for k, v in expert.items() if flat.get(k, v) != v):
            raise ValueError(f"{path}: experts must be alike, they differ in {odd}")
        flat |= expert
    return flat


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    known = {*_USED, *_REFUSED, *_READ}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"options must be of {sorted(known)}, got {unknown}")
    return options


def _refuse(stated: Mapping[str, Any], path: Path) -> None:
    for name, default in _REFUSED.items():
        if (stated.get(name) or default) != default:
            raise ValueError(f"{path}: {name} = {stated[name]!r} has no counterpart here")
    for name, known in _READ.items():
        if name in stated and stated[name] not in known:
            raise ValueError(
                f"{path}: {name} must be one of {list(known)}, got {stated[name]!r}: it has no "
                "counterpart here"
            )


def _common(
    skills: Mapping[str, Skills], stated: Mapping[str, Any], *, routed: bool, path: Path
) -> tuple[str, int, int, int]:
    """Layout, P, K and R, which must be the same in all layers and as stated."""
    first, sizes = next((name, found.sizes) for name, found in skills.items())
    for name, found in skills.items():
        if found.sizes != sizes:
            raise ValueError(
                f"{path}: layout, splits, skills and rank must be the same in all layers, got "
                f"{list(sizes)} in {first} and {list(found.sizes)} in {name}"
            )
    # Without a selector mttl takes no notice of splits.
    splits = sizes[1] if routed else stated.get("n_splits")
    for option, value in (("n_splits", splits), ("lora_rank", sizes[3])):
        if stated.get(option) not in (None, value):
            raise ValueError(f"{path}: {option} is {stated[option]}, its tensors have {value}")
    return sizes


def _logits(
    layers: Mapping[str, Mapping[str, Tensor]],
    stated: Mapping[str, Any],
    sizes: tuple[str, int, int, int],
    path: Path,
) -> dict[str, Tensor]:
    """Rows of the tasks `[T, P·K]` of every layer."""
    layout, splits, skills, _ = sizes
    granularity = stated.get("poly_granularity" if layout == "old" else "router_granularity")
    tables = spread_logits(layers, granularity, path)
    rows = next(iter(tables.values())).shape[:1]
    for name, table in tables.items():
        if table.shape != (*rows, splits * skills):
            raise ValueError(
                f"{path}: {name}.selector.module_logits must be {[*rows, splits * skills]}, "
                f"got {list(table.shape)}"
            )
        # The new layout's last row is for tasks unknown to it.
        if layout == "new" and len(table) > 1 and bool((table[-1] != table[-1, 0]).any()):
            raise ValueError(
                f"{path}: the last row of {name}.selector.module_logits, that of unknown tasks, "
                "must be uniform"
            )
    tasks = slice(-1 if layout == "new" and rows[0] > 1 else None)
    return {name: table[tasks] for name, table in tables.items()}


def _config(
    stated: Mapping[str, Any],
    sizes: tuple[str, int, int, int],
    logits: Mapping[str, Tensor],
    targets: tuple[str, ...],
    path: Path,
) -> LoraConfig | PolyConfig:
    layout, splits, skills, rank = sizes
    alpha = 1.0 if layout == "old" else stated.get("lora_alpha")
    if alpha is None:
        raise ValueError(f"{path}: does not state lora_alpha, pass options={{'lora_alpha': …}}")
    dropout = stated.get("lora_dropout") or 0.0
    if logits:
        return PolyConfig(
            len(next(iter(logits.values()))), num_skills=skills, num_splits=splits,
            noise=layout == "old" and bool(stated.get("module_logits_relaxed_bernoulli", True)),
            router_learning_rate=stated.get("module_logits_learning_rate", 0.1),
            task_names=stated.get("task_names") or None, r=rank, alpha=float(alpha),
            dropout=dropout, target_modules=targets,
        )  # fmt: skip
    if skills > 1:
        raise ValueError(f"{path}: holds {skills} skills per layer and no selector.module_logits")
    return LoraConfig(r=rank, alpha=float(alpha), dropout=dropout, target_modules=targets)


def _values(
    skills: Mapping[str, Skills], logits: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by layer and part as `adapter_places` wants them, and the names of the parts."""
    values: dict[str, Tensor] = {}
    for name, found in skills.items():
        a, b = found.a, found.b
        if not logits:  # the splits of one skill are parts of one pair
            a, b = a.flatten(0, 2).t(), b.permute(0, 3, 1, 2).flatten(0, 1).flatten(1)
        values |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    values |= {f"{name}.{LOGITS}": table for name, table in logits.items()}
    return values, ("lora_a", "lora_b", LOGITS) if logits else ("lora_a", "lora_b")


def _targets(model: nn.Module, layers: Mapping[str, Any]) -> tuple[str, ...]:
    """The shortest ends of names that mean these layers and no others."""
    for depth in (1, 2):
        ends = {_end(name, depth) for name in layers}
        if {n for n, _ in model.named_modules() if _end(n, depth) in ends} == layers.keys():
            return tuple(sorted(ends))
    return tuple(layers)


def _end(name: str, depth: int) -> str:
    return ".".join(name.split(".")[-depth:])
