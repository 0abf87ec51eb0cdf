# SPDX-License-Identifier: Apache-2.0
"""The targets of the GPU kernels, as bounds on cells of `gpu_grid.py`.

Times are those of the device; up to `GRAPH_TOKENS` tokens, where the host is slower than the
device, those in CUDA graphs. The floor is that of `roofline.py`.
"""

from __future__ import annotations

import math

from cases import FORWARD, MODES
from gpu_grid import GRAPH_TOKENS
from grid_targets import speedup
from records import GRAPH, Row
from targets import Target

LARGE_TOKENS = 16384


def share_of_floor(row: Row) -> float:
    """The floor over the time on the device; NaN where no floor is known."""
    if row.floor_us is None or not row.median_ms:
        return math.nan
    return row.floor_us / (1e3 * (row.graph_ms or row.median_ms))


def _to_compiled(row: Row) -> float:
    return row.speedup["compiled"]


def _to_stacked_in_graphs(row: Row) -> float:
    return row.speedup.get(f"stacked{GRAPH}", math.nan)  # not captured: cannot be reached


def _compiled_and_narrow(row: Row) -> bool:
    return row.N <= 128 and "compiled" in row.speedup


def _large(row: Row, mode: str) -> bool:
    return row.mode == mode and row.T >= LARGE_TOKENS and row.floor_us is not None


TARGETS = (
    Target("N ≤ 128", "× compiled, mean", 1.5, _compiled_and_narrow, _to_compiled),
    Target("N ≤ 128", "× compiled, every cell", 1.5, _compiled_and_narrow, _to_compiled,
           every_cell=True),
    *(Target(mode, "× faster, every cell", 1.0, lambda row, mode=mode: row.mode == mode, speedup,
             every_cell=True) for mode in MODES),
    *(Target(f"{mode}, T ≥ {LARGE_TOKENS}", "floor / time, mean", 0.7,
             lambda row, mode=mode: _large(row, mode), share_of_floor)
      for mode in MODES),
    Target(f"{FORWARD}, T ≥ {LARGE_TOKENS}", "floor / time, every cell", 0.7,
           lambda row: _large(row, FORWARD), share_of_floor, every_cell=True),
    Target(f"{FORWARD}, T ≤ {GRAPH_TOKENS}", "× stacked in graphs, mean", 3.0,
           lambda row: row.mode == FORWARD and row.T <= GRAPH_TOKENS, _to_stacked_in_graphs),
)  # fmt: skip
