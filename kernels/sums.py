# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens: the gradients of the weights, and the end of the gradient of the gate.

Nothing is added atomically: partial sums go to memory and are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pemt_fast.kernels.tiles import multiply


@triton.jit
def _sum_tile(units, rows, rows_row, begin, end, unit, column, WIDTH, N: tl.constexpr,
              BN: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
              PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """`units[begin:end, unit]ᵀ·rows[begin:end, column]` [BN, BW] in float32."""
    acc = tl.zeros((BN, BW), tl.float32)
    for start in tl.range(begin, end, BT, num_stages=STAGES):
        token = start + tl.arange(0, BT)
        at = token.to(tl.int64)[:, None]
        inside = (token < end)[:, None]
        a = tl.load(units + at * N + unit[None, :], mask=inside & (unit < N)[None, :], other=0.0)
        b = tl.load(
            rows + at * rows_row + column[None, :],
            mask=inside & (column < WIDTH)[None, :],
            other=0.0,
        )
        acc = multiply(tl.trans(a), b, acc, PRECISION, WIDEN)
    return acc


@triton.jit(do_not_specialize=["T", "span"])
def weight_gradient_kernel(
    d_z, x, x_row, gated, d_out, d_out_row, partial, T, span, WIDTH_IN, WIDTH_OUT,
    N: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    BT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`d_w_down = d_zᵀ·x` (`DOWN`) and `d_w_up = gatedᵀ·d_out` (`UP`), over `span` tokens each.

    Grid (tiles of both results, ⌈T / span⌉); `partial [splits, N, WIDTH_IN + WIDTH_OUT]` in
    float32, its rows without the width that is not asked for.
    """
    down_tiles = tl.cdiv(WIDTH_IN, BW) if DOWN else 0
    up_tiles = tl.cdiv(WIDTH_OUT, BW) if UP else 0
    per_row = down_tiles + up_tiles
    tile = tl.program_id(0) % per_row
    unit = tl.program_id(0) // per_row * BN + tl.arange(0, BN)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, T)
    row = (WIDTH_IN if DOWN else 0) + (WIDTH_OUT if UP else 0)
    place = (tl.program_id(1).to(tl.int64) * N + unit[:, None]) * row
    if tile < down_tiles:
        column = tile * BW + tl.arange(0, BW)
        acc = _sum_tile(d_z, x, x_row, begin, end, unit, column, WIDTH_IN, N, BN, BW, BT, STAGES,
                        PRECISION, WIDEN)  # fmt: skip
        mask = (unit < N)[:, None] & (column < WIDTH_IN)[None, :]
        tl.store(partial + place + column[None, :], acc, mask=mask)
    else:
        column = (tile - down_tiles) * BW + tl.arange(0, BW)
        acc = _sum_tile(gated, d_out, d_out_row, begin, end, unit, column, WIDTH_OUT, N, BN, BW, BT,
                        STAGES, PRECISION, WIDEN)  # fmt: skip
        mask = (unit < N)[:, None] & (column < WIDTH_OUT)[None, :]
        begin_up = WIDTH_IN if DOWN else 0
        tl.store(partial + place + begin_up + column[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["SPLITS"])
def add_partials_kernel(
    partial, d_w_down, d_w_up, WIDTH_IN, WIDTH_OUT, SPLITS, N: tl.constexpr, DOWN: tl.constexpr,
    UP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Adds the splits in order and rounds once. Grid (N, ⌈row of `partial` / BW⌉)."""
    down = WIDTH_IN if DOWN else 0
    row = down + (WIDTH_OUT if UP else 0)
    unit = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    acc = tl.zeros((BW,), tl.float32)
    for split in range(SPLITS):
        place = (split * N + unit) * row + column
        acc += tl.load(partial + place, mask=column < row, other=0.0)
    if DOWN:
        tl.store(d_w_down + unit * WIDTH_IN + column, acc, mask=column < down)
    if UP:
        mask = (column >= down) & (column < row)
        tl.store(d_w_up + unit * WIDTH_OUT + column - down, acc, mask=mask)


@triton.jit(do_not_specialize=["ROWS"])
def gate_gradient_kernel(
    gate_sums, gate_sums_row, gate, d_gate, ROWS,
    E: tl.constexpr, PADDED_E: tl.constexpr, GROUPS: tl.constexpr, PER_ADAPTER: tl.constexpr,
    ENDS: tl.constexpr, MOST: tl.constexpr, BIAS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`d_gate [ROWS, E]` from the sums of the groups of each adapter and the part of `b_up`.

    A gate of 0 stops what is not finite. Adapters of unequal rank end at the groups `ENDS` and
    have `MOST` of them or fewer. Grid ⌈ROWS / BR⌉.
    """
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    e = tl.arange(0, PADDED_E)[None, :]
    valid = (row < ROWS) & (e < E)
    if PER_ADAPTER > 0:
        begin = e * PER_ADAPTER
        end = begin + PER_ADAPTER
    else:
        begin = tl.zeros((1, PADDED_E), tl.int32)
        end = tl.zeros((1, PADDED_E), tl.int32)
        for i in tl.static_range(E):
            end = tl.where(e == i, ENDS[i], end)
            begin = tl.where(e == i + 1, ENDS[i], begin)
    acc = tl.zeros((BR, PADDED_E), tl.float32)
    for j in range(MOST):
        there = valid & (begin + j < end)
        acc += tl.load(gate_sums + row * gate_sums_row + begin + j, mask=there, other=0.0)
    if BIAS:
        acc += tl.load(gate_sums + row * gate_sums_row + GROUPS + e, mask=valid, other=0.0)
    g = tl.load(gate + row * E + e, mask=valid, other=1.0)
    unusable = (g == 0) & ((tl.abs(acc) < float("inf")) == 0)
    tl.store(d_gate + row * E + e, tl.where(unusable, 0.0, acc), mask=valid)
