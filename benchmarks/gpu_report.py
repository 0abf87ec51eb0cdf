# SPDX-License-Identifier: Apache-2.0
"""What only a run of the GPU's grid has to say: all providers, host, memory, sparse gates.

Texts for `grid_report.py`, which does the rest.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from cases import MODES
from gpu_grid import GRAPH_TOKENS, HOST_TOKENS, MEMORY_TOKENS, OURS
from gpu_targets import LARGE_TOKENS
from grid import GROUP
from records import Result, Row, geometric_mean
from tables import markdown, number

BANDS: dict[str, Callable[[int], bool]] = {
    f"T ≥ {LARGE_TOKENS}": lambda T: T >= LARGE_TOKENS,
    "T = 1024, 4096": lambda T: GRAPH_TOKENS < T < LARGE_TOKENS,
    f"T ≤ {GRAPH_TOKENS}": lambda T: T <= GRAPH_TOKENS,
}
_OTHERS = ("loop", "compiled", "ours-torch", OURS, "matmuls")
PROVIDER_COLUMNS = ("mode", "tokens", *_OTHERS)
_COSTS = ("loop", "stacked", "ours-torch", OURS)
SPARSE_COLUMNS = (
    "case", "stacked ms", "grouped ms", "ours ms", "floor µs", "× grouped", "× stacked",
)  # fmt: skip
READING = (
    "Times are those of the device, with its queue full and its caches flushed before each call; "
    f"up to {GRAPH_TOKENS} tokens those in CUDA graphs. The floor is the larger of operations over "
    "790 TFLOP/s and bytes over 4.3 TB/s (H200), which a large matmul and a large copy reach."
)


def _by_provider(result: Result) -> list[dict[str, Row]]:
    """The rows of each cell of the grid that were timed, by provider."""
    cells = ({r.provider: r for r in rows if r.median_ms} for rows in result.cells())
    return [rows for rows in cells if rows and next(iter(rows.values())).group == GROUP]


def _ms(row: Row) -> float:
    return row.graph_ms or row.median_ms


def provider_cells(result: Result) -> list[list[str]]:
    """A line of `PROVIDER_COLUMNS` per mode and band: how many times faster than `stacked`."""
    lines = []
    cells = _by_provider(result)
    for mode, (name, holds) in itertools.product(MODES, BANDS.items()):
        line = []
        for provider in _OTHERS:
            both = (
                (rows["stacked"], rows[provider])
                for rows in cells
                if {"stacked", provider} <= set(rows)
            )
            kept = [(s, o) for s, o in both if o.mode == mode and holds(o.T)]
            # Both in graphs or both not: one of them may have refused to be captured.
            ratios = [
                s.graph_ms / o.graph_ms if s.graph_ms and o.graph_ms else s.median_ms / o.median_ms
                for s, o in kept
            ]
            line.append(f"{geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "–")
        if any(text != "–" for text in line):
            lines.append([mode, name, *line])
    return lines


def cost_cells(result: Result) -> list[list[str]]:
    """A line per mode: host time at `HOST_TOKENS`, and peak memory at `MEMORY_TOKENS`."""
    lines = []
    cells = _by_provider(result)
    for mode in MODES:
        kept = [rows for rows in cells if next(iter(rows.values())).mode == mode]
        line = [_mean_of(kept, name, lambda row: row.host_us) for name in _COSTS]
        line += [_mean_of(kept, name, lambda row: row.peak_memory_mib) for name in _COSTS]
        if any(text != "–" for text in line):
            lines.append([mode, *line])
    return lines


def _mean_of(
    cells: Sequence[dict[str, Row]], provider: str, value: Callable[[Row], float | None]
) -> str:
    """Geometric mean over the cells in which all providers of the table have it."""
    complete = [rows for rows in cells if all(n in rows and value(rows[n]) for n in _COSTS)]
    return number(geometric_mean(value(rows[provider]) for rows in complete)) if complete else "–"


def sparse_cells(result: Result) -> list[list[str]]:
    """A line of `SPARSE_COLUMNS` for each case in which a token uses few adapters."""
    lines = []
    for rows in result.cells():
        if rows[0].group == GROUP:
            continue
        by_name = {row.provider: row for row in rows}
        times = [
            "–" if n not in by_name else "refused" if by_name[n].error else number(_ms(by_name[n]))
            for n in ("stacked", "grouped", OURS)
        ]
        mine = by_name[OURS].speedup if OURS in by_name else {}
        ratios = [f"{mine[b]:.2f}" if b in mine else "–" for b in ("grouped", "stacked")]
        lines.append([rows[0].case, *times, number(rows[0].floor_us), *ratios])
    return lines


def extras(result: Result) -> list[str]:
    """Paragraphs behind the means of the grid."""
    costs = [
        "mode",
        *(f"host µs {name}" for name in _COSTS),
        *(f"peak MiB {name}" for name in _COSTS),
    ]
    found = {
        "Everybody against `stacked`": (
            "How many times faster, geometric means, in brackets the number of cells.",
            PROVIDER_COLUMNS, provider_cells(result), 2,
        ),
        "Host and memory": (
            f"Geometric means: microseconds that the host needs to queue a call (T = "
            f"{HOST_TOKENS}), and the most memory a call needs beyond its inputs "
            f"(T = {MEMORY_TOKENS}).",
            costs, cost_cells(result), 1,
        ),
        "Few adapters per token": (
            "A dense gate that is 0 for all but the best adapters of a token, forward. `grouped` "
            "sorts the tokens by adapter and multiplies groups, as ScatterMoE does.",
            SPARSE_COLUMNS, sparse_cells(result), 1,
        ),
    }  # fmt: skip
    parts = []
    for title, (text, columns, lines, text_columns) in found.items():
        if lines:
            parts += [f"### {title}", text, markdown(columns, lines, text_columns)]
    return parts


def measured(result: Result) -> str:
    """What the run says about the machine and about itself."""
    known = result.environment.get("measured") or {}
    names = {
        "matmul_tflop_s": "TFLOP/s of a matmul of 8192³",
        "copy_tb_s": "TB/s of a copy",
        "clocks": "SM and memory clock, temperature, power",
        "seconds": "s of the run",
    }
    return "; ".join(f"{known[key]} {text}" for key, text in names.items() if known.get(key))


def unreached(result: Result) -> str:
    """How many cells lack what, and why; the list is in the JSON."""
    counted = Counter((provider or "cells", reason) for *_, provider, reason in result.not_measured)
    texts = [f"{what} {count}: {reason}" for (what, reason), count in sorted(counted.items())]
    return "; ".join(texts)
