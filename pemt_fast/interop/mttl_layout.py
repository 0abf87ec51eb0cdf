# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of microsoft/mttl's LoRA, Poly and MHR tensors, and ours of them.

Letters: P splits, K skills, R rank, D and H the widths of the layer, T tasks.

| written by | `lora_a` | `lora_b` | logits |
|---|---|---|---|
| old, `poly_lora` | `[P, K, D / P, R]` | `[P, K, R, H / P]` | `[T, P·K]` |
| old, `lora` | `[R, D]` | `[H, R]` | |
| new, `experts.lora_a` (skilled LoRA) | `[K, P, D / P, R]` | `[K, R, P, H / P]` | `[T + 1, P·K]` |
| new, `lora_a.<expert>`, K of them | `[D, R]` | `[R, H]` | `[T + 1, K]` |
| new, one expert | `[D, R]` or `[1, P, D / P, R]` | `[R, H]` or `[1, R, P, H / P]` | |

Old is commit ce4ca51 (mttl/models/{poly,lora,utils}.py), new is 3724abf (mttl/models/modifiers/
lora.py, containers/{base,lora_containers}.py, containers/selectors/poly_selector.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Lightning module, expert model, or neither around the model.
_PREFIXES = ("", "model.", "model.model.")
_KEY = re.compile(r"(.+?)\.(selector\.module_logits|(?:experts\.)?lora_[ab]|lora_[ab]\.[^.]+)")
LOGITS = "selector.module_logits"

# Granularity of the old layout -> the part of a layer's name whose number tells selectors apart.
_PARTS = {"layerwise": "layer", "blockwise": "block", "coderwise": "coder"}
_GRANULARITIES = ("finegrained", *_PARTS, "coarsegrained")


@dataclass
class Skills:
    """Adapters of one layer, in the order of `interop/linear_tensors.py`.

    Attributes:
        a, b: `[P, K, D / P, R]` and `[P, K, R, H / P]`.
        layout: `old` or `new`.
    """

    a: Tensor
    b: Tensor
    layout: str

    @property
    def sizes(self) -> tuple[str, int, int, int]:
        """Layout, P, K and R: the same for all layers of a model."""
        splits, skills, _, rank = self.a.shape
        return self.layout, splits, skills, rank


def by_layer(tensors: Mapping[str, Any], model: nn.Module, path: Path) -> dict[str, dict[str, Any]]:
    """Tensors of every layer by their names below it, layers in the order of the model.

    Raises:
        ValueError: one is nothing of an adapter, or belongs to no linear layer of the model.
    """
    matches = {key: _KEY.fullmatch(key) for key in tensors}
    if odd := [key for key, match in matches.items() if match is None]:
        raise ValueError(
            f"{path}: expected lora_a, lora_b and selector.module_logits of layers and nothing "
            f"else, found {odd[:3]}"
        )
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    named = {key: (match[1], match[2]) for key, match in matches.items() if match}
    unknown: dict[str, list[str]] = {}
    for prefix in _PREFIXES:
        known = {prefix + name for name in linear}
        unknown[prefix] = [layer for layer, _ in named.values() if layer not in known]
    prefix = min(unknown, key=lambda prefix: len(unknown[prefix]))
    if unknown[prefix]:
        raise ValueError(f"{path}: the model has no linear layer {unknown[prefix][0]!r}")
    found: dict[str, dict[str, Any]] = {}
    for key, (layer, part) in named.items():
        found.setdefault(layer.removeprefix(prefix), {})[part] = tensors[key]
    return {name: found[name] for name in linear if name in found}


def read_skills(
    name: str, found: Mapping[str, Tensor], layer: nn.Linear, *, routed: bool, path: Path
) -> Skills:
    """The adapters of one layer.

    Args:
        name: Of the layer.
        found: Its tensors by their names below it.
        layer: The layer itself.
        routed: Whether there are selectors in the file.
        path: Of the file, for errors.

    Raises:
        ValueError: a tensor is missing or has another shape than the table at the top says.
    """
    own = {part: tensor for part, tensor in found.items() if part != LOGITS}
    experts = [part.removeprefix("lora_a.") for part in own if part.startswith("lora_a.")]
    first = f"lora_a.{experts[0]}" if experts else next(iter(own), "lora_a")
    stem = "experts." if first.startswith("experts.") else ""
    pairs = [(f"lora_a.{e}", f"lora_b.{e}") for e in experts]
    pairs = pairs or [(f"{stem}lora_a", f"{stem}lora_b")]
    if odd := sorted({part for pair in pairs for part in pair} ^ own.keys()):
        raise ValueError(
            f"{path}: {name} must have {list(pairs[0])} and the like, {odd[:3]} are missing or "
            "too many"
        )
    skills = [
        _pair(own[a], own[b], layer, routed=routed, new=bool(stem or experts)) for a, b in pairs
    ]
    sizes = next((s.sizes for s in skills if s), None)
    fits = [s is not None and s.sizes == sizes for s in skills]
    if not all(fits):
        a, b = pairs[fits.index(False)]
        raise ValueError(
            f"{path}: {name}.{a} {list(own[a].shape)} and {b} {list(own[b].shape)} have no shapes "
            f"of mttl's for a layer of widths {layer.in_features} and {layer.out_features}"
        )
    whole = [s for s in skills if s]
    if len(whole) == 1:
        return whole[0]
    return Skills(
        torch.cat([s.a for s in whole], 1), torch.cat([s.b for s in whole], 1), whole[0].layout
    )


def _pair(a: Tensor, b: Tensor, layer: nn.Linear, *, routed: bool, new: bool) -> Skills | None:
    """None for shapes that are none of the table's; `new`: the names are of the new layout."""
    width_in, width_out = layer.in_features, layer.out_features
    if a.dim() == b.dim() == 4:
        layout = "old" if routed and not new else "new"
        if layout == "new":  # [K, P, D / P, R], [K, R, P, H / P]
            a, b = a.transpose(0, 1), b.permute(2, 0, 1, 3)
        splits, skills, part_in, rank = a.shape
        fits = (splits * part_in, splits * b.shape[-1]) == (width_in, width_out)
        return Skills(a, b, layout) if fits and b.shape[:3] == (splits, skills, rank) else None
    if a.dim() == b.dim() == 2 and (new or not routed):
        is_new = a.shape[0] == width_in and b.shape == (a.shape[1], width_out)
        is_old = a.shape[1] == width_in and b.shape == (width_out, a.shape[0]) and not new
        if is_new == is_old:  # neither, or an adapter as wide as a square layer
            return None
        a, b = (a, b) if is_new else (a.t(), b.t())
        return Skills(a[None, None], b[None, None], "new" if is_new else "old")
    return None


def selector_of(name: str, granularity: str) -> str:
    """What layers with one selector have in common, as mttl's `_extract_identifier` says.

    Args:
        name: Of a layer.
        granularity: A name of the old layout's, `*`, or for the new layout a text up to and
            including which the names of layers with one selector are equal.

    Raises:
        ValueError: the name of the layer does not contain the granularity.
    """
    if granularity in ("finegrained", "*"):
        return name
    if granularity == "coarsegrained":
        return ""
    pattern = rf"{_PARTS[granularity]}\.[^.]+" if granularity in _PARTS else re.escape(granularity)
    match = re.search(pattern, name)
    if match is None:
        raise ValueError(f"granularity {granularity!r} says nothing about layer {name!r}")
    return name[: match.end()]


def spread_logits(
    layers: Mapping[str, Mapping[str, Tensor]], granularity: str | None, path: Path
) -> dict[str, Tensor]:
    """Logits of every layer; a selector of several layers is saved under the first of them.

    Args:
        layers: In the order of the model.
        granularity: As in `selector_of`; None to tell it from where there are selectors.
        path: Of the file, for errors.

    Raises:
        ValueError: selectors are missing or too many for the granularity, or fit none.
    """
    saved = {name: parts[LOGITS] for name, parts in layers.items() if LOGITS in parts}
    if saved.keys() == layers.keys():
        return saved
    for candidate in (granularity,) if granularity else _GRANULARITIES:
        try:
            groups = {name: selector_of(name, candidate) for name in layers}
        except ValueError as error:
            if granularity:
                raise ValueError(f"{path}: {error}") from error
            continue
        # Groups are contiguous in the order of the model, so their first layers tell them apart.
        firsts: dict[str, str] = {}
        for name, group in groups.items():
            firsts.setdefault(group, name)
        if odd := sorted(saved.keys() ^ set(firsts.values())):
            if granularity:
                raise ValueError(
                    f"{path}: with granularity {granularity!r} {len(firsts)} layers must have "
                    f"selector.module_logits, found {len(saved)}, see {odd[:3]}"
                )
            continue
        return {name: saved[firsts[group]] for name, group in groups.items()}
    lacking = next(name for name in layers if name not in saved)
    raise ValueError(
        f"{path}: {len(saved)} of {len(layers)} layers have selector.module_logits, {lacking!r} "
        f"has none; which layers share one is not as in {list(_GRANULARITIES)}, state it in options"
    )
