# SPDX-License-Identifier: Apache-2.0
"""The targets of the CPU kernels, as bounds on cells of the grid, and what all targets share.

"The faster" is whichever of `stacked` and `compiled` is faster in a cell, so the ratio to it is the
smaller of two. Where the numbers come from: `grid_run.py`; how they are shown: `grid_report.py`;
the targets of the GPU kernels: `gpu_targets.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from cases import FORWARD, FROZEN, MODES, TRAINABLE
from grid import GROUP
from records import GRAPH, Result, Row, geometric_mean

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


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on the geometric mean of `value` over the cells that `keep` accepts.

    With `every_cell` on the worst of them. The value should be at least `bound`, or `at_most` that.
    """

    where: str
    what: str
    bound: float
    keep: Callable[[Row], bool]
    value: Callable[[Row], float] = speedup
    every_cell: bool = False
    at_most: bool = False

    def worst(self, rows: Sequence[Row]) -> Row:
        """The cell that is farthest on the wrong side."""
        return (max if self.at_most else min)(rows, key=self.value)

    def found(self, rows: Sequence[Row]) -> float:
        """What the bound is for."""
        if self.every_cell:
            return self.value(self.worst(rows))
        return geometric_mean(self.value(row) for row in rows)

    def reached(self, rows: Sequence[Row]) -> bool:
        """Whether the bound holds, to the two digits shown."""
        found = round(self.found(rows), 2)
        return found <= self.bound if self.at_most else found >= self.bound


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
    Target(f"bf16 fwd, {_LARGE}", _MEAN, 1.4, _cells("bf16", FORWARD, where=_large)),
    Target(f"bf16 fwd and frozen, {_LARGE}", _SLOWEST, 1.0,
           _cells("bf16", FORWARD, FROZEN, where=_large), every_cell=True),
    Target(f"bf16 fwd, {_LARGE}", f"{_TIME}, mean", 1.05, _cells("bf16", FORWARD, where=_large),
           _matmul_time, at_most=True),
    Target(f"bf16 fwd, {_LARGE}", f"{_TIME}, every cell", 1.05,
           _cells("bf16", FORWARD, where=_large), _matmul_time, every_cell=True, at_most=True),
    Target(f"bf16 fwd+bwd frozen, {_LARGE}", _MEAN, 1.25, _cells("bf16", FROZEN, where=_large)),
    # Fewer tokens have a target of their own, and would lift this mean.
    *(Target(f"fp32 {mode}, T ≥ 128", _MEAN, 1.1, _cells("fp32", mode, where=lambda r: r.T >= 128))
      for mode in (FORWARD, FROZEN, TRAINABLE)),
    Target("fp32, all modes and tokens", _SLOWEST, 1.0, _cells("fp32", *MODES), every_cell=True),
    *(Target(f"{dtype} fwd, T ≤ 32", "× stacked, mean", 2.0,
             _cells(dtype, FORWARD, where=lambda r: r.T <= 32), _to_stacked)
      for dtype in ("bf16", "fp32")),
)  # fmt: skip
