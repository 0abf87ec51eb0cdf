# SPDX-License-Identifier: Apache-2.0
"""The Task Sparsity Loss between its matmuls: one pass over the rows of all tokens.

Operands and results are those of `pemt_fast/ops/sparsity_rows.py`, where the formulas are; the twin
of `csrc/cpu/loss_pass.h`. A program owns BM tokens and goes from adapter to adapter: it sums the
rows of its units, and scales them while they are still in the first cache.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pemt_fast.kernels.configs import choose_loss_rows

# Of the squares of norms: torch's cosine_similarity clamps each norm at 1e-8.
_LEAST_SQUARE = tl.constexpr(1e-16)


@triton.jit
def _load_units(rows, at, units, mask):
    return tl.load(rows + at[:, None] + units[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _clamped(square):
    """NaN passes."""
    return tl.where(square < _LEAST_SQUARE, _LEAST_SQUARE, square)


@triton.jit
def _squared_norm(rows, at, counts, WIDTH, BM: tl.constexpr, BH: tl.constexpr):
    acc = tl.zeros((BM, BH), tl.float32)
    for start in tl.range(0, WIDTH, BH):
        column = start + tl.arange(0, BH)
        v = _load_units(rows, at, column, counts[:, None] & (column < WIDTH)[None, :])
        acc += v * v
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["T"])
def sparsity_loss_kernel(
    z, z_row, hidden, hidden_row, products, folded, projected, projected_row,
    offset_dot, offset_squared, mask, share, scale, cosines,
    for_dot, for_norm, scaled, by_norm, d_hidden, d_z, T, H,
    N: tl.constexpr, E: tl.constexpr, RANK: tl.constexpr, ENDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Grid ⌈T / BM⌉. Adapters of one `RANK`, or, if that is 0, ending at the units `ENDS`.

    `cosines [⌈T / BM⌉, E]` receives the sums over the tokens of a program; `scale` is one number.
    Of tokens that do not count nothing is read: all their sums are 0.
    """
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = token < T
    counts = inside
    if mask is not None:
        counts = tl.load(mask + token, mask=inside, other=0) != 0
    token = token.to(tl.int64)
    z_at, hidden_at, at = token * z_row, token * hidden_row, token * N
    projected_at = token * projected_row
    z_squared = _squared_norm(z, z_at, counts, H, BM, BH)
    z_norm = tl.sqrt(_clamped(z_squared))
    along = tl.zeros((BM,), tl.float32)
    end = 0
    for e in range(E):
        begin = end
        end += RANK
        if RANK == 0:
            for i in tl.static_range(E):
                end = tl.where(e == i, ENDS[i], end)
        dots = tl.zeros((BM, BN), tl.float32)
        squares = tl.zeros((BM, BN), tl.float32)
        for start in range(begin, end, BN):
            unit = start + tl.arange(0, BN)
            there = counts[:, None] & (unit < end)[None, :]
            h = _load_units(hidden, hidden_at, unit, there)
            f = _load_units(folded, at, unit, there)
            if projected is not None:
                f += 2 * _load_units(projected, projected_at, unit, there)
            dots += _load_units(products, at, unit, there) * h
            squares += f * h
        dot, square = tl.sum(dots, 1), tl.sum(squares, 1)
        if offset_dot is not None:
            dot += tl.load(offset_dot + token * E + e, mask=counts, other=0.0)
            square += tl.load(offset_squared + token * E + e, mask=counts, other=0.0)
        least = _clamped(square)
        norms = z_norm * tl.sqrt(least)
        cosine = dot / norms
        tl.store(cosines + tl.program_id(0) * E + e, tl.sum(cosine, 0))
        if scale is not None:
            d_cosine = tl.where(counts, -tl.load(share + e) * tl.load(scale), 0.0)
            along += d_cosine * cosine
            to_dot = d_cosine / norms
            # A clamped norm does not change.
            to_norm = tl.where(square <= _LEAST_SQUARE, 0.0, -d_cosine * cosine / least)
            if for_dot is not None:
                tl.store(for_dot + token * E + e, to_dot, mask=inside)
                tl.store(for_norm + token * E + e, to_norm, mask=inside)
            for start in range(begin, end, BN):
                unit = start + tl.arange(0, BN)
                writes = inside[:, None] & (unit < end)[None, :]
                there = counts[:, None] & writes
                place = at[:, None] + unit[None, :]
                h = _load_units(hidden, hidden_at, unit, there)
                if scaled is not None:
                    tl.store(scaled + place, h * to_dot[:, None], mask=writes)
                if by_norm is not None:
                    tl.store(by_norm + place, h * to_norm[:, None], mask=writes)
                if d_hidden is not None:
                    f = _load_units(folded, at, unit, there)
                    if projected is not None:
                        f += _load_units(projected, projected_at, unit, there)
                    d = _load_units(products, at, unit, there) * to_dot[:, None]
                    tl.store(d_hidden + place, d + f * to_norm[:, None], mask=writes)
    if d_z is not None:
        back = tl.where(z_squared <= _LEAST_SQUARE, 0.0, -along / _clamped(z_squared))
        for start in tl.range(0, H, BH):
            column = start + tl.arange(0, BH)
            there = (column < H)[None, :]
            v = _load_units(z, z_at, column, counts[:, None] & there)
            place = token[:, None] * H + column[None, :]
            tl.store(d_z + place, v * back[:, None], mask=inside[:, None] & there)


def sparsity_loss_rows(
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
    wants_factors: bool,
    wants_scaled: bool,
    wants_by_norm: bool,
    wants_d_hidden: bool,
    wants_d_z: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`disagreement`, and the other results in their order, None for what is not wanted."""
    (T, H), (_, N), E = z.shape, hidden.shape, len(ranks)
    tile = choose_loss_rows(max(ranks))
    programs = triton.cdiv(T, tile.tokens)
    wants = wants_factors or wants_scaled or wants_by_norm or wants_d_hidden or wants_d_z

    def rows_if(wanted: bool, width: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(T, width, dtype=dtype, device=z.device) if wanted else None

    def sums(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.expand(T, E).contiguous()

    results = (
        rows_if(wants_factors, E, torch.float32), rows_if(wants_factors, E, torch.float32),
        rows_if(wants_scaled, N, z.dtype), rows_if(wants_by_norm, N, z.dtype),
        rows_if(wants_d_hidden, N, z.dtype), rows_if(wants_d_z, H, z.dtype),
    )  # fmt: skip
    # On the device throughout: how many tokens count is never waited for.
    count = share.new_full((), T) if mask is None else mask.sum(dtype=torch.float32)
    per_token = scale / count.clamp_min(1)
    cosines = share.new_empty(programs, E)
    z, hidden = _rows(z), _rows(hidden)
    if T > 0:
        sparsity_loss_kernel[programs,](
            z, z.stride(0), hidden, hidden.stride(0), products.contiguous(), folded.contiguous(),
            projected, 0 if projected is None or projected.shape[0] == 1 else projected.stride(0),
            sums(offset_dot), sums(offset_squared),
            None if mask is None else mask.bool().contiguous().view(torch.uint8),
            share, per_token if wants else None, cosines, *results, T, H,
            N=N, E=E, RANK=ranks[0] if len(set(ranks)) == 1 else 0,
            ENDS=tuple(itertools.accumulate(ranks)), BM=tile.tokens, BN=tile.units,
            BH=tile.columns, num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return (count > 0).float() - cosines.sum(0) / count.clamp_min(1), results


def _rows(tensor: Tensor) -> Tensor:
    """Dense along the last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
