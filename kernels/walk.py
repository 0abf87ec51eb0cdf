# SPDX-License-Identifier: Apache-2.0
"""One pass over all tokens, as the kernels see it: its tensors, and how its units are divided."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pemt_fast.kernels.fused import fused_kernel


class Layout(NamedTuple):
    """How the hidden units belong to adapters, see `tiles.py`."""

    group: int
    per_adapter: int  # groups of each adapter, 0 if these differ
    ends: tuple[int, ...]  # the group behind each adapter's last one
    most: int  # groups of one adapter


@functools.lru_cache(maxsize=256)
def layout_of(ranks: tuple[int, ...], block: int) -> Layout:
    """Groups such that a block of so many units, a power of two, holds whole ones."""
    common = math.gcd(*ranks)
    group = min(common & -common, block)
    counts = [rank // group for rank in ranks]
    per_adapter = counts[0] if len(set(counts)) == 1 else 0
    return Layout(group, per_adapter, tuple(itertools.accumulate(counts)), max(counts))


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device (`TRITON_INTERPRET=1`)."""
    return not isinstance(fused_kernel, triton.runtime.JITFunction)


def precision_of(dtype: torch.dtype) -> str:
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
    gate: Tensor  # [G, E], dense
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


def common_constants(walk: Walk, layout: Layout) -> dict[str, Any]:
    """Constants that all kernels of a walk have."""
    E = len(walk.ranks)
    return {
        "N": walk.first.shape[0],
        "E": E,
        "PADDED_E": max(16, triton.next_power_of_2(E)),
        "GROUP": layout.group,
        "PER_ADAPTER": layout.per_adapter,
        "ENDS": layout.ends,
        "BACKWARD": walk.backward,
        "SKIP": _may_skip(walk),
        "PRECISION": precision_of(walk.x.dtype),
        "WIDEN": is_interpreted() and walk.x.dtype != torch.float32,
    }


def _may_skip(walk: Walk) -> bool:
    """Whether units that no token uses need not exist: nothing but the output is made of them."""
    if walk.hidden is not None or walk.needs_gate:
        return False
    return walk.d_z is None and walk.gated is None if walk.backward else walk.saved is None


def unit_constants(walk: Walk) -> dict[str, Any]:
    """Constants of the kernels that make hidden units."""
    return {"ACTIVATION": walk.activation, "KEEPS_Z": walk.activation not in ("identity", "relu")}
