# SPDX-License-Identifier: Apache-2.0
"""The Task Sparsity Loss token by token: what is left of it between the matmuls.

`rows` is one function in three forms: plain torch, which also takes float64; the C++ kernel of
`csrc/cpu/loss_pass.h` (`impl="cpu"`); the Triton kernel of `kernels/sparsity_loss.py`. The last two
read every row once and write every result once. Letters and algebra as in `sparsity_terms.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pemt_fast.ops import extension
from pemt_fast.ops.gated_units import scale_units

# torch.nn.functional.cosine_similarity clamps each norm at this value.
COSINE_EPS = 1e-8


class Operands(NamedTuple):
    """What a token's part of the loss is made of; None is zero, of `mask`: all tokens count."""

    z: Tensor  # [T, H]
    hidden: Tensor  # [T, N]
    products: Tensor  # [T, N], z·w_upᵀ
    folded: Tensor  # [T, N], hidden_e·(w_up[e]·w_up[e]ᵀ)
    projected: Tensor | None  # [T, N] or [1, N], c·w_upᵀ
    offset_dot: Tensor | None  # ⟨z, c⟩, [T, E] or what expands to it
    offset_squared: Tensor | None  # ‖c‖²
    mask: Tensor | None  # [T]
    share: Tensor  # [E], the mean of each adapter's gates

    @property
    def dtype(self) -> torch.dtype:
        """Of sums."""
        return torch.float64 if self.z.dtype == torch.float64 else torch.float32


class Wanted(NamedTuple):
    """Which results besides `disagreement`."""

    factors: bool = False
    scaled: bool = False
    by_norm: bool = False
    d_hidden: bool = False
    d_z: bool = False


class Rows(NamedTuple):
    """Results: sums and factors in float32 (float64 for float64), the others in the dtype of z.

    `cos = ⟨z, m⟩ / (‖z‖·‖m‖)`, and `d_cos = −share·scale / tokens that count` its gradient. Tokens
    that do not count get zeros.
    """

    disagreement: Tensor  # [E], 1 − mean cos, 0 where no token counts
    for_dot: Tensor | None = None  # [T, E], d_cos / (‖z‖·‖m‖)
    for_norm: Tensor | None = None  # [T, E], −d_cos·cos / ‖m‖²; 0 where ‖m‖ was clamped
    scaled: Tensor | None = None  # [T, N], hidden ⊙ for_dot
    by_norm: Tensor | None = None  # [T, N], hidden ⊙ for_norm
    d_hidden: Tensor | None = None  # [T, N], products ⊙ for_dot + (folded + projected) ⊙ for_norm
    d_z: Tensor | None = None  # [T, H], −z·Σ_e d_cos·cos / ‖z‖²; 0 where ‖z‖ was clamped


def rows(
    operands: Operands, ranks: tuple[int, ...], scale: float, wanted: Wanted, impl: str
) -> Rows:
    """The results that are `wanted`, by an implementation that can run."""
    if impl == "cpu":
        return _only(wanted, torch.ops.pemt_fast.task_sparsity_loss_rows.default(
            *operands, ranks, scale, wanted
        ))  # fmt: skip
    if impl == "triton":
        from pemt_fast.kernels.sparsity_loss import sparsity_loss_rows

        with torch.cuda.device_of(operands.z):
            disagreement, others = sparsity_loss_rows(*operands, ranks, scale, *wanted)
        return Rows(disagreement, *others)
    return _rows_of_torch(operands, ranks, scale, wanted)


def _only(wanted: Wanted, results: tuple[Tensor, ...]) -> Rows:
    """An operator returns empty tensors for what is left out."""
    disagreement, *others = results
    flags = (wanted.factors, *wanted)
    kept = (result if flag else None for result, flag in zip(others, flags, strict=True))
    return Rows(disagreement, *kept)


def _rows_of_torch(
    operands: Operands, ranks: tuple[int, ...], scale: float, wanted: Wanted
) -> Rows:
    z, hidden, products, folded, projected, offset_dot, offset_squared, _, share = operands
    dtype = operands.dtype
    dot = _sum_units(products * hidden, ranks, dtype)
    if projected is None:
        squared = _sum_units(folded * hidden, ranks, dtype)
    else:
        # ‖m‖² = hidden·(folded + 2·projected) + ‖c‖²; its gradient has folded + projected.
        squared = _sum_units((folded + 2 * projected) * hidden, ranks, dtype)
        folded = folded + projected
    if offset_dot is not None and offset_squared is not None:
        dot, squared = dot + offset_dot, squared + offset_squared
    z_norm = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=dtype).clamp_min(COSINE_EPS)
    m_norm = squared.clamp_min(COSINE_EPS**2).sqrt()
    cosine = dot / (z_norm * m_norm)
    weight, counts = _weight(operands)
    disagreement = counts - (cosine * weight).sum(0)
    if not any(wanted):
        return Rows(disagreement)
    d_cosine = -share * weight * scale  # [T, E]
    for_dot = d_cosine / (z_norm * m_norm)
    moving = m_norm > COSINE_EPS  # a clamped norm does not change
    for_norm = -d_cosine * cosine / m_norm.square() * moving
    d_hidden = d_z = None
    if wanted.d_hidden:
        d_hidden = scale_units(products, for_dot, ranks)
        d_hidden.add_(scale_units(folded, for_norm, ranks))
    if wanted.d_z:
        along = (d_cosine * cosine).sum(1, keepdim=True) / z_norm.square()
        d_z = z * (-along * (z_norm > COSINE_EPS)).to(z.dtype)
    return Rows(
        disagreement,
        for_dot if wanted.factors else None,
        for_norm if wanted.factors else None,
        scale_units(hidden, for_dot, ranks) if wanted.scaled else None,
        scale_units(hidden, for_norm, ranks) if wanted.by_norm else None,
        d_hidden,
        d_z,
    )


def _sum_units(units: Tensor, ranks: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`[T, N]` summed over the units of each adapter: `[T, E]`."""
    if len(set(ranks)) == 1:
        return units.view(-1, len(ranks), ranks[0]).sum(-1, dtype=dtype)
    return torch.stack([part.sum(-1, dtype=dtype) for part in units.split(ranks, 1)], 1)


def _weight(operands: Operands) -> tuple[Tensor, Tensor]:
    """What each token counts for `[T, 1]`, and 1, or 0 if no token counts."""
    T, device, dtype = operands.z.shape[0], operands.z.device, operands.dtype
    if operands.mask is None:
        one = torch.full((), float(T > 0), dtype=dtype, device=device)
        return torch.full((T, 1), 1 / max(T, 1), dtype=dtype, device=device), one
    mask = operands.mask.view(-1, 1).to(dtype)
    count = mask.sum()
    return mask / count.clamp_min(1), (count > 0).to(dtype)


def _fake(
    z: Tensor,
    hidden: Tensor,
    products: Tensor,
    folded: Tensor,
    projected: Tensor | None,
    offset_dot: Tensor | None,
    offset_squared: Tensor | None,
    mask: Tensor | None,
    share: Tensor,
    ranks: tuple[int, ...],
    scale: float,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    (T, H), N, E = z.shape, hidden.shape[1], len(ranks)
    shapes = ((T, E), (T, E), (T, N), (T, N), (T, N), (T, H))
    dtypes = (torch.float32,) * 2 + (z.dtype,) * 4
    flags = (wanted[0], *wanted)
    return share.new_empty(E, dtype=torch.float32), *(
        z.new_empty(shape if flag else (0,), dtype=dtype)
        for shape, dtype, flag in zip(shapes, dtypes, flags, strict=True)
    )


if extension.load() is not None:
    torch.library.register_fake("pemt_fast::task_sparsity_loss_rows", _fake)
