# SPDX-License-Identifier: Apache-2.0
"""`impl="triton"` on flat tensors: which kernels run with which sizes, and what they write.

`forward` and `backward` are called by `pemt_fast/ops/triton_backend.py`. The kernels: `fused.py`
or `pair.py` (both products, on the helpers of `units.py` and `tiles.py`), `sums.py` (gradients of
weights and gate). Tokens are never looked at on the host, so calls can be captured in a graph.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pemt_fast.kernels.configs import (
    GATE_ROWS,
    REDUCE_COLUMNS,
    Fused,
    Pair,
    choose,
    choose_pair,
    choose_weight_gradient,
    columns_of_span,
    device_facts,
    splits_of,
)
from pemt_fast.kernels.fused import fused_kernel
from pemt_fast.kernels.pair import first_kernel, second_kernel
from pemt_fast.kernels.sums import (
    add_partials_kernel,
    gate_gradient_kernel,
    weight_gradient_kernel,
)


class Layout(NamedTuple):
    """How the hidden units belong to adapters, see `tiles.py`."""

    group: int
    per_adapter: int  # groups of each adapter, 0 if these differ
    adapters: Tensor | None  # of each group, int32, if they differ
    first_group: Tensor | None  # of each adapter and behind the last, int32, if they differ
    most: int  # groups of one adapter


@functools.lru_cache(maxsize=256)
def layout_of(ranks: tuple[int, ...], block: int, device: torch.device) -> Layout:
    """Groups such that a block of so many units, a power of two, holds whole ones."""
    common = math.gcd(*ranks)
    group = min(common & -common, block)
    if len(set(ranks)) == 1:
        return Layout(group, ranks[0] // group, None, None, ranks[0] // group)
    counts = torch.tensor([rank // group for rank in ranks])
    adapters = torch.arange(len(ranks)).repeat_interleave(counts)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Layout(group, 0, adapters.int().to(device), first.int().to(device), max(ranks) // group)


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device (`TRITON_INTERPRET=1`)."""
    return not isinstance(fused_kernel, triton.runtime.JITFunction)


def _precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as torch's setting for its own matmuls says."""
    if dtype != torch.float32:
        return "ieee"  # has no meaning for 16-bit inputs; one name, one compilation
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Walk(NamedTuple):
    """One pass over all tokens, forward or backward, with the tensors in their roles there.

    `x`, `first` and `second` are x, w_down, w_up or d_out, w_up, w_down; rows are dense along their
    last dimension. What is None is not read or not written.
    """

    x: Tensor  # [T, width in]
    gate: Tensor  # [G, E] float32
    first: Tensor  # [N, width in]
    second: Tensor  # [N, width out]
    ranks: tuple[int, ...]
    activation: str
    backward: bool
    out: Tensor | None  # [T, width out]
    base: Tensor | None = None  # [T, width out]
    b_down: Tensor | None = None  # [N]
    b_up: Tensor | None = None  # [E, H]
    saved: Tensor | None = None  # [T, N], written forward, read backward
    hidden: Tensor | None = None  # [T, N], written; backward its gradient
    d_z: Tensor | None = None  # [T, N]
    gated: Tensor | None = None  # [T, N]
    needs_gate: bool = False


def run(walk: Walk) -> Tensor | None:
    """Launch the kernels of a walk; returns `d_gate [G, E]` in float32 if it is needed."""
    kind, processors = device_facts(walk.x.device)
    T, N = walk.x.shape[0], walk.first.shape[0]
    pick = choose if walk.out is not None else choose_pair
    choice = pick(kind, walk.x.element_size(), walk.backward, N, T)
    if isinstance(choice, Fused):
        return _run_fused(walk, choice, processors)
    return _run_pair(walk, choice)


def _common(walk: Walk, layout: Layout) -> dict[str, Any]:
    """Constants that all kernels of a walk have."""
    E = len(walk.ranks)
    return {
        "N": walk.first.shape[0],
        "E": E,
        "PADDED_E": max(16, triton.next_power_of_2(E)),
        "GROUP": layout.group,
        "PER_ADAPTER": layout.per_adapter,
        "BACKWARD": walk.backward,
        "SKIP": _may_skip(walk),
        "PRECISION": _precision(walk.x.dtype),
        "WIDEN": is_interpreted() and walk.x.dtype != torch.float32,
        "enable_fp_fusion": True,
    }


def _may_skip(walk: Walk) -> bool:
    """Whether units that no token uses need not exist: nothing but the output is made of them."""
    if walk.hidden is not None or walk.needs_gate:
        return False
    return walk.d_z is None and walk.gated is None if walk.backward else walk.saved is None


def _units(walk: Walk) -> dict[str, Any]:
    return {"ACTIVATION": walk.activation, "KEEPS_Z": walk.activation not in ("identity", "relu")}


def _gate_sums(walk: Walk, layout: Layout) -> Tensor | None:
    """Room for the sums of each token's groups and, behind them, the part of `b_up`."""
    if not walk.needs_gate:
        return None
    width = walk.first.shape[0] // layout.group + (0 if walk.b_up is None else len(walk.ranks))
    return torch.empty(walk.x.shape[0], width, device=walk.x.device)


def _run_fused(walk: Walk, choice: Fused, processors: int) -> Tensor | None:
    x, first, second, out, base = walk.x, walk.first, walk.second, walk.out, walk.base
    T, width_in, width_out = x.shape[0], x.shape[1], second.shape[1]
    layout = layout_of(walk.ranks, choice.BN, x.device)
    sums = _gate_sums(walk, layout)
    span = columns_of_span(choice, T, width_out, processors)
    fused_kernel[triton.cdiv(T, choice.BM), triton.cdiv(width_out, span)](
        x, x.stride(0), first, first.stride(0), second, second.stride(0), out,
        base, 0 if base is None else base.stride(0), walk.gate, layout.adapters,
        walk.b_down, walk.b_up, walk.saved, walk.hidden, walk.d_z, walk.gated,
        sums, 0 if sums is None else sums.stride(0),
        T, T // walk.gate.shape[0], width_in, width_out, span,
        **_common(walk, layout), **_units(walk), SPLIT_GATE=x.dtype != torch.float32,
        BM=choice.BM, BN=choice.BN, BK=choice.BK, BH=choice.BH,
        EVEN_IN=width_in % choice.BK == 0, EVEN_OUT=width_out % choice.BH == 0,
        STAGES=choice.stages, STAGES_OUT=choice.stages_out, num_warps=choice.warps,
    )  # fmt: skip
    return _finish_gate(walk, layout, sums)


def _run_pair(walk: Walk, choice: Pair) -> Tensor | None:
    x, first, second, out, base = walk.x, walk.first, walk.second, walk.out, walk.base
    T, N, width_in, width_out = x.shape[0], first.shape[0], x.shape[1], second.shape[1]
    tile = choice.first
    layout = layout_of(walk.ranks, tile.columns, x.device)
    sums = _gate_sums(walk, layout)
    d_z, gated = walk.d_z, walk.gated
    if walk.backward and d_z is None and out is not None:
        d_z = x.new_empty(T, N)
    if not walk.backward and out is not None:
        gated = x.new_empty(T, N)
    units = d_z if walk.backward else gated
    common = _common(walk, layout)
    tiles = triton.cdiv(N, tile.columns)
    tiles += walk.backward and walk.b_up is not None and sums is not None
    first_kernel[(triton.cdiv(T, tile.rows) * tiles,)](
        x, x.stride(0), first, first.stride(0), second, second.stride(0), walk.gate,
        layout.adapters, walk.b_down, walk.b_up, walk.saved, walk.hidden, d_z, gated,
        sums, 0 if sums is None else sums.stride(0),
        T, T // walk.gate.shape[0], width_in, width_out,
        **common, **_units(walk), BM=tile.rows, BN=tile.columns, BK=tile.terms,
        EVEN_IN=width_in % tile.terms == 0, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    if out is not None:
        tile = choice.second
        of_terms = layout_of(walk.ranks, tile.terms, x.device)
        second_kernel[(triton.cdiv(T, tile.rows) * triton.cdiv(width_out, tile.columns),)](
            units, second, second.stride(0), out, base, 0 if base is None else base.stride(0),
            walk.gate, of_terms.adapters, walk.b_up, T, T // walk.gate.shape[0], width_out,
            **common | {"GROUP": of_terms.group, "PER_ADAPTER": of_terms.per_adapter},
            SPLIT_GATE=x.dtype != torch.float32, BM=tile.rows, BH=tile.columns, BK=tile.terms,
            EVEN_OUT=width_out % tile.columns == 0, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return _finish_gate(walk, layout, sums)


def _finish_gate(walk: Walk, layout: Layout, sums: Tensor | None) -> Tensor | None:
    """Adds up the sums of the tokens of each gate row, then those of each adapter."""
    if sums is None:
        return None
    G, E = walk.gate.shape
    if sums.shape[0] != G:
        sums = sums.view(G, -1, sums.shape[1]).sum(1)
    d_gate = torch.empty_like(walk.gate)
    gate_gradient_kernel[(triton.cdiv(G, GATE_ROWS),)](
        sums, sums.stride(0), walk.gate, layout.first_group, d_gate, G, E=E,
        PADDED_E=max(16, triton.next_power_of_2(E)), GROUPS=walk.first.shape[0] // layout.group,
        PER_ADAPTER=layout.per_adapter, MOST=layout.most, BIAS=walk.b_up is not None, BR=GATE_ROWS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return d_gate


def weight_gradients(
    d_z: Tensor | None, x: Tensor | None, gated: Tensor | None, d_out: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`d_w_down = d_zᵀ·x` and `d_w_up = gatedᵀ·d_out`, None where there is no left side."""
    units = gated if d_z is None else d_z
    if units is None:
        return None, None
    kind, processors = device_facts(units.device)
    (T, N), H = units.shape, d_out.shape[1]
    tile = choose_weight_gradient(kind, units.element_size(), N, T)
    if tile is None:
        return (
            None if d_z is None or x is None else torch.mm(d_z.t(), x),
            None if gated is None else torch.mm(gated.t(), d_out),
        )
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
        PRECISION=_precision(units.dtype),
        WIDEN=is_interpreted() and units.dtype != torch.float32, num_warps=tile.warps,
    )  # fmt: skip
    d_w_down = None if d_z is None else units.new_empty(N, D)
    d_w_up = None if gated is None else units.new_empty(N, H)
    add_partials_kernel[N, triton.cdiv(row, REDUCE_COLUMNS)](
        partial, d_w_down, d_w_up, D, H, splits, **flags, BW=REDUCE_COLUMNS
    )
    return d_w_down, d_w_up
