# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the Task Sparsity Loss and its gradients in rank space, on flat tensors.

Letters as in `sparsity_loss.py`, with T tokens flat. `products = z·w_upᵀ` and `folded_e =
hidden_e·(w_up[e]·w_up[e]ᵀ)`, both `[T, N]`, are all of that width that is ever needed:
`⟨z, m_e⟩ = Σ products_e ⊙ hidden_e` and `‖m_e‖² = Σ folded_e ⊙ hidden_e`, to which
`c = b_up[e] + residual` adds `⟨z, c⟩` and `‖c‖² + 2·Σ projected_e ⊙ hidden_e` with `projected =
c·w_upᵀ`.

Matrices are in the dtype of z, sums per adapter `[T, E]` in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pemt_fast.ops.stacked import scale_units

# torch.nn.functional.cosine_similarity clamps each norm at this value.
COSINE_EPS = 1e-8


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


class Terms(NamedTuple):
    """What the loss and its gradients share."""

    products: Tensor  # [T, N]
    folded: Tensor  # [T, N], with `projected` where there is a c
    z_norm: Tensor  # [T, 1], clamped
    m_norm: Tensor  # [T, E], clamped
    cosine: Tensor  # [T, E]
    weight: Tensor  # [T, 1], what a token counts for; sums to 1
    disagreement: Tensor  # [E], 1 − mean cosine


def terms(inputs: Inputs) -> Terms:
    """Everything but the gate."""
    z, hidden, w_up, dtype = inputs.z, inputs.hidden, inputs.w_up, inputs.dtype
    products = torch.mm(z, w_up.t())
    dot = _sum_units(products * hidden, inputs)
    folded = _fold(inputs)
    if inputs.b_up is None and inputs.residual is None:
        squared = _sum_units(folded * hidden, inputs)
    else:
        projected = _project(inputs)
        # ‖m‖² = hidden·(folded + 2·projected) + ‖c‖²; the gradient has folded + projected.
        offset_dot, offset_squared = _offset_sums(inputs)
        dot = dot + offset_dot
        squared = _sum_units((folded + 2 * projected) * hidden, inputs) + offset_squared
        folded = folded + projected
    z_norm = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=dtype).clamp_min(COSINE_EPS)
    m_norm = squared.clamp_min(COSINE_EPS**2).sqrt()
    cosine = dot / (z_norm * m_norm)
    weight, counts = _weight(inputs)
    disagreement = counts - (cosine * weight).sum(0)
    return Terms(products, folded, z_norm, m_norm, cosine, weight, disagreement)


def loss(inputs: Inputs, found: Terms) -> Tensor:
    """`Σ_e mean_b(gate[b, e])·(1 − mean_t cos)`."""
    return (inputs.gate.to(inputs.dtype).mean(0) * found.disagreement).sum()


def scale_of(tokens: int) -> int:
    """By how much gradients are too large: they are of the order of 1/T, too small for float16.

    A power of two, so that taking it back rounds nothing.
    """
    return 1 << max(tokens - 1, 0).bit_length()


def gradients(inputs: Inputs, found: Terms, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Of z, gate, hidden, w_up, b_up and residual where `needs` says so.

    All but that of the gate are `scale_of(T)` times as large.
    """
    needs_z, needs_gate, needs_hidden, needs_w_up, needs_b_up, needs_residual = needs
    z, hidden, w_up, b_up, residual = (
        inputs.z, inputs.hidden, inputs.w_up, inputs.b_up, inputs.residual,
    )  # fmt: skip
    share = inputs.gate.to(inputs.dtype).mean(0)
    d_cosine = -share * found.weight * scale_of(inputs.z.shape[0])  # [T, E]
    for_dot = d_cosine / (found.z_norm * found.m_norm)
    moving = found.m_norm > COSINE_EPS  # a clamped norm does not change
    # Twice the gradient of ‖m‖², which every use of it has.
    for_norm = -d_cosine * found.cosine / found.m_norm.square() * moving
    d_z = d_gate = d_hidden = d_w_up = d_b_up = d_residual = None
    low = for_dot.to(z.dtype)
    if needs_z:
        d_z = torch.mm(scale_units(hidden, for_dot, inputs.ranks), w_up)
        along = (d_cosine * found.cosine).sum(1, keepdim=True) / found.z_norm.square()
        d_z.addcmul_(z, (along * (found.z_norm > COSINE_EPS)).to(z.dtype), value=-1)
        if b_up is not None:
            d_z.addmm_(low, b_up)
        if residual is not None:
            d_z.addcmul_(residual, for_dot.sum(1, keepdim=True).to(z.dtype))
    if needs_gate:
        B = inputs.gate.shape[0]
        d_gate = (found.disagreement / max(B, 1)).to(inputs.gate.dtype).repeat(B, 1)
    if needs_hidden:
        d_hidden = scale_units(found.products, for_dot, inputs.ranks)
        d_hidden.add_(scale_units(found.folded, for_norm, inputs.ranks))
    if needs_w_up or needs_b_up or needs_residual:
        by_norm = scale_units(hidden, for_norm, inputs.ranks)  # [T, N]
        if needs_w_up:
            d_w_up = _weight_gradient(inputs, for_dot, by_norm)
        if needs_b_up and b_up is not None:
            d_b_up = _bias_gradient(inputs, low, for_norm, by_norm)
        if needs_residual and residual is not None:
            d_residual = torch.mm(by_norm, w_up)
            d_residual.addcmul_(z, for_dot.sum(1, keepdim=True).to(z.dtype))
            d_residual.addcmul_(residual, for_norm.sum(1, keepdim=True).to(z.dtype))
            if b_up is not None:
                d_residual.addmm_(for_norm.to(z.dtype), b_up)
    return [d_z, d_gate, d_hidden, d_w_up, d_b_up, d_residual]


def _sum_units(units: Tensor, inputs: Inputs) -> Tensor:
    """`[T, N]` summed over the units of each adapter: `[T, E]`."""
    ranks = inputs.ranks
    if inputs.equal:
        return units.view(-1, len(ranks), ranks[0]).sum(-1, dtype=inputs.dtype)
    return torch.stack([part.sum(-1, dtype=inputs.dtype) for part in units.split(ranks, 1)], 1)


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


def _weight(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What each token counts for `[T, 1]`, and 1, or 0 if no token counts."""
    T, device, dtype = inputs.z.shape[0], inputs.z.device, inputs.dtype
    if inputs.mask is None:
        one = torch.full((), float(T > 0), dtype=dtype, device=device)
        return torch.full((T, 1), 1 / max(T, 1), dtype=dtype, device=device), one
    mask = inputs.mask.view(-1, 1).to(dtype)
    count = mask.sum()
    return mask / count.clamp_min(1), (count > 0).to(dtype)


def _weight_gradient(inputs: Inputs, for_dot: Tensor, by_norm: Tensor) -> Tensor:
    """`d_w_up [N, H]`: by the products with z, by the Gram matrix, by c."""
    z, hidden, w_up, ranks = inputs.z, inputs.hidden, inputs.w_up, inputs.ranks
    d_w_up = torch.mm(scale_units(hidden, for_dot, ranks).t(), z)
    parts = zip(
        by_norm.split(ranks, 1), hidden.split(ranks, 1), w_up.split(ranks), d_w_up.split(ranks),
        strict=True,
    )  # fmt: skip
    for scaled, h, w, d in parts:
        d.addmm_(scaled.t() @ h, w)
    if inputs.residual is not None:
        d_w_up.addmm_(by_norm.t(), inputs.residual)
    if inputs.b_up is not None:
        sums = by_norm.sum(0, dtype=inputs.dtype).to(z.dtype).unsqueeze(1).split(ranks)
        for s, b, d in zip(sums, inputs.b_up, d_w_up.split(ranks), strict=True):
            d.addcmul_(s, b)
    return d_w_up


def _bias_gradient(inputs: Inputs, low: Tensor, for_norm: Tensor, by_norm: Tensor) -> Tensor:
    """`d_b_up [E, H]`: what falls on c, summed over the tokens."""
    b_up, ranks = inputs.b_up, inputs.ranks
    assert b_up is not None
    d_b_up = torch.mm(low.t(), inputs.z)
    d_b_up.addcmul_(b_up, for_norm.sum(0).to(b_up.dtype).unsqueeze(1))
    if inputs.residual is not None:
        d_b_up.addmm_(for_norm.to(b_up.dtype).t(), inputs.residual)
    sums = by_norm.sum(0, dtype=inputs.dtype).to(b_up.dtype).split(ranks)
    for e, (s, w) in enumerate(zip(sums, inputs.w_up.split(ranks), strict=True)):
        d_b_up[e] += s @ w
    return d_b_up
