# SPDX-License-Identifier: Apache-2.0
"""Both products of the mixture in one kernel, the hidden units between them kept on the chip.

Forward and backward are one walk with the roles of the weights swapped:

    forward     z = x·w_downᵀ      units act(z) ⊙ gate      out = base + units·w_up + gate·b_up
    backward    d_out·w_upᵀ        units d_z, and d_gate    d_x = units·w_down

so `x`, `first` and `second` are x, w_down, w_up or d_out, w_up, w_down. Letters: T tokens, N hidden
units, E adapters; a program owns BM tokens, takes BN units at a time, BK terms of the first sum and
BH columns of the output. For large N: `pair.py`.
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


@triton.jit(do_not_specialize=["T", "tokens_per_gate"])
def fused_kernel(
    x, x_row, first, first_row, second, second_row, out, base, base_row, gate,
    b_down, b_up, saved, hidden, d_z, gated, gate_sums, gate_sums_row,
    T, tokens_per_gate, WIDTH_IN, WIDTH_OUT, SPAN,
    N: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr, GROUP: tl.constexpr,
    PER_ADAPTER: tl.constexpr, ENDS: tl.constexpr, ACTIVATION: tl.constexpr, KEEPS_Z: tl.constexpr,
    BACKWARD: tl.constexpr, SKIP: tl.constexpr, SPLIT_GATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
    EVEN_IN: tl.constexpr, EVEN_OUT: tl.constexpr,
    STAGES: tl.constexpr, STAGES_OUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid (⌈T / BM⌉, ⌈WIDTH_OUT / SPAN⌉): the units of BM tokens, then SPAN columns of `out`.

    With more than one span each program computes the units again, and the first one writes what
    is kept of them. `SKIP`: a chunk of units that no token of the tile uses is not computed.
    """
    CHUNKS: tl.constexpr = (N + BN - 1) // BN
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = tokens < T
    writes = tokens < tl.where(tl.program_id(1) == 0, T, 0)
    tokens = tl.minimum(tokens, T - 1)
    gate_rows = (tokens // tokens_per_gate).to(tl.int64)
    tokens = tokens.to(tl.int64)
    careful = any_zero(gate, gate_rows, E, PADDED_E)
    chunks = ()
    for c in tl.static_range(CHUNKS):
        gates = load_gates(
            gate, gate_rows, c * (BN // GROUP), E, N // GROUP, BN // GROUP, PER_ADAPTER, ENDS
        )
        h = tl.zeros((BM, BN), x.dtype.element_ty)
        if not (SKIP and is_unused(gates)):
            if careful != 0:
                gates = poison_gates(gates, second, second_row, c * BN, WIDTH_OUT, N, BN, BH, GROUP)
            h = make_units(
                x, x_row, first, first_row, WIDTH_IN, c * BN, tokens, writes, gates, b_down,
                saved, hidden, d_z, gated, gate_sums, gate_sums_row, N, GROUP, ACTIVATION,
                KEEPS_Z, BACKWARD, BM, BN, BK, EVEN_IN, STAGES, PRECISION, WIDEN,
            )  # fmt: skip
        chunks = chunks + (h,)
    if BACKWARD and b_up is not None and gate_sums is not None:
        if tl.program_id(1) == 0:
            gate_bias_sums(
                x, x_row, WIDTH_IN, b_up, tokens, writes, gate_sums, gate_sums_row, N, E, PADDED_E,
                GROUP, BM, BK, EVEN_IN, STAGES, PRECISION, WIDEN,
            )  # fmt: skip

    begin = tl.program_id(1) * SPAN
    end = tl.minimum(begin + SPAN, WIDTH_OUT)
    if careful == 0:
        for start in tl.range(begin, end, BH, num_stages=STAGES_OUT):
            columns = start + tl.arange(0, BH)
            acc = begin_columns(
                base, base_row, gate, gate_rows, b_up, tokens, inside, columns, WIDTH_OUT, E,
                PADDED_E, BACKWARD, False, SPLIT_GATE, BM, BH, PRECISION, WIDEN,
            )  # fmt: skip
            for c in tl.static_range(CHUNKS):
                w = load_second(second, second_row, c * BN, columns, WIDTH_OUT, N, BN, EVEN_OUT)
                acc = multiply(chunks[c], w, acc, PRECISION, WIDEN)
            store_columns(out, acc, tokens, inside, columns, WIDTH_OUT)
    else:
        for start in tl.range(begin, end, BH, num_stages=1):
            columns = start + tl.arange(0, BH)
            acc = begin_columns(
                base, base_row, gate, gate_rows, b_up, tokens, inside, columns, WIDTH_OUT, E,
                PADDED_E, BACKWARD, True, SPLIT_GATE, BM, BH, PRECISION, WIDEN,
            )  # fmt: skip
            for c in tl.static_range(CHUNKS):
                w = load_second(second, second_row, c * BN, columns, WIDTH_OUT, N, BN, EVEN_OUT)
                acc = multiply(chunks[c], finite_part(w), acc, PRECISION, WIDEN)
            store_columns(out, acc, tokens, inside, columns, WIDTH_OUT)
