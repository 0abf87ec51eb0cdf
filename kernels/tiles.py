# SPDX-License-Identifier: Apache-2.0
"""What the kernels do with one tile: the two products, the gates, and what a zero gate protects.

A *group* is `GROUP` neighbouring hidden units of one adapter, a power of two. Gates are tiles
[BM, groups], one per token and group; hidden units are tiles [BM, groups · GROUP].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """`acc + a·b`, accumulated in float32. `WIDEN`: in float32 as a whole (the interpreter)."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def first_product(
    x, x_row, weight, weight_row, WIDTH, tokens, units,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`x[tokens]·weight[units]ᵀ` [BM, BN] in float32; `EVEN`: BK divides the width."""
    k = tl.arange(0, BK)
    x_tile = x + tokens[:, None] * x_row + k[None, :]
    w_tile = weight + units[:, None].to(tl.int64) * weight_row + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, WIDTH, BK, num_stages=STAGES):
        if EVEN:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            inside = (start + k < WIDTH)[None, :]
            a = tl.load(x_tile, mask=inside, other=0.0)
            b = tl.load(w_tile, mask=inside, other=0.0)
        acc = multiply(a, tl.trans(b), acc, PRECISION, WIDEN)
        x_tile += BK
        w_tile += BK
    return acc


@triton.jit
def load_gates(gate, gate_rows, first_group, E: tl.constexpr, GROUPS: tl.constexpr,
               COUNT: tl.constexpr, PER_ADAPTER: tl.constexpr, ENDS: tl.constexpr):  # fmt: skip
    """Gates [BM, COUNT] in float32 of the groups from `first_group` on, 0 beyond the last one.

    Adapters of equal rank have `PER_ADAPTER` groups each; else they end at the groups `ENDS`.
    """
    group = first_group + tl.arange(0, COUNT)
    if PER_ADAPTER > 0:
        adapter = group // PER_ADAPTER
    else:
        adapter = tl.zeros((COUNT,), tl.int32)
        for e in tl.static_range(E):
            adapter += (group >= ENDS[e]).to(tl.int32)
    place = gate_rows[:, None] * E + adapter[None, :]
    return tl.load(gate + place, mask=(group < GROUPS)[None, :], other=0.0).to(tl.float32)


@triton.jit
def is_unused(gates):
    """Whether no token of the tile uses any of the groups."""
    return tl.max(tl.max((gates != 0).to(tl.int32), 1), 0) == 0


@triton.jit
def any_zero(gate, gate_rows, E: tl.constexpr, PADDED: tl.constexpr):
    """Whether a token of the tile does not use some adapter: 1 or 0."""
    e = tl.arange(0, PADDED)
    g = tl.load(gate + gate_rows[:, None] * E + e[None, :], mask=(e < E)[None, :], other=1.0)
    return tl.max(tl.max((g == 0).to(tl.int32), 1), 0)


@triton.jit
def scale_units(h, gates, GROUP: tl.constexpr):
    """Each hidden unit times the gate of its group; exactly 0 where that is 0, whatever `h` is."""
    BM: tl.constexpr = h.shape[0]
    BN: tl.constexpr = h.shape[1]
    g = gates[:, :, None]
    scaled = tl.where(g == 0, 0.0, tl.reshape(h, (BM, BN // GROUP, GROUP)) * g)
    return tl.reshape(scaled, (BM, BN))


@triton.jit
def sum_groups(values, GROUP: tl.constexpr):
    """[BM, BN] summed over the units of each group."""
    BM: tl.constexpr = values.shape[0]
    BN: tl.constexpr = values.shape[1]
    return tl.sum(tl.reshape(values, (BM, BN // GROUP, GROUP)), 2)


@triton.jit
def poison_gates(gates, second, second_row, first_unit, WIDTH, N: tl.constexpr, BN: tl.constexpr,
                 BW: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Gates with NaN for groups that have a weight in `second` which is not finite.

    Gates of 0 stay: together with `finite_part` of the weights `0·NaN` does not arise.
    """
    unit = first_unit + tl.arange(0, BN)
    bad = tl.zeros((BN,), tl.int32)
    for start in tl.range(0, WIDTH, BW, num_stages=1):
        column = start + tl.arange(0, BW)
        place = second + unit[:, None].to(tl.int64) * second_row + column[None, :]
        mask = (unit < N)[:, None] & (column < WIDTH)[None, :]
        w = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        bad = tl.maximum(bad, tl.max((tl.abs(w) < float("inf")).to(tl.int32) ^ 1, 1))
    bad_group = tl.max(tl.reshape(bad, (BN // GROUP, GROUP)), 1)
    return tl.where((gates != 0) & (bad_group != 0)[None, :], float("nan"), gates)


@triton.jit
def finite_part(w):
    """`w` with 0 for what is not finite."""
    return tl.where(tl.abs(w.to(tl.float32)) < float("inf"), w, 0.0).to(w.dtype)


@triton.jit
def add_up_bias(acc, gate, gate_rows, b_up, columns, WIDTH, E: tl.constexpr,
                PADDED_E: tl.constexpr, CAREFUL: tl.constexpr, SPLIT: tl.constexpr,
                PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """`acc + gate·b_up`. `SPLIT`: in a 16-bit type, the gate as the sum of two such numbers.

    `CAREFUL`: a gate of 0 stops what is not finite.
    """
    e = tl.arange(0, PADDED_E)
    g = tl.load(gate + gate_rows[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0.0)
    g = g.to(tl.float32)
    mask = (e < E)[:, None] & (columns < WIDTH)[None, :]
    b = tl.load(b_up + e[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
    if CAREFUL:
        bad = tl.max((tl.abs(b.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1)
        g = tl.where((g != 0) & (bad != 0)[None, :], float("nan"), g)
        b = finite_part(b)
    if SPLIT:
        high = g.to(b.dtype)
        low = (g - high.to(tl.float32)).to(b.dtype)
        acc = multiply(low, b, acc, PRECISION, WIDEN)
        acc = multiply(high, b, acc, PRECISION, WIDEN)
    else:
        acc = multiply(g, b, acc, PRECISION, WIDEN)
    return acc


@triton.jit
def load_second(second, second_row, first_unit, columns, WIDTH, N: tl.constexpr, BN: tl.constexpr,
                 EVEN_OUT: tl.constexpr):  # fmt: skip
    """BN rows of the second weight from `first_unit` on, at `columns`; zeros outside of it."""
    units = first_unit + tl.arange(0, BN)
    place = second + units[:, None].to(tl.int64) * second_row + columns[None, :]
    if EVEN_OUT and N % BN == 0:
        w = tl.load(place)
    else:
        w = tl.load(place, mask=(units < N)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return w


@triton.jit
def begin_columns(base, base_row, gate, gate_rows, b_up, tokens, inside, columns, WIDTH,
                   E: tl.constexpr, PADDED_E: tl.constexpr, BACKWARD: tl.constexpr,
                   CAREFUL: tl.constexpr, SPLIT_GATE: tl.constexpr, BM: tl.constexpr,
                   BH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """What the sum of the second product begins with: base and, forward, `gate·b_up`."""
    acc = tl.zeros((BM, BH), tl.float32)
    if base is not None:
        mask = inside[:, None] & (columns < WIDTH)[None, :]
        place = base + tokens[:, None] * base_row + columns[None, :]
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if b_up is not None and not BACKWARD:
        acc = add_up_bias(acc, gate, gate_rows, b_up, columns, WIDTH, E, PADDED_E, CAREFUL,
                          SPLIT_GATE, PRECISION, WIDEN)  # fmt: skip
    return acc


@triton.jit
def store_columns(out, acc, tokens, inside, columns, WIDTH):
    """Rounds once."""
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    tl.store(out + tokens[:, None] * WIDTH + columns[None, :], acc, mask=mask)
