# SPDX-License-Identifier: Apache-2.0
"""From tensors to launches: what runs the walks of one form, with given kernels and sizes.

A plan does once what depends on the form of a walk, and reads no more of a walk than the addresses
of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from pemt_fast.kernels.configs import (
    GATE_ROWS,
    Fused,
    Pair,
    Tile,
    columns_of_span,
    device_facts,
)
from pemt_fast.kernels.fused import fused_kernel
from pemt_fast.kernels.launch import Launcher
from pemt_fast.kernels.pair import first_kernel, second_kernel
from pemt_fast.kernels.sums import gate_gradient_kernel
from pemt_fast.kernels.walk import Layout, Walk, common_constants, layout_of, unit_constants

# Returns d_gate [G, E] in the gate's dtype, if it is needed.
Plan = Callable[[Walk], Tensor | None]


def plan_with(walk: Walk, choice: Fused | Pair) -> Plan:
    """What runs walks of this form with these kernels and sizes."""
    if isinstance(choice, Fused):
        return _plan_fused(walk, choice)
    return _plan_pair(walk, choice)


def _plan_fused(walk: Walk, choice: Fused) -> Plan:
    x, first, second, base = walk.x, walk.first, walk.second, walk.base
    T, width_in, width_out = x.shape[0], x.shape[1], second.shape[1]
    layout = layout_of(walk.ranks, choice.BN)
    span = columns_of_span(choice, T, width_out, device_facts(x.device)[1])
    constants = common_constants(walk, layout) | unit_constants(walk) | {
        "SPLIT_GATE": x.dtype != torch.float32,
        "BM": choice.BM, "BN": choice.BN, "BK": choice.BK, "BH": choice.BH,
        "EVEN_IN": width_in % choice.BK == 0, "EVEN_OUT": width_out % choice.BH == 0,
        "STAGES": choice.stages, "STAGES_OUT": choice.stages_out,
    }  # fmt: skip
    launch = Launcher(
        fused_kernel, (triton.cdiv(T, choice.BM), triton.cdiv(width_out, span)), constants,
        num_warps=choice.warps, enable_fp_fusion=True,
    )  # fmt: skip
    x_row, first_row, second_row = x.stride(0), first.stride(0), second.stride(0)
    base_row, tokens_per_gate = 0 if base is None else base.stride(0), T // walk.gate.shape[0]
    gate_end = _GateEnd(walk, layout)

    def run_fused(walk: Walk) -> Tensor | None:
        sums = gate_end.sums(walk)
        launch(
            walk.x, x_row, walk.first, first_row, walk.second, second_row, walk.out,
            walk.base, base_row, walk.gate, walk.b_down, walk.b_up,
            walk.saved, walk.hidden, walk.d_z, walk.gated, sums, gate_end.width,
            T, tokens_per_gate, width_in, width_out, span,
        )  # fmt: skip
        return gate_end.finish(walk, sums)

    return run_fused


def _plan_pair(walk: Walk, choice: Pair) -> Plan:
    x, first, second = walk.x, walk.first, walk.second
    T, N, width_in, width_out = x.shape[0], first.shape[0], x.shape[1], second.shape[1]
    tile = choice.first
    layout = layout_of(walk.ranks, tile.columns)
    gate_end = _GateEnd(walk, layout)
    common = common_constants(walk, layout)
    tiles = triton.cdiv(N, tile.columns)
    tiles += walk.backward and walk.b_up is not None and walk.needs_gate
    constants = common | unit_constants(walk) | {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.terms,
        "EVEN_IN": width_in % tile.terms == 0, "STAGES": tile.stages,
    }  # fmt: skip
    launch_first = Launcher(
        first_kernel, (triton.cdiv(T, tile.rows) * tiles,), constants,
        num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    launch_second = None if walk.out is None else _second(walk, choice.second, common)
    x_row, first_row, second_row = x.stride(0), first.stride(0), second.stride(0)
    base_row = 0 if walk.base is None else walk.base.stride(0)
    tokens_per_gate = T // walk.gate.shape[0]

    def run_pair(walk: Walk) -> Tensor | None:
        sums, d_z, gated = gate_end.sums(walk), walk.d_z, walk.gated
        if walk.out is not None:
            if walk.backward:
                d_z = units = walk.x.new_empty(T, N) if d_z is None else d_z
            else:
                gated = units = walk.x.new_empty(T, N)
        launch_first(
            walk.x, x_row, walk.first, first_row, walk.second, second_row, walk.gate,
            walk.b_down, walk.b_up, walk.saved, walk.hidden, d_z, gated,
            sums, gate_end.width, T, tokens_per_gate, width_in, width_out,
        )  # fmt: skip
        if launch_second is not None:
            launch_second(
                units, walk.second, second_row, walk.out, walk.base, base_row,
                walk.gate, walk.b_up, T, tokens_per_gate, width_out,
            )  # fmt: skip
        return gate_end.finish(walk, sums)

    return run_pair


def _second(walk: Walk, tile: Tile, common: dict[str, Any]) -> Launcher:
    width_out = walk.second.shape[1]
    layout = layout_of(walk.ranks, tile.terms)
    constants = common | {
        "GROUP": layout.group, "PER_ADAPTER": layout.per_adapter, "ENDS": layout.ends,
        "SPLIT_GATE": walk.x.dtype != torch.float32,
        "BM": tile.rows, "BH": tile.columns, "BK": tile.terms,
        "EVEN_OUT": width_out % tile.columns == 0, "STAGES": tile.stages,
    }  # fmt: skip
    programs = triton.cdiv(walk.x.shape[0], tile.rows) * triton.cdiv(width_out, tile.columns)
    return Launcher(
        second_kernel, (programs,), constants, num_warps=tile.warps, enable_fp_fusion=True
    )


class _GateEnd:
    """The gradient of the gate: room for the sums of each token's groups, and what becomes of them.

    Behind the sums of the groups comes, of each adapter, the part of `b_up`.
    """

    def __init__(self, walk: Walk, layout: Layout) -> None:
        self.needed = walk.needs_gate
        self.T, (self.G, E) = walk.x.shape[0], walk.gate.shape
        groups = walk.first.shape[0] // layout.group
        self.width = groups + (0 if walk.b_up is None else E) if self.needed else 0
        constants = {
            "E": E, "PADDED_E": max(16, triton.next_power_of_2(E)), "GROUPS": groups,
            "PER_ADAPTER": layout.per_adapter, "ENDS": layout.ends, "MOST": layout.most,
            "BIAS": walk.b_up is not None, "BR": GATE_ROWS,
        }  # fmt: skip
        self.launch = Launcher(
            gate_gradient_kernel, (triton.cdiv(self.G, GATE_ROWS),), constants,
            enable_fp_fusion=True,
        )  # fmt: skip

    def sums(self, walk: Walk) -> Tensor | None:
        if not self.needed:
            return None
        return torch.empty(self.T, self.width, device=walk.x.device)

    def finish(self, walk: Walk, sums: Tensor | None) -> Tensor | None:
        """Adds up the sums of the tokens of each gate row, then those of each adapter."""
        if sums is None:
            return None
        if self.T != self.G:
            sums = sums.view(self.G, -1, self.width).sum(1)
        d_gate = torch.empty_like(walk.gate)
        self.launch(sums, self.width, walk.gate, d_gate, self.G)
        return d_gate
