# SPDX-License-Identifier: Apache-2.0
"""The Task Sparsity Loss and its gradients in rank space, on flat tensors: the matmuls.

Letters as in `sparsity_loss.py`, with T tokens flat. `products = z·w_upᵀ` and `folded_e =
hidden_e·(w_up[e]·w_up[e]ᵀ)`, both `[T, N]`, are all of that width that is ever needed:
`⟨z, m_e⟩ = Σ products_e ⊙ hidden_e` and `‖m_e‖² = Σ folded_e ⊙ hidden_e`, to which
`c = b_up[e] + residual` adds `⟨z, c⟩` and `‖c‖² + 2·Σ projected_e ⊙ hidden_e` with `projected =
c·w_upᵀ`. What happens to each token in between is in `sparsity_rows.py`.

Matrices are in the dtype of z, sums per adapter `[T, E]` in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pemt_fast.ops.sparsity_rows import Operands, Rows, Wanted, rows


class Inputs(NamedTuple):
    """What the loss is made of; `mask` is None where all tokens count."""

    z: Tensor  # [T, H]
    gate: Tensor  # [B, E]
    hidden: Tensor  # [T, N]
    w_up: Tensor  # [N, H]
    b_up: Tensor | None  # [E, H]
    residual: Tensor | None  # [T, H]
    mask: Tensor | None  # [T]
    ranks: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of sums."""
        return torch.float64 if self.z.dtype == torch.float64 else torch.float32

    @property
    def equal(self) -> bool:
        """Whether all adapters have one rank."""
        return len(set(self.ranks)) == 1


class Needs(NamedTuple):
    """Which gradients."""

    z: bool = False
    gate: bool = False
    hidden: bool = False
    w_up: bool = False
    b_up: bool = False
    residual: bool = False


def loss_and_gradients(
    inputs: Inputs, needs: Needs, impl: str
) -> tuple[Tensor, list[Tensor | None]]:
    """`Σ_e mean_b(gate[b, e])·(1 − mean_t cos)`, and the gradients in the order of `Needs`.

    All gradients but that of the gate are `scale_of(T)` times as large.
    """
    share = inputs.gate.to(inputs.dtype).mean(0)
    has_offset = inputs.b_up is not None or inputs.residual is not None
    offset_dot, offset_squared = _offset_sums(inputs) if has_offset else (None, None)
    operands = Operands(
        inputs.z, inputs.hidden, torch.mm(inputs.z, inputs.w_up.t()), _fold(inputs),
        _project(inputs) if has_offset else None, offset_dot, offset_squared, inputs.mask, share,
    )  # fmt: skip
    falls_on_c = needs.b_up or needs.residual
    wanted = Wanted(
        factors=falls_on_c or (needs.z and has_offset),
        scaled=needs.z or needs.w_up,
        by_norm=needs.w_up or falls_on_c,
        d_hidden=needs.hidden,
        d_z=needs.z,
    )
    found = rows(operands, inputs.ranks, scale_of(inputs.z.shape[0]), wanted, impl)
    value = (share * found.disagreement).sum()
    return value, _gradients(inputs, needs, found)


def scale_of(tokens: int) -> int:
    """By how much gradients are too large: they are of the order of 1/T, too small for float16.

    A power of two, so that taking it back rounds nothing.
    """
    return 1 << max(tokens - 1, 0).bit_length()


def _gradients(inputs: Inputs, needs: Needs, found: Rows) -> list[Tensor | None]:
    d_gate = d_w_up = d_b_up = d_residual = None
    if needs.gate:
        B = inputs.gate.shape[0]
        d_gate = (found.disagreement / max(B, 1)).to(inputs.gate.dtype).repeat(B, 1)
    if needs.w_up:
        d_w_up = _weight_gradient(inputs, found)
    if needs.b_up and inputs.b_up is not None:
        d_b_up = _bias_gradient(inputs, inputs.b_up, found)
    if needs.residual and inputs.residual is not None:
        d_residual = _residual_gradient(inputs, inputs.residual, found)
    d_z = _output_gradient(inputs, found) if needs.z else None
    return [d_z, d_gate, found.d_hidden, d_w_up, d_b_up, d_residual]


def _fold(inputs: Inputs) -> Tensor:
    """`hidden_e·(w_up[e]·w_up[e]ᵀ)` of every adapter, `[T, N]`."""
    hidden, w_up, ranks = inputs.hidden, inputs.w_up, inputs.ranks
    if not inputs.equal:
        pairs = zip(hidden.split(ranks, 1), w_up.split(ranks), strict=True)
        return torch.cat([h @ (w @ w.t()) for h, w in pairs], 1)
    E, R = len(ranks), ranks[0]
    stacked = w_up.view(E, R, -1)
    gram = torch.bmm(stacked, stacked.transpose(1, 2))  # [E, R, R]
    folded = hidden.new_empty(hidden.shape)
    torch.bmm(
        hidden.view(-1, E, R).transpose(0, 1), gram, out=folded.view(-1, E, R).transpose(0, 1)
    )
    return folded


def _project(inputs: Inputs) -> Tensor:
    """`c·w_upᵀ` for each adapter's own c, `[T, N]` or `[1, N]`."""
    projected = None
    if inputs.residual is not None:
        projected = torch.mm(inputs.residual, inputs.w_up.t())
    if inputs.b_up is not None:
        parts = zip(inputs.w_up.split(inputs.ranks), inputs.b_up, strict=True)
        along = torch.cat([(w * b).sum(-1) for w, b in parts]).unsqueeze(0)
        projected = along if projected is None else projected + along
    assert projected is not None
    return projected


def _offset_sums(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`⟨z, c⟩` and `‖c‖²`, `[T, E]` or what expands to it."""
    z, b_up, residual, dtype = inputs.z, inputs.b_up, inputs.residual, inputs.dtype
    dot = squared = torch.zeros((), dtype=dtype, device=z.device)
    if residual is not None:
        dot = dot + (z * residual).sum(-1, keepdim=True, dtype=dtype)
        squared = squared + _squared_norm(residual, dtype).unsqueeze(1)
    if b_up is not None:
        dot = dot + torch.mm(z, b_up.t()).to(dtype)
        squared = squared + _squared_norm(b_up, dtype)
        if residual is not None:
            squared = squared + 2 * torch.mm(residual, b_up.t()).to(dtype)
    return dot, squared


def _squared_norm(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()


def _output_gradient(inputs: Inputs, found: Rows) -> Tensor:
    """`d_z [T, H]`, in place of what the rows left there."""
    b_up, residual = inputs.b_up, inputs.residual
    d_z, scaled, for_dot = found.d_z, found.scaled, found.for_dot
    assert d_z is not None and scaled is not None
    d_z.addmm_(scaled, inputs.w_up)
    if for_dot is not None and b_up is not None:
        d_z.addmm_(for_dot.to(d_z.dtype), b_up)
    if for_dot is not None and residual is not None:
        d_z.addcmul_(residual, for_dot.sum(1, keepdim=True).to(d_z.dtype))
    return d_z


def _weight_gradient(inputs: Inputs, found: Rows) -> Tensor:
    """`d_w_up [N, H]`: by the products with z, by the Gram matrix, by c."""
    z, hidden, w_up, ranks = inputs.z, inputs.hidden, inputs.w_up, inputs.ranks
    scaled, by_norm = found.scaled, found.by_norm
    assert scaled is not None and by_norm is not None
    d_w_up = torch.mm(scaled.t(), z)
    parts = zip(
        by_norm.split(ranks, 1), hidden.split(ranks, 1), w_up.split(ranks), d_w_up.split(ranks),
        strict=True,
    )  # fmt: skip
    for norm, h, w, d in parts:
        d.addmm_(norm.t() @ h, w)
    if inputs.residual is not None:
        d_w_up.addmm_(by_norm.t(), inputs.residual)
    if inputs.b_up is not None:
        sums = by_norm.sum(0, dtype=inputs.dtype).to(z.dtype).unsqueeze(1).split(ranks)
        for s, b, d in zip(sums, inputs.b_up, d_w_up.split(ranks), strict=True):
            d.addcmul_(s, b)
    return d_w_up


def _bias_gradient(inputs: Inputs, b_up: Tensor, found: Rows) -> Tensor:
    """`d_b_up [E, H]`: what falls on c, summed over the tokens."""
    for_dot, for_norm, by_norm, dtype = found.for_dot, found.for_norm, found.by_norm, b_up.dtype
    assert for_dot is not None and for_norm is not None and by_norm is not None
    d_b_up = torch.mm(for_dot.to(dtype).t(), inputs.z)
    d_b_up.addcmul_(b_up, for_norm.sum(0).to(dtype).unsqueeze(1))
    if inputs.residual is not None:
        d_b_up.addmm_(for_norm.to(dtype).t(), inputs.residual)
    sums = by_norm.sum(0, dtype=inputs.dtype).to(dtype).split(inputs.ranks)
    for e, (s, w) in enumerate(zip(sums, inputs.w_up.split(inputs.ranks), strict=True)):
        d_b_up[e] += s @ w
    return d_b_up


def _residual_gradient(inputs: Inputs, residual: Tensor, found: Rows) -> Tensor:
    """`d_residual [T, H]`: what falls on c, summed over the adapters."""
    for_dot, for_norm, by_norm, dtype = found.for_dot, found.for_norm, found.by_norm, residual.dtype
    assert for_dot is not None and for_norm is not None and by_norm is not None
    d_residual = torch.mm(by_norm, inputs.w_up)
    d_residual.addcmul_(inputs.z, for_dot.sum(1, keepdim=True).to(dtype))
    d_residual.addcmul_(residual, for_norm.sum(1, keepdim=True).to(dtype))
    if inputs.b_up is not None:
        d_residual.addmm_(for_norm.to(dtype), inputs.b_up)
    return d_residual
