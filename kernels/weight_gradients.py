# SPDX-License-Identifier: Apache-2.0
"""The gradients of the weights: by our kernel, or by the library's matmul where that is better."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pemt_fast.kernels.configs import (
    REDUCE_COLUMNS,
    Tile,
    choose_weight_gradient,
    device_facts,
    splits_of,
)
from pemt_fast.kernels.sums import add_partials_kernel, weight_gradient_kernel
from pemt_fast.kernels.walk import is_interpreted, precision_of


def weight_gradients(
    d_z: Tensor | None, x: Tensor | None, gated: Tensor | None, d_out: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`d_w_down = d_zᵀ·x` and `d_w_up = gatedᵀ·d_out`, None where there is no left side."""
    units = gated if d_z is None else d_z
    if units is None:
        return None, None
    kind, _ = device_facts(units.device)
    T, N = units.shape
    tile = choose_weight_gradient(kind, units.element_size(), N, T)
    if tile is not None:
        return split_weight_gradients(d_z, x, gated, d_out, tile)
    return (
        None if d_z is None or x is None else torch.mm(d_z.t(), x),
        None if gated is None else torch.mm(gated.t(), d_out),
    )


def split_weight_gradients(
    d_z: Tensor | None, x: Tensor | None, gated: Tensor | None, d_out: Tensor, tile: Tile
) -> tuple[Tensor | None, Tensor | None]:
    """Both products in one launch over parts of the tokens, and a second one that adds these up."""
    units = gated if d_z is None else d_z
    assert units is not None
    (T, N), H = units.shape, d_out.shape[1]
    _, processors = device_facts(units.device)
    D = 0 if d_z is None or x is None else x.shape[1]
    row = D + (H if gated is not None else 0)
    tiles = triton.cdiv(N, tile.rows) * (
        triton.cdiv(D, tile.columns) + (0 if gated is None else triton.cdiv(H, tile.columns))
    )
    splits, span = splits_of(tile, tiles, T, processors)
    partial = torch.empty(splits, N, row, device=units.device)
    flags = {"N": N, "DOWN": d_z is not None, "UP": gated is not None, "enable_fp_fusion": True}
    weight_gradient_kernel[tiles, splits](
        d_z, x, 0 if x is None else x.stride(0), gated, d_out, d_out.stride(0), partial, T, span,
        D, H, **flags, BN=tile.rows, BW=tile.columns, BT=tile.terms, STAGES=tile.stages,
        PRECISION=precision_of(units.dtype),
        WIDEN=is_interpreted() and units.dtype != torch.float32, num_warps=tile.warps,
    )  # fmt: skip
    d_w_down = None if d_z is None else units.new_empty(N, D)
    d_w_up = None if gated is None else units.new_empty(N, H)
    add_partials_kernel[N, triton.cdiv(row, REDUCE_COLUMNS)](
        partial, d_w_down, d_w_up, D, H, splits, **flags, BW=REDUCE_COLUMNS
    )
    return d_w_down, d_w_up
