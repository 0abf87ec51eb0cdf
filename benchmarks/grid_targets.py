# SPDX-License-Identifier: Apache-2.0
"""The targets of the CPU kernels, as bounds on cells of the grid, and what both grids share.

"The faster" is whichever of `stacked` and `compiled` is faster in a cell, so the ratio to it is the
smaller of two. Where the numbers come from: `grid_run.py`; how they are shown: `grid_report.py`;
what a target is: `targets.py`; those of the GPU kernels: `gpu_targets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cases import FORWARD, FROZEN, MODES, TRAINABLE
from grid import GROUP
from records import GRAPH, Result, Row
from targets import Target

_FASTER = ("stacked", "compiled")


def speedup(row: Row) -> float | None:
    """How many times faster than the faster of `stacked` and `compiled`; None if not known.

    Both in CUDA graphs where these were measured.
    """
    in_graphs = [row.speedup[b + GRAPH] for b in _FASTER if b + GRAPH in row.speedup]
    plain = (row.speedup[b] for b in _FASTER if b in row.speedup)
    return min(in_graphs or plain, default=None)


def loses(row: Row) -> bool:
    """Whether it is slower than the faster baseline, to the two digits shown."""
    ratio = speedup(row)
    return ratio is not None and round(ratio, 2) < 1


def ours(result: Result, *, refused: bool = False) -> list[Row]:
    """The rows of the kernels in the grid: those that were timed, or those that were refused."""
    rows = (r for r in result.rows if r.provider == result.preferred and r.group == GROUP)
    return [row for row in rows if (row.error is not None if refused else speedup(row) is not None)]


def _cells(
    dtype: str, *modes: str, where: Callable[[Row], bool] = lambda row: True
) -> Callable[[Row], bool]:
    return lambda row: row.dtype == dtype and row.mode in modes and where(row)


def _large(row: Row) -> bool:
    return row.T >= 512 and row.N >= 96 and min(row.D, row.H) >= 768


def _matmul_time(row: Row) -> float:
    return 1 / row.share_of_matmuls


def _to_stacked(row: Row) -> float:
    return row.speedup.get("stacked", math.nan)  # refused: the target cannot be reached


_LARGE = "T ≥ 512, N ≥ 96, D, H ≥ 768"
_MEAN, _TIME, _SLOWEST = "× faster, mean", "time / bare matmuls", "× faster, every cell"

TARGETS = (
    Target(f"bf16 fwd, {_LARGE}", _MEAN, 1.4, _cells("bf16", FORWARD, where=_large), speedup),
    Target(f"bf16 fwd and frozen, {_LARGE}", _SLOWEST, 1.0,
           _cells("bf16", FORWARD, FROZEN, where=_large), speedup, every_cell=True),
    Target(f"bf16 fwd, {_LARGE}", f"{_TIME}, mean", 1.05, _cells("bf16", FORWARD, where=_large),
           _matmul_time, at_most=True),
    Target(f"bf16 fwd, {_LARGE}", f"{_TIME}, every cell", 1.05,
           _cells("bf16", FORWARD, where=_large), _matmul_time, every_cell=True, at_most=True),
    Target(f"bf16 fwd+bwd frozen, {_LARGE}", _MEAN, 1.25, _cells("bf16", FROZEN, where=_large),
           speedup),
    # Fewer tokens have a target of their own, and would lift this mean.
    *(Target(f"fp32 {mode}, T ≥ 128", _MEAN, 1.1, _cells("fp32", mode, where=lambda r: r.T >= 128),
             speedup)
      for mode in (FORWARD, FROZEN, TRAINABLE)),
    Target("fp32, all modes and tokens", _SLOWEST, 1.0, _cells("fp32", *MODES), speedup,
           every_cell=True),
    *(Target(f"{dtype} fwd, T ≤ 32", "× stacked, mean", 2.0,
             _cells(dtype, FORWARD, where=lambda r: r.T <= 32), _to_stacked)
      for dtype in ("bf16", "fp32")),
)  # fmt: skip
