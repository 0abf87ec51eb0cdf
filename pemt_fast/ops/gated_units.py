# SPDX-License-Identifier: Apache-2.0
"""Gates and hidden units in plain PyTorch: scaling, summing, and what a gate of 0 stops.

Units are `[T, N]`, gates `[G, E]` with each row serving `T / G` consecutive tokens, ranks one per
adapter. Used by `stacked.py`; the rules for zeros are derived in `docs/derivation.md`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Packed parameters: `w_down [N, D]`, `w_up [N, H]`, `b_down [N]`, `b_up [E, H]`.

    With a linear beside the mixture also its `weight [H, D]` and `bias [H]`.
    """

    w_down: Tensor
    w_up: Tensor
    b_down: Tensor | None
    b_up: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None


def pack(
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Weights:
    """Stacked or packed parameters as `[N, ·]` views, cast only where the dtype differs."""
    return Weights(
        w_down.reshape(-1, w_down.shape[-1]).to(dtype),
        w_up.reshape(-1, w_up.shape[-1]).to(dtype),
        None if b_down is None else b_down.reshape(-1).to(dtype),
        None if b_up is None else b_up.to(dtype),
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
    )


def per_unit(rows: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Repeat `[G, E]` over the hidden units of each adapter: `[G, N]`."""
    if len(set(ranks)) == 1:
        return rows.repeat_interleave(ranks[0], dim=1)
    # No table of indices on the device: making one waits for it, which no graph may capture.
    columns = rows.split(1, 1)
    return torch.cat([c.expand(-1, rank) for c, rank in zip(columns, ranks, strict=True)], 1)


def by_gate_row(rows: Tensor, groups: int) -> Tensor:
    """`[T, ·]` as `[G, T / G, ·]`: the tokens that share a row of the gate."""
    return rows.view(groups, rows.shape[0] // groups if groups else 0, rows.shape[1])


def scale_units(
    units: Tensor, gate: Tensor, ranks: tuple[int, ...], out: Tensor | None = None
) -> Tensor:
    """`units [T, N]` times the gate of their adapter; the product in the gate's dtype."""
    groups, scale = gate.shape[0], per_unit(gate, ranks).unsqueeze(1)  # [G, 1, N]
    if out is not None:
        torch.mul(by_gate_row(units, groups), scale, out=by_gate_row(out, groups))
        return out
    scaled = torch.mul(by_gate_row(units, groups), scale).view_as(units)
    return scaled if scaled.dtype == units.dtype else scaled.to(units.dtype)


def clear_unused(units: Tensor, unused: Tensor | None, ranks: tuple[int, ...]) -> Tensor:
    """Write zeros where the gate is exactly 0, so that 0 · inf cannot become NaN. In place."""
    if unused is not None:
        mask = per_unit(unused, ranks).unsqueeze(1)
        by_gate_row(units, unused.shape[0]).masked_fill_(mask, 0)
    return units


def sum_units(units: Tensor, groups: int, ranks: tuple[int, ...]) -> Tensor:
    """Sum `[T, N]` over the units of each adapter and the tokens of each gate row: `[G, E]`."""
    dtype = gate_dtype(units.dtype)
    per_row = units if units.shape[0] == groups else by_gate_row(units, groups).sum(1, dtype=dtype)
    if len(set(ranks)) == 1:
        return per_row.view(groups, len(ranks), ranks[0]).sum(-1, dtype=dtype)
    return torch.stack([part.sum(-1, dtype=dtype) for part in per_row.split(ranks, 1)], 1)


def sum_gate_rows(grad_out: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`[T, H]` summed over the tokens of each gate row: `[G, H]`."""
    return by_gate_row(grad_out, groups).sum(1, dtype=dtype)


def unused_gates(gate: Tensor) -> Tensor | None:
    """Mask of the gates that are exactly 0, or `None` when the host can see there is none."""
    mask = gate == 0
    # Only on the CPU is looking free; elsewhere it would wait for the device.
    if gate.device.type == "cpu" and not bool(mask.any()):
        return None
    return mask


def quarantine(
    gate: Tensor, weights: Weights, unused: Tensor | None, ranks: tuple[int, ...]
) -> tuple[Tensor, Weights]:
    """Move non-finite weights into the gate, where a zero can stop them.

    The rows of an adapter with a NaN or infinite weight become zeros and its non-zero gates become
    NaN: tokens that use it get NaN, tokens that do not get exactly nothing, gradients included.
    """
    if unused is None:
        return gate, weights
    bad_unit = ~(weights.w_down.isfinite().all(1) & weights.w_up.isfinite().all(1))
    if weights.b_down is not None:
        bad_unit = bad_unit | ~weights.b_down.isfinite()
    bad = torch.stack([units.any() for units in bad_unit.split(ranks)])
    if weights.b_up is not None:
        bad = bad | ~weights.b_up.isfinite().all(1)
    if gate.device.type == "cpu" and not bool(bad.any()):
        return gate, weights
    bad_n1 = per_unit(bad.unsqueeze(0), ranks).t()
    b_down, b_up = weights.b_down, weights.b_up
    weights = weights._replace(
        w_down=weights.w_down.masked_fill(bad_n1, 0),
        w_up=weights.w_up.masked_fill(bad_n1, 0),
        b_down=None if b_down is None else b_down.masked_fill(bad_n1[:, 0], 0),
        b_up=None if b_up is None else b_up.masked_fill(bad.unsqueeze(1), 0),
    )
    return gate.masked_fill(bad & ~unused, float("nan")), weights


def compact(
    gate: Tensor, weights: Weights, ranks: tuple[int, ...]
) -> tuple[Tensor, Weights, tuple[int, ...]]:
    """Drop the adapters that no token uses: their work is skipped."""
    used = (gate != 0).any(0)
    if bool(used.all()) or not bool(used.any()):
        return gate, weights, ranks
    units = per_unit(used.unsqueeze(0), ranks).squeeze(0).nonzero().squeeze(1)
    kept = used.nonzero().squeeze(1)
    b_down, b_up = weights.b_down, weights.b_up
    weights = weights._replace(
        w_down=weights.w_down.index_select(0, units),
        w_up=weights.w_up.index_select(0, units),
        b_down=None if b_down is None else b_down.index_select(0, units),
        b_up=None if b_up is None else b_up.index_select(0, kept),
    )
    return gate.index_select(1, kept), weights, tuple(ranks[e] for e in kept.tolist())


def gate_dtype(x_dtype: torch.dtype) -> torch.dtype:
    """In which dtype gates are applied and their gradients summed."""
    return torch.float64 if x_dtype == torch.float64 else torch.float32


def per_token(gate: Tensor, tokens: int) -> Tensor:
    """`[G, E]` to `[T, E]`."""
    if gate.shape[0] == tokens:
        return gate
    return gate.repeat_interleave(tokens // max(gate.shape[0], 1), dim=0)
