# SPDX-License-Identifier: Apache-2.0
"""What the readers of other libraries' files share: filling adapters on linears.

Tensors of a LoRA are `A [R, D]`, `B [H, R]`; of Poly and MHR `A [P, K, D / P, R]`,
`B [P, K, R, H / P]` and the router's logits `[T, P·K]`, as in peft (P splits, K skills, T tasks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pemt_fast.linear_model import LinearAdapterModel

# Name in the file -> our parameter, and what brings the file's tensor into its order.
Places = dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]


def adapter_places(model: LinearAdapterModel, prefix: str, names: tuple[str, ...]) -> Places:
    """Where the tensors of every adapted layer go, by `{prefix}{layer}.{name}`.

    Args:
        model: With LoRA or Poly.
        prefix: Before the names of the layers.
        names: Of A and B of a LoRA; of A, B and the logits of Poly.
    """
    places: Places = {}
    for layer_name, layer in model.adapted_layers().items():
        parts: Any = layer
        own: tuple[Tensor, ...]
        turns: tuple[Callable[[Tensor], Tensor], ...]
        if len(names) == 3:
            own = (parts.a, parts.b, parts.router.logits)
            turns = (lambda t: t.transpose(-1, -2), _as_it_is, _as_it_is)
        else:
            own = (parts.mixture.w_down, parts.mixture.w_up)
            turns = (_as_it_is, torch.t)
        for name, parameter, turn in zip(names, own, turns, strict=True):
            places[f"{prefix}{layer_name}.{name}"] = parameter, turn
    return places


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def assign(places: Places, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy a file's tensors to their places; nothing may be missing, left over or misfit.

    Raises:
        ValueError: something is; the message names it and the file, and nothing was copied.
    """
    if odd := sorted(places.keys() ^ tensors.keys()):
        raise ValueError(f"{path}: does not fit this model, see {odd[:3]}")
    for name, (parameter, turn) in places.items():
        if turn(tensors[name]).numel() != parameter.numel():
            raise ValueError(
                f"{path}: {name} must have {parameter.numel()} elements for this model, "
                f"got {tensors[name].numel()}"
            )
    for name, (parameter, turn) in places.items():
        parameter.copy_(turn(tensors[name]).reshape(parameter.shape))
