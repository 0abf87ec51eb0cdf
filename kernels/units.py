# SPDX-License-Identifier: Apache-2.0
"""What happens to a tile of hidden units between the two products, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from pemt_fast.kernels.activation import activate, activate_saved
from pemt_fast.kernels.tiles import first_product, scale_units, sum_groups


@triton.jit
def forward_units(acc, units, tokens, writes, gates, b_down, saved, hidden, gated, N: tl.constexpr,
                  GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
                  KEEPS_Z: tl.constexpr):  # fmt: skip
    """`act(acc + b_down) ⊙ gate`, also to `gated` if there is one.

    `saved [T, N]` receives `z` or `act(z)` for backward, `hidden [T, N]` `act(z)` for the caller.
    """
    valid = units < N
    z = acc
    if b_down is not None:
        z += tl.load(b_down + units, mask=valid, other=0.0).to(tl.float32)[None, :]
    h = activate(z, ACTIVATION)
    place = tokens[:, None] * N + units[None, :]
    mask = writes[:, None] & valid[None, :]
    if saved is not None:
        tl.store(saved + place, z if KEEPS_Z else h, mask=mask)
    scaled = scale_units(h, gates, GROUP)
    if hidden is not None:
        # A unit that is not finite exists only for the tokens that use its adapter.
        unused = scale_units(tl.full(h.shape, 1.0, tl.float32), gates, GROUP) == 0
        finite = tl.abs(h) < float("inf")
        tl.store(hidden + place, tl.where(unused & (finite == 0), 0.0, h), mask=mask)
    if gated is not None:
        tl.store(gated + place, scaled, mask=mask)
    return scaled


@triton.jit
def backward_units(acc, units, first_group, tokens, writes, gates, saved, d_hidden, d_z, gated,
                   gate_sums, gate_sums_row, N: tl.constexpr, GROUP: tl.constexpr,
                   GROUPS: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """`d_z` from `acc = d_out·w_upᵀ`; on the way the sums for `d_gate` and the left sides of `d_w`.

    `gate_sums [T, ·]`: of each group, the sum of `acc ⊙ act(z)` over its units.
    """
    valid = units < N
    place = tokens[:, None] * N + units[None, :]
    mask = writes[:, None] & valid[None, :]
    kept = tl.load(saved + place, mask=valid[None, :], other=0.0).to(tl.float32)
    h, slope = activate_saved(kept, ACTIVATION)
    if gate_sums is not None:
        group = first_group + tl.arange(0, gates.shape[1])
        tl.store(
            gate_sums + tokens[:, None] * gate_sums_row + group[None, :],
            sum_groups(acc * h, GROUP),
            mask=writes[:, None] & (group < GROUPS)[None, :],
        )
    if gated is not None:
        tl.store(gated + place, scale_units(h, gates, GROUP), mask=mask)
    d = scale_units(acc, gates, GROUP)
    if d_hidden is not None:
        d += tl.load(d_hidden + place, mask=valid[None, :], other=0.0)
    # The slope of an overflowed unit is NaN: a gradient of zero must stop that.
    d = tl.where(d == 0, 0.0, d * slope)
    if d_z is not None:
        tl.store(d_z + place, d, mask=mask)
    return d


@triton.jit
def make_units(
    x, x_row, first, first_row, WIDTH_IN, first_unit, tokens, writes, gates, b_down, saved, hidden,
    d_z, gated, gate_sums, gate_sums_row,
    N: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, KEEPS_Z: tl.constexpr,
    BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_IN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The units from `first_unit` on of one tile of tokens, as left side of the second product."""
    units = first_unit + tl.arange(0, BN)
    acc = first_product(
        x, x_row, first, first_row, WIDTH_IN, tokens, tl.minimum(units, N - 1),
        BM, BN, BK, EVEN_IN, STAGES, PRECISION, WIDEN,
    )  # fmt: skip
    if BACKWARD:
        h = backward_units(
            acc, units, first_unit // GROUP, tokens, writes, gates, saved, hidden, d_z, gated,
            gate_sums, gate_sums_row, N, GROUP, N // GROUP, ACTIVATION,
        )  # fmt: skip
    else:
        h = forward_units(
            acc, units, tokens, writes, gates, b_down, saved, hidden, gated, N, GROUP, ACTIVATION,
            KEEPS_Z,
        )  # fmt: skip
    return h.to(x.dtype.element_ty)


@triton.jit
def gate_bias_sums(
    x, x_row, WIDTH_IN, b_up, tokens, writes, gate_sums, gate_sums_row,
    N: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, EVEN_IN: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The part of `d_gate` that `b_up` has: `d_out·b_upᵀ`, behind the sums of the groups."""
    e = tl.arange(0, PADDED_E)
    acc = first_product(
        x, x_row, b_up, WIDTH_IN, WIDTH_IN, tokens, tl.minimum(e, E - 1),
        BM, PADDED_E, BK, EVEN_IN, STAGES, PRECISION, WIDEN,
    )  # fmt: skip
    place = tokens[:, None] * gate_sums_row + N // GROUP + e[None, :]
    tl.store(gate_sums + place, acc, mask=writes[:, None] & (e < E)[None, :])
