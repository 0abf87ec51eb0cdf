# SPDX-License-Identifier: Apache-2.0
"""`impl="torch"`: the mixture as two wide matmuls in plain PyTorch, forward and backward.

With all adapters stacked, the gated sum is one two-layer MLP of width N whose hidden units are
scaled by the gate: `out = base + ((act(x·W_downᵀ + b_down) ⊙ G)·W_up + gate·b_up)`, where G repeats
each gate over the R units of its adapter. Nothing of size [E, T, H] exists.

Works on flat tensors: `x [T, D]`, `gate [G, E]` with each row serving `T / G` consecutive tokens,
packed weights `[N, ·]`. The backward formulas are derived in `docs/derivation.md`. This pair
`forward` / `backward` is the contract of every implementation; `autograd.py` calls it. A linear may
take the place of `base`; where its weight and `w_down` are one matrix in memory that is one matmul
less in each direction. Next: `gated_units.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pemt_fast.ops.gated_units import (
    Weights,
    clear_unused,
    compact,
    gate_dtype,
    per_token,
    quarantine,
    scale_units,
    sum_gate_rows,
    sum_units,
    unused_gates,
)

aten = torch.ops.aten

# BLAS sums a float32 product with one or few rows in one long chain; in this many parts the result
# is as exact as a matmul: over the hidden units of one token, and over tokens for d_b_up.
ROW_PARTS = 8
TOKEN_PARTS = 32

# Below this many tokens copying the used adapters out of the stack costs more than it saves.
MIN_TOKENS_TO_COMPACT = 16


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


def _pre_activation(x: Tensor, weights: Weights) -> Tensor:
    if weights.b_down is None:
        return torch.mm(x, weights.w_down.t())
    return torch.addmm(weights.b_down, x, weights.w_down.t())


def one_matrix(weight: Tensor | None, w_down: Tensor) -> Tensor | None:
    """`[weight; w_down]` `[H + N, D]` without a copy, None unless they lie so in one storage.

    For tensors with data: looked at in every call, so that nothing can be out of date.
    """
    if weight is None or weight.dtype != w_down.dtype or weight.shape[1:] != w_down.shape[1:]:
        return None
    if w_down.data_ptr() != weight.data_ptr() + weight.nbytes or not weight.nbytes:
        return None
    if not (weight.is_contiguous() and w_down.is_contiguous()):
        return None
    # Two storages may be neighbours by chance.
    if weight.untyped_storage()._cdata != w_down.untyped_storage()._cdata:
        return None
    rows, width = weight.shape[0] + w_down.shape[0], w_down.shape[1]
    return weight.as_strided((rows, width), (width, 1))


def _projections(x: Tensor, weights: Weights, base: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """What the mixture is added to, and `x·w_downᵀ + b_down`: columns of one matrix, or not."""
    weight, bias, b_down = weights.weight, weights.bias, weights.b_down
    if weight is None:
        return base, _pre_activation(x, weights)
    both = one_matrix(weight, weights.w_down)
    if both is None:
        return torch.nn.functional.linear(x, weight, bias), _pre_activation(x, weights)
    h, n = weight.shape[0], weights.w_down.shape[0]
    if bias is None and b_down is None:
        columns = torch.mm(x, both.t())
    else:
        parts = (
            x.new_zeros(h) if bias is None else bias,
            x.new_zeros(n) if b_down is None else b_down,
        )
        columns = torch.addmm(torch.cat(parts), x, both.t())
    return columns[:, :h], columns[:, h:]


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


def up_bias_gradient(gate: Tensor, grad_out: Tensor) -> Tensor:
    """`d_b_up = gateᵀ·d_out` `[E, H]` in the dtype of `gate [G, E]`."""
    return _sum_products(gate, sum_gate_rows(grad_out, gate.shape[0], gate.dtype))


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
        base: `[T, H]` or None; added inside the second matmul. None beside `weights.weight`.
        ranks: One rank per adapter, summing to N.
        activation: One of `validation.ACTIVATIONS`.
        save: Also return `z` (gelu, silu) or `act(z)` (identity, relu) `[T, N]` for backward.
        with_hidden: Also return the ungated hidden units `act(z)` `[T, N]`.
    """
    gate = gate.to(gate_dtype(x.dtype))
    unused = unused_gates(gate)
    tokens = x.shape[0]
    if unused is not None and not (save or with_hidden) and gate.device.type == "cpu":
        if tokens >= MIN_TOKENS_TO_COMPACT:
            gate, weights, ranks = compact(gate, weights, ranks)
            unused = unused_gates(gate)
    gate, weights = quarantine(gate, weights, unused, ranks)
    base, z = _projections(x, weights, base)
    if save or with_hidden:
        z = z.contiguous()  # columns of a wider matrix would keep all of it
    hidden = activate(z, activation)
    gated = clear_unused(scale_units(hidden, gate, ranks), unused, ranks)
    if weights.b_up is not None:
        bias_gate = gate if unused is None else gate.masked_fill(unused, 0)
        bias = torch.mm(bias_gate, weights.b_up.to(gate.dtype))  # [G, H]
        bias = per_token(bias, tokens)
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
    for `d_w_down` and when `saved` is None, which means: compute the hidden units again. With
    `weights.weight` `d_x` is that of the linear too.
    """
    needs_x, needs_gate, needs_w_down, needs_w_up, needs_b_down, needs_b_up = needs
    gate = gate.to(gate_dtype(grad_out.dtype))
    tokens, groups = grad_out.shape[0], gate.shape[0]
    unused = unused_gates(gate)
    gate, weights = quarantine(gate, weights, unused, ranks)
    hidden = saved = _saved_units(x, weights, saved, activation, any(needs[:5]))
    if keeps_pre_activation(activation) and (needs_gate or needs_w_up):
        hidden = activate(saved, activation)

    d_gate = d_x = d_w_down = d_w_up = d_b_down = d_b_up = None
    if needs_x or needs_w_down or needs_b_down or needs_gate:
        d_gated = torch.mm(grad_out, weights.w_up.t())  # [T, N]
        if needs_gate:
            d_gate = sum_units(d_gated * hidden, groups, ranks)
        if needs_x or needs_w_down or needs_b_down:
            both = one_matrix(weights.weight, weights.w_down) if needs_x else None
            # [grad_out | d_z], made where it will be read.
            rows = None if both is None else grad_out.new_empty(tokens, len(both))
            room = None if rows is None else rows[:, grad_out.shape[1] :]
            d_h = clear_unused(scale_units(d_gated, gate, ranks, room), unused, ranks)
            if grad_hidden is not None:
                d_h = d_h + grad_hidden
            d_z = activate_backward(d_h, saved, activation)
            if unused is not None:
                # The derivative of an overflowed unit is NaN; a zero gate must stop that too.
                d_z = d_z.masked_fill(d_h == 0, 0)
            if needs_x and rows is not None and both is not None:
                d_x = _joint_input_gradient(grad_out, d_z, rows, both)
            elif needs_x:
                d_x = _input_gradient(grad_out, d_z, weights)
            d_w_down = torch.mm(d_z.t(), x) if needs_w_down and x is not None else None
            d_b_down = d_z.sum(0, dtype=gate.dtype) if needs_b_down else None
    if needs_w_up:
        gated = clear_unused(scale_units(hidden, gate, ranks), unused, ranks)
        d_w_up = torch.mm(gated.t(), grad_out)
    if weights.b_up is not None and (needs_gate or needs_b_up):
        d_out = sum_gate_rows(grad_out, groups, gate.dtype)
        if d_gate is not None:
            d_gate = d_gate + d_out @ weights.b_up.to(gate.dtype).t()
        if needs_b_up:
            d_b_up = _sum_products(gate, d_out)
    if d_gate is not None and unused is not None:
        # A NaN that `quarantine` put here stands for an adapter whose output is not finite.
        d_gate = torch.where(gate.isnan(), gate, d_gate)
    return Gradients(d_x, d_gate, d_w_down, d_w_up, d_b_down, d_b_up)


def _input_gradient(grad_out: Tensor, d_z: Tensor, weights: Weights) -> Tensor:
    """`d_z·w_down`, and with a linear beside it `grad_out·weight + d_z·w_down`."""
    if weights.weight is None:
        return _matmul(d_z, weights.w_down)
    d_x = _matmul(grad_out, weights.weight)
    if d_z.shape[0] == 1:
        return _matmul(d_z, weights.w_down, d_x)
    return d_x.addmm_(d_z, weights.w_down)


def _joint_input_gradient(grad_out: Tensor, d_z: Tensor, rows: Tensor, both: Tensor) -> Tensor:
    """The same as one matmul with `both = [weight; w_down]`; `rows` are filled here."""
    h = grad_out.shape[1]
    rows[:, :h] = grad_out
    if d_z.data_ptr() != rows[:, h:].data_ptr():
        rows[:, h:] = d_z
    return _matmul(rows, both)


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
