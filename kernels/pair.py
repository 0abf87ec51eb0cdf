# SPDX-License-Identifier: Apache-2.0
"""The two products of the mixture in a kernel each, with the hidden units in memory between them.

The same walk as `fused.py`, in both directions, for numbers of hidden units that a program cannot
keep. What happens to the units is in `units.py`, the epilogue of the first kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pemt_fast.kernels.tiles import (
    any_zero,
    begin_columns,
    finite_part,
    is_unused,
    load_gates,
    load_second,
    multiply,
    poison_gates,
    store_columns,
)
from pemt_fast.kernels.units import gate_bias_sums, make_units


@triton.jit
def _write_zeros(out, first_unit, tokens, inside, N: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    unit = first_unit + tl.arange(0, BN)
    place = out + tokens[:, None] * N + unit[None, :]
    zeros = tl.zeros((BM, BN), out.dtype.element_ty)
    tl.store(place, zeros, mask=inside[:, None] & (unit < N)[None, :])


@triton.jit(do_not_specialize=["T", "tokens_per_gate"])
def first_kernel(
    x, x_row, first, first_row, second, second_row, gate, b_down, b_up, saved, hidden,
    d_z, gated, gate_sums, gate_sums_row, T, tokens_per_gate, WIDTH_IN, WIDTH_OUT,
    N: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr, GROUP: tl.constexpr,
    PER_ADAPTER: tl.constexpr, ENDS: tl.constexpr, ACTIVATION: tl.constexpr, KEEPS_Z: tl.constexpr,
    BACKWARD: tl.constexpr, SKIP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_IN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid ⌈T / BM⌉ · ⌈N / BN⌉: a tile of units each, written to `gated` or `d_z`.

    Neighbouring programs share tokens. With `b_up` backward has one more tile for each BM tokens.
    """
    TILES: tl.constexpr = (N + BN - 1) // BN
    BIAS: tl.constexpr = BACKWARD and b_up is not None and gate_sums is not None
    PER_ROW: tl.constexpr = TILES + 1 if BIAS else TILES
    tile = tl.program_id(0) % PER_ROW
    tokens = tl.program_id(0) // PER_ROW * BM + tl.arange(0, BM)
    inside = tokens < T
    tokens = tl.minimum(tokens, T - 1)
    gate_rows = (tokens // tokens_per_gate).to(tl.int64)
    tokens = tokens.to(tl.int64)
    if tile < TILES:
        gates = load_gates(gate, gate_rows, tile * (BN // GROUP), E, N // GROUP, BN // GROUP,
                           PER_ADAPTER, ENDS)  # fmt: skip
        if SKIP and is_unused(gates):
            _write_zeros(d_z if BACKWARD else gated, tile * BN, tokens, inside, N, BM, BN)
        else:
            if any_zero(gate, gate_rows, E, PADDED_E) != 0:
                gates = poison_gates(
                    gates, second, second_row, tile * BN, WIDTH_OUT, N, BN, BK, GROUP
                )
            make_units(
                x, x_row, first, first_row, WIDTH_IN, tile * BN, tokens, inside, gates, b_down,
                saved, hidden, d_z, gated, gate_sums, gate_sums_row, N, GROUP, ACTIVATION, KEEPS_Z,
                BACKWARD, BM, BN, BK, EVEN_IN, STAGES, PRECISION, WIDEN,
            )  # fmt: skip
    elif BIAS:
        gate_bias_sums(
            x, x_row, WIDTH_IN, b_up, tokens, inside, gate_sums, gate_sums_row, N, E, PADDED_E,
            GROUP, BM, BK, EVEN_IN, STAGES, PRECISION, WIDEN,
        )  # fmt: skip


@triton.jit
def _load_units(units, tokens, first_unit, N: tl.constexpr, BK: tl.constexpr):
    """`units[tokens]` [BM, BK] from `first_unit` on, zeros beyond the last one."""
    unit = first_unit + tl.arange(0, BK)
    place = units + tokens[:, None] * N + unit[None, :]
    if N % BK == 0:
        h = tl.load(place)
    else:
        h = tl.load(place, mask=(unit < N)[None, :], other=0.0)
    return h


@triton.jit(do_not_specialize=["T", "tokens_per_gate"])
def second_kernel(
    units, second, second_row, out, base, base_row, gate, b_up,
    T, tokens_per_gate, WIDTH_OUT,
    N: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr, GROUP: tl.constexpr,
    PER_ADAPTER: tl.constexpr, ENDS: tl.constexpr, BACKWARD: tl.constexpr, SKIP: tl.constexpr,
    SPLIT_GATE: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
    EVEN_OUT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid ⌈T / BM⌉ · ⌈WIDTH_OUT / BH⌉: a tile of the output, from what `first_kernel` left."""
    PER_ROW = tl.cdiv(WIDTH_OUT, BH)
    columns = tl.program_id(0) % PER_ROW * BH + tl.arange(0, BH)
    tokens = tl.program_id(0) // PER_ROW * BM + tl.arange(0, BM)
    inside = tokens < T
    tokens = tl.minimum(tokens, T - 1)
    gate_rows = (tokens // tokens_per_gate).to(tl.int64)
    tokens = tokens.to(tl.int64)
    if any_zero(gate, gate_rows, E, PADDED_E) == 0:
        acc = begin_columns(
            base, base_row, gate, gate_rows, b_up, tokens, inside, columns, WIDTH_OUT, E, PADDED_E,
            BACKWARD, False, SPLIT_GATE, BM, BH, PRECISION, WIDEN,
        )  # fmt: skip
        for k in tl.range(0, N, BK, num_stages=STAGES):
            h = _load_units(units, tokens, k, N, BK)
            w = load_second(second, second_row, k, columns, WIDTH_OUT, N, BK, EVEN_OUT)
            acc = multiply(h, w, acc, PRECISION, WIDEN)
        store_columns(out, acc, tokens, inside, columns, WIDTH_OUT)
    else:
        acc = begin_columns(
            base, base_row, gate, gate_rows, b_up, tokens, inside, columns, WIDTH_OUT, E, PADDED_E,
            BACKWARD, True, SPLIT_GATE, BM, BH, PRECISION, WIDEN,
        )  # fmt: skip
        for k in tl.range(0, N, BK, num_stages=1):
            gates = load_gates(gate, gate_rows, k // GROUP, E, N // GROUP, BK // GROUP,
                               PER_ADAPTER, ENDS)  # fmt: skip
            if not (SKIP and is_unused(gates)):
                h = _load_units(units, tokens, k, N, BK)
                w = load_second(second, second_row, k, columns, WIDTH_OUT, N, BK, EVEN_OUT)
                acc = multiply(h, finite_part(w), acc, PRECISION, WIDEN)
        store_columns(out, acc, tokens, inside, columns, WIDTH_OUT)
