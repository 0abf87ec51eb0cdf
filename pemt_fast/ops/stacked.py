# SPDX-License-Identifier: Apache-2.0
"""`impl="torch"`: the mixture as two wide matmuls in plain PyTorch, forward and backward.

With all adapters stacked, the gated sum is one two-layer MLP of width N whose hidden units are
scaled by the gate: `out = base + ((act(x·W_downᵀ + b_down) ⊙ G)·W_up + gate·b_up)`, where G repeats
each gate over the R units of its adapter. Nothing of size [E, T, H] exists.

Works on flat tensors: `x [T, D]`, `gate [G, E]` with each row serving `T / G` consecutive tokens,
packed weights `[N, ·]`. The backward formulas are derived in `docs/derivation.md`. This pair
`forward` / `backward` is the contract of every implementation; `autograd.py` calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

# BLAS sums a float32 product with one or few rows in one long chain; in this many parts the result
# is as exact as a matmul: over the hidden units of one token, and over tokens for d_b_up.
ROW_PARTS = 8
TOKEN_PARTS = 32

# Below this many tokens copying the used adapters out of the stack costs more than it saves.
MIN_TOKENS_TO_COMPACT = 16


class Weights(NamedTuple):
    """Packed parameters: `w_down [N, D]`, `w_up [N, H]`, `b_down [N]`, `b_up [E, H]`."""

    w_down: Tensor
    w_up: Tensor
    b_down: Tensor | None
    b_up: Tensor | None


class Gradients(NamedTuple):
    """Gradients of the inputs, `None` where not asked for; weights packed like `Weights`."""

    d_x: Tensor | None
    d_gate: Tensor | None
    d_w_down: Tensor | None
    d_w_up: Tensor | None
    d_b_down: Tensor | None
    d_b_up: Tensor | None


def keeps_pre_activation(activation: str) -> bool:
    """Whether backward needs `z` (gelu, silu) rather than `act(z)` (identity, relu)."""
    return activation not in ("identity", "relu")


def activate(z: Tensor, activation: str) -> Tensor:
    """`act(z)`. `z` is overwritten where backward does not need it (identity, relu)."""
    if activation == "relu":
        return torch.relu_(z)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    if activation in ("gelu", "gelu_tanh"):
        return aten.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return z


def activate_backward(d_h: Tensor, saved: Tensor, activation: str) -> Tensor:
    """`d_h ⊙ act'(z)` from `z` (gelu, silu) or from `act(z)` (relu)."""
    if activation == "relu":
        return aten.threshold_backward(d_h, saved, 0)
    if activation == "silu":
        return aten.silu_backward(d_h, saved)
    if activation in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(
            d_h, saved, approximate="tanh" if activation == "gelu_tanh" else "none"
        )
    return d_h


def _per_unit(rows: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Repeat `[G, E]` over the hidden units of each adapter: `[G, N]`."""
    if len(set(ranks)) == 1:
        return rows.repeat_interleave(ranks[0], dim=1)
    # No table of indices on the device: making one waits for it, which no graph may capture.
    columns = rows.split(1, 1)
    return torch.cat([c.expand(-1, rank) for c, rank in zip(columns, ranks, strict=True)], 1)


def _by_gate_row(rows: Tensor, groups: int) -> Tensor:
    """`[T, ·]` as `[G, T / G, ·]`: the tokens that share a row of the gate."""
    return rows.view(groups, rows.shape[0] // groups if groups else 0, rows.shape[1])


def scale_units(units: Tensor, gate: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """`units [T, N]` times the gate of their adapter; the product in the gate's dtype."""
    scale = _per_unit(gate, ranks).unsqueeze(1)  # [G, 1, N]
    scaled = torch.mul(_by_gate_row(units, gate.shape[0]), scale).view_as(units)
    return scaled if scaled.dtype == units.dtype else scaled.to(units.dtype)


def _clear_unused(units: Tensor, unused: Tensor | None, ranks: tuple[int, ...]) -> Tensor:
    """Write zeros where the gate is exactly 0, so that 0 · inf cannot become NaN. In place."""
    if unused is not None:
        mask = _per_unit(unused, ranks).unsqueeze(1)
        _by_gate_row(units, unused.shape[0]).masked_fill_(mask, 0)
    return units


def _sum_units(units: Tensor, groups: int, ranks: tuple[int, ...]) -> Tensor:
    """Sum `[T, N]` over the units of each adapter and the tokens of each gate row: `[G, E]`."""
    dtype = _gate_dtype(units.dtype)
    per_row = units if units.shape[0] == groups else _by_gate_row(units, groups).sum(1, dtype=dtype)
    if len(set(ranks)) == 1:
        return per_row.view(groups, len(ranks), ranks[0]).sum(-1, dtype=dtype)
    return torch.stack([part.sum(-1, dtype=dtype) for part in per_row.split(ranks, 1)], 1)


def _sum_gate_rows(grad_out: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`[T, H]` summed over the tokens of each gate row: `[G, H]`."""
    return _by_gate_row(grad_out, groups).sum(1, dtype=dtype)


def up_bias_gradient(gate: Tensor, grad_out: Tensor) -> Tensor:
    """`d_b_up = gateᵀ·d_out` `[E, H]` in the dtype of `gate [G, E]`."""
    return _sum_products(gate, _sum_gate_rows(grad_out, gate.shape[0], gate.dtype))


def _unused(gate: Tensor) -> Tensor | None:
    """Mask of the gates that are exactly 0, or `None` when the host can see there is none."""
    mask = gate == 0
    # Only on the CPU is looking free; elsewhere it would wait for the device.
    if gate.device.type == "cpu" and not bool(mask.any()):
        return None
    return mask


def _quarantine(
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
    bad_n1 = _per_unit(bad.unsqueeze(0), ranks).t()
    weights = Weights(
        weights.w_down.masked_fill(bad_n1, 0),
        weights.w_up.masked_fill(bad_n1, 0),
        None if weights.b_down is None else weights.b_down.masked_fill(bad_n1[:, 0], 0),
        None if weights.b_up is None else weights.b_up.masked_fill(bad.unsqueeze(1), 0),
    )
    return gate.masked_fill(bad & ~unused, float("nan")), weights


def _compact(
    gate: Tensor, weights: Weights, ranks: tuple[int, ...]
) -> tuple[Tensor, Weights, tuple[int, ...]]:
    """Drop the adapters that no token uses: their work is skipped."""
    used = (gate != 0).any(0)
    if bool(used.all()) or not bool(used.any()):
        return gate, weights, ranks
    units = _per_unit(used.unsqueeze(0), ranks).squeeze(0).nonzero().squeeze(1)
    kept = used.nonzero().squeeze(1)
    weights = Weights(
        weights.w_down.index_select(0, units),
        weights.w_up.index_select(0, units),
        None if weights.b_down is None else weights.b_down.index_select(0, units),
        None if weights.b_up is None else weights.b_up.index_select(0, kept),
    )
    return gate.index_select(1, kept), weights, tuple(ranks[e] for e in kept.tolist())


def _pre_activation(x: Tensor, weights: Weights) -> Tensor:
    if weights.b_down is None:
        return torch.mm(x, weights.w_down.t())
    return torch.addmm(weights.b_down, x, weights.w_down.t())


def _matmul(rows: Tensor, weight: Tensor, base: Tensor | None = None) -> Tensor:
    """`base + rows·weight` for `rows [T, K]`, `weight [K, ·]`, accumulated in float32 or better."""
    k = rows.shape[1]
    if rows.shape[0] != 1 or rows.dtype != torch.float32 or k < 8 * ROW_PARTS:
        return torch.mm(rows, weight) if base is None else torch.addmm(base, rows, weight)
    main = k // ROW_PARTS * ROW_PARTS
    parts = torch.bmm(
        rows[:, :main].view(ROW_PARTS, 1, -1), weight[:main].unflatten(0, (ROW_PARTS, -1))
    )
    out = parts.sum(0)
    if main < k:
        out = torch.addmm(out, rows[:, main:], weight[main:])
    return out if base is None else out.add_(base)


def _sum_products(a: Tensor, b: Tensor) -> Tensor:
    """`Σ_t a[t]ᵀ·b[t]` for `a [T, E]` with few columns and `b [T, H]`: `[E, H]`."""
    tokens = a.shape[0]
    if a.dtype != torch.float32 or tokens < 2 * TOKEN_PARTS:
        return torch.mm(a.t(), b)
    main = tokens // TOKEN_PARTS * TOKEN_PARTS
    out = torch.bmm(
        a[:main].unflatten(0, (TOKEN_PARTS, -1)).transpose(1, 2),
        b[:main].unflatten(0, (TOKEN_PARTS, -1)),
    ).sum(0)
    return out if main == tokens else torch.addmm(out, a[main:].t(), b[main:])


def _gate_dtype(x_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if x_dtype == torch.float64 else torch.float32


def _per_token(gate: Tensor, tokens: int) -> Tensor:
    """`[G, E]` to `[T, E]`."""
    if gate.shape[0] == tokens:
        return gate
    return gate.repeat_interleave(tokens // max(gate.shape[0], 1), dim=0)


def forward(
    x: Tensor,
    gate: Tensor,
    weights: Weights,
    base: Tensor | None,
    ranks: tuple[int, ...],
    activation: str,
    save: bool,
    with_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, hidden units when asked for, and what backward needs when `save`.

    Args:
        x: `[T, D]`; the dtype of the computation. The matmuls accumulate in float32.
        gate: `[G, E]`, any float dtype; applied in float32.
        weights: Packed, in the dtype of `x`.
        base: `[T, H]` or None; added inside the second matmul.
        ranks: One rank per adapter, summing to N.
        activation: One of `validation.ACTIVATIONS`.
        save: Also return `z` (gelu, silu) or `act(z)` (identity, relu) `[T, N]` for backward.
        with_hidden: Also return the ungated hidden units `act(z)` `[T, N]`.
    """
    gate = gate.to(_gate_dtype(x.dtype))
    unused = _unused(gate)
    tokens = x.shape[0]
    if unused is not None and not (save or with_hidden) and gate.device.type == "cpu":
        if tokens >= MIN_TOKENS_TO_COMPACT:
            gate, weights, ranks = _compact(gate, weights, ranks)
            unused = _unused(gate)
    gate, weights = _quarantine(gate, weights, unused, ranks)
    z = _pre_activation(x, weights)
    hidden = activate(z, activation)
    gated = _clear_unused(scale_units(hidden, gate, ranks), unused, ranks)
    if weights.b_up is not None:
        bias_gate = gate if unused is None else gate.masked_fill(unused, 0)
        bias = torch.mm(bias_gate, weights.b_up.to(gate.dtype))  # [G, H]
        bias = _per_token(bias, tokens)
        base = (bias if base is None else base + bias).to(x.dtype)
    out = _matmul(gated, weights.w_up, None if base is None else base.to(x.dtype))
    saved = None if not save else z if keeps_pre_activation(activation) else hidden
    return out, hidden if with_hidden else None, saved


def backward(
    grad_out: Tensor,
    grad_hidden: Tensor | None,
    x: Tensor | None,
    gate: Tensor,
    weights: Weights,
    saved: Tensor | None,
    ranks: tuple[int, ...],
    activation: str,
    needs: tuple[bool, ...],
) -> Gradients:
    """Only the gradients that `needs` names, in the order of `Gradients`.

    `grad_out [T, H]` and `grad_hidden [T, N]` arrive in the dtype of the computation. `x` is needed
    for `d_w_down` and when `saved` is None, which means: compute the hidden units again.
    """
    needs_x, needs_gate, needs_w_down, needs_w_up, needs_b_down, needs_b_up = needs
    gate = gate.to(_gate_dtype(grad_out.dtype))
    groups = gate.shape[0]
    unused = _unused(gate)
    gate, weights = _quarantine(gate, weights, unused, ranks)
    hidden = saved = _saved_units(x, weights, saved, activation, any(needs[:5]))
    if keeps_pre_activation(activation) and (needs_gate or needs_w_up):
        hidden = activate(saved, activation)

    d_gate = d_x = d_w_down = d_w_up = d_b_down = d_b_up = None
    if needs_x or needs_w_down or needs_b_down or needs_gate:
        d_gated = torch.mm(grad_out, weights.w_up.t())  # [T, N]
        if needs_gate:
            d_gate = _sum_units(d_gated * hidden, groups, ranks)
        if needs_x or needs_w_down or needs_b_down:
            d_h = _clear_unused(scale_units(d_gated, gate, ranks), unused, ranks)
            if grad_hidden is not None:
                d_h = d_h + grad_hidden
            d_z = activate_backward(d_h, saved, activation)
            if unused is not None:
                # The derivative of an overflowed unit is NaN; a zero gate must stop that too.
                d_z = d_z.masked_fill(d_h == 0, 0)
            d_x = _matmul(d_z, weights.w_down) if needs_x else None
            d_w_down = torch.mm(d_z.t(), x) if needs_w_down and x is not None else None
            d_b_down = d_z.sum(0, dtype=gate.dtype) if needs_b_down else None
    if needs_w_up:
        gated = _clear_unused(scale_units(hidden, gate, ranks), unused, ranks)
        d_w_up = torch.mm(gated.t(), grad_out)
    if weights.b_up is not None and (needs_gate or needs_b_up):
        d_out = _sum_gate_rows(grad_out, groups, gate.dtype)
        if d_gate is not None:
            d_gate = d_gate + d_out @ weights.b_up.to(gate.dtype).t()
        if needs_b_up:
            d_b_up = _sum_products(gate, d_out)
    if d_gate is not None and unused is not None:
        # A NaN that `_quarantine` put here stands for an adapter whose output is not finite.
        d_gate = torch.where(gate.isnan(), gate, d_gate)
    return Gradients(d_x, d_gate, d_w_down, d_w_up, d_b_down, d_b_up)


def _saved_units(
    x: Tensor | None, weights: Weights, saved: Tensor | None, activation: str, needed: bool
) -> Tensor:
    """What forward saved, or the same computed again from `x`; empty when nothing needs it."""
    if saved is not None:
        return saved
    if not needed:
        return weights.w_down.new_empty(0)
    assert x is not None
    z = _pre_activation(x, weights)
    return z if keeps_pre_activation(activation) else activate(z, activation)
