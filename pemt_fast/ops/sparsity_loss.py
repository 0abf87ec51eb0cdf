# SPDX-License-Identifier: Apache-2.0
"""PEMT's Task Sparsity Loss, computed in rank space.

`L = Σ_e mean_b(gate[b,e]) · (1 − mean_t cos(z[t], m[t,e]))`

with the adapter outputs `m[t,e] = hidden[t,e]·w_up[e] + c[t,e]` and `c = b_up[e] + residual[t]`
(both optional). `m [T, E, H]` is never built: `⟨z, m_e⟩ = ⟨w_up[e]·z, hidden_e⟩ + ⟨z, c⟩`, and
`‖m_e‖²` needs only the R×R Gram matrix of `w_up[e]`.
Source: `imbalance_loss` of the published code (github JachinLin2022/PEMT, modeling_t5.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# torch.nn.functional.cosine_similarity clamps each norm at this value.
COSINE_EPS = 1e-8


def task_sparsity_loss(
    z: Tensor,
    gate: Tensor,
    hidden: Tensor,
    w_up: Tensor,
    b_up: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    ranks: Sequence[int],
) -> Tensor:
    """Task Sparsity Loss of one feed-forward layer.

    Args:
        z: `[B, S, H]`, the layer's output after the target adapter, before dropout and residual.
        gate: `[B, E]`, the mixture weights.
        hidden: `[B, S, N]`, the ungated hidden units of the source adapters.
        w_up: `[N, H]`, their packed up-projections.
        b_up: `[E, H]`, their output biases.
        residual: `[B, S, H]`, added to every adapter's output (PEMT's bottleneck experts add the
            input of the feed-forward layer).
        mask: `[B, S]`, true for the tokens to average over; None for all of them, padding
            included, as in the published code.
        ranks: One rank per adapter.

    Returns:
        A scalar, float32 (float64 for float64 inputs). 0 where no token counts.
    """
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    width, e_count = z.shape[-1], len(ranks)
    z_th = z.reshape(-1, width)
    hidden_tn = hidden.reshape(-1, hidden.shape[-1])
    w_up = w_up.to(z_th.dtype)
    squared_norm, dot = _rank_space(z_th, hidden_tn.to(z_th.dtype), w_up, tuple(ranks), dtype)
    if b_up is not None or residual is not None:
        extra_norm, extra_dot = _offsets(z_th, hidden_tn, w_up, b_up, residual, ranks, dtype)
        squared_norm, dot = squared_norm + extra_norm, dot + extra_dot
    z_norm = torch.linalg.vector_norm(z_th, dim=1, keepdim=True, dtype=dtype)
    m_norm = squared_norm.clamp_min(COSINE_EPS**2).sqrt()
    cosine = dot / (z_norm.clamp_min(COSINE_EPS) * m_norm)  # [T, E]
    # With no token to average over there is no disagreement to penalise.
    agreement = torch.ones(e_count, dtype=dtype, device=z.device)
    if mask is not None:
        weight = mask.reshape(-1, 1).to(dtype)
        count = weight.sum()
        mean_cosine = (cosine * weight).sum(0) / count.clamp_min(1)
        mean_cosine = torch.where(count > 0, mean_cosine, agreement)
    else:
        mean_cosine = cosine.mean(0) if cosine.shape[0] else agreement
    share = gate.reshape(-1, e_count).to(dtype).mean(0)
    return (share * (1 - mean_cosine)).sum()


def _split_sum(units: Tensor, ranks: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sum `[T, N]` over the units of each adapter: `[T, E]`."""
    if len(set(ranks)) == 1:
        return units.view(-1, len(ranks), ranks[0]).sum(-1, dtype=dtype)
    return torch.stack([part.sum(-1, dtype=dtype) for part in units.split(ranks, 1)], 1)


def _rank_space(
    z: Tensor, hidden: Tensor, w_up: Tensor, ranks: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`‖hidden_e·w_up[e]‖²` and `⟨z, hidden_e·w_up[e]⟩`, both `[T, E]`."""
    dot = _split_sum(torch.mm(z, w_up.t()) * hidden, ranks, dtype)
    if len(set(ranks)) == 1:
        stacked = w_up.view(len(ranks), ranks[0], -1)
        gram = torch.bmm(stacked, stacked.transpose(1, 2))  # [E, R, R]
        by_adapter = hidden.view(-1, len(ranks), ranks[0]).transpose(0, 1)  # [E, T, R]
        folded = torch.bmm(by_adapter, gram)
        return (folded * by_adapter).sum(-1, dtype=dtype).t(), dot
    norms = [
        (h @ (w @ w.t()) * h).sum(-1, dtype=dtype)
        for h, w in zip(hidden.split(ranks, 1), w_up.split(ranks, 0), strict=True)
    ]
    return torch.stack(norms, 1), dot


def _offsets(
    z: Tensor,
    hidden: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    ranks: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What `c = b_up + residual` adds to the squared norm and to the dot product, `[T, E]`."""
    norm = dot = torch.zeros((), dtype=dtype, device=z.device)
    ranks = tuple(ranks)
    projected: Tensor | None = None
    if residual is not None:
        r_th = residual.reshape(-1, residual.shape[-1]).to(z.dtype)
        dot = dot + (z * r_th).sum(-1, keepdim=True, dtype=dtype)
        norm = norm + torch.linalg.vector_norm(r_th, dim=1, keepdim=True, dtype=dtype).square()
        projected = torch.mm(r_th, w_up.t())  # [T, N]
    if b_up is not None:
        b_eh = b_up.to(z.dtype)
        dot = dot + torch.mm(z, b_eh.t()).to(dtype)
        norm = norm + torch.linalg.vector_norm(b_eh, dim=1, dtype=dtype).square()
        if residual is not None:
            norm = norm + 2 * torch.mm(r_th, b_eh.t()).to(dtype)
        parts = zip(w_up.split(ranks), b_eh, strict=True)
        along = torch.cat([(w * b).sum(-1) for w, b in parts])  # [N]
        projected = along if projected is None else projected + along
    assert projected is not None
    return norm + 2 * _split_sum(hidden * projected, ranks, dtype), dot
