# SPDX-License-Identifier: Apache-2.0
"""What a run of the grid says: the targets, means over bands of tokens, and every cell.

Texts for the terminal and for `report.py`; what a target is: `targets.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import gpu_grid
import gpu_report
import gpu_targets
import grid
import grid_targets
from cases import MODES, Case
from gpu_targets import share_of_floor
from grid_targets import loses, ours, speedup
from records import Result, Row, geometric_mean
from rich.console import Console
from tables import LOST, machine, markdown, mean_and_range, number, print_tables, rich_table
from targets import Target, target_line, target_table

WORST = 3  # cells named beside a mean
MOST_PRINTED = 100  # cells in the terminal
MOST_REFUSED = 50  # listed in full

TARGET_COLUMNS = ("where", "what", "target", "cells", "found", "worst cell", "reached")
_OF_FLOOR = "% of floor"
CELL_COLUMNS = (
    "case", "dtype", "mode", "loop ms", "stacked ms", "compiled ms", "ours ms", "matmuls ms",
    "× faster",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class View:
    """What the report of one device's grid is about."""

    targets: tuple[Target, ...]
    bands: dict[str, Callable[[int], bool]]  # of tokens
    left_out: tuple[grid.LeftOut, ...]
    widths: tuple[tuple[int, int], ...]
    bottlenecks: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    activations: tuple[str, ...]
    case: Callable[..., Case]  # of T, D, H, E, R and the activation
    title: str  # part of that of the heat map
    extras: Callable[[Result], list[str]] = lambda result: []
    reading: str = ""
    unit: str = "ms"  # of the times of single cells
    per_ms: float = 1


VIEWS = {
    "cpu": View(
        targets=grid_targets.TARGETS,
        bands={
            "T ≥ 512": lambda T: T >= 512,
            "T = 128": lambda T: T == 128,
            "T ≤ 32": lambda T: T <= 32,
        },
        left_out=grid.LEFT_OUT,
        widths=grid.WIDTHS,
        bottlenecks=grid.BOTTLENECKS,
        tokens=grid.TOKENS,
        activations=grid.ACTIVATIONS,
        case=grid.grid_case,
        title="geometric mean over widths\nand activations",
    ),
    "cuda": View(
        targets=gpu_targets.TARGETS,
        bands=gpu_report.BANDS,
        left_out=gpu_grid.LEFT_OUT,
        widths=gpu_grid.FULL.widths,
        bottlenecks=tuple((E, gpu_grid.FULL.R) for E in gpu_grid.FULL.adapters),
        tokens=gpu_grid.FULL.tokens,
        activations=("relu",),
        case=lambda T, D, H, E, R, activation: gpu_grid.device_case(T, D, H, E, R),
        title="geometric mean\nover widths",
        extras=gpu_report.extras,
        reading=gpu_report.READING,
        unit="µs",
        per_ms=1e3,
    ),
}


def target_cells(result: Result) -> list[list[str]]:
    """A line of `TARGET_COLUMNS` for each target."""
    timed, refused = ours(result), ours(result, refused=True)
    lines = []
    for target in VIEWS[result.device].targets:
        kept, failed = ([row for row in rows if target.keep(row)] for rows in (timed, refused))
        lines.append(target_line(target, kept, failed, functools.partial(_worst, target)))
    return lines


def _worst(target: Target, row: Row) -> str:
    return f"{target.value(row):.2f} {row.case}, {row.mode}"  # what was found may be a mean


# --- means over bands ----------------------------------------------------------------------------


def band_columns(rows: Sequence[Row]) -> list[str]:
    """Those of `band_cells`; the floor where it is known."""
    floor = [_OF_FLOOR] if any(row.floor_us is not None for row in rows) else []
    return [
        "dtype", "mode", "tokens", "cells", "× faster", "× loop", "% of matmuls", *floor, "worst",
    ]  # fmt: skip


def band_cells(rows: Sequence[Row], bands: dict[str, Callable[[int], bool]]) -> list[list[str]]:
    """A line of `band_columns` for each dtype, mode and band that has cells."""
    lines = []
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    has_floor = _OF_FLOOR in band_columns(rows)
    for dtype, mode, (name, holds) in itertools.product(dtypes, MODES, bands.items()):
        kept = [row for row in rows if (row.dtype, row.mode) == (dtype, mode) and holds(row.T)]
        if not kept:
            continue
        worst = sorted(kept, key=speedup)[:WORST]
        line = [dtype, mode, name, str(len(kept)), mean_and_range([speedup(row) for row in kept])]
        line.append(mean_and_range([row.speedup["loop"] for row in kept if "loop" in row.speedup]))
        line.append(_shares([row.share_of_matmuls for row in kept]))
        if has_floor:
            line.append(_shares([share_of_floor(row) for row in kept]))
        line.append("; ".join(f"{speedup(row):.2f} {row.case}" for row in worst))
        lines.append(line)
    return lines


def _shares(shares: Sequence[float]) -> str:
    """Geometric mean and range in per cent."""
    per_cent = [100 * share for share in shares]
    return f"{geometric_mean(per_cent):.0f} ({min(per_cent):.0f}–{max(per_cent):.0f})"


# --- pages ---------------------------------------------------------------------------------------


def grid_plot_name(result: Result) -> str:
    """The picture of `plots.plot_grid`."""
    return f"{result.device}-grid-heatmap.png"


def page_name(result: Result) -> str:
    """The file of `page`."""
    return f"{result.device}-grid.md"


def section(result: Result) -> list[str]:
    """The paragraphs for `results/README.md`."""
    view = VIEWS[result.device]
    parts = [f"## {result.device}: the grid of the kernels' targets", machine(result)]
    rows = ours(result)
    if not rows:
        reason = result.skipped.get(result.preferred, "refused")
        return [*parts, f"`{result.preferred}` was not measured: {reason}.", *_refused(result)]
    parts += [text for text in (view.reading, gpu_report.measured(result)) if text]
    parts += ["### Targets", markdown(TARGET_COLUMNS, target_cells(result), text_columns=2)]
    parts += _refused(result)
    means = markdown(band_columns(rows), band_cells(rows, view.bands), 3)
    parts += ["### Means of the grid", _READING, means, *view.extras(result)]
    parts.append(f"![{result.device}-grid-heatmap]({grid_plot_name(result)})")
    parts += ["### Cells slower than the faster baseline", *_losers(rows)]
    parts.append(f"[Every cell of the grid]({page_name(result)}). {_not_measured(result)}")
    return parts


_READING = (
    f"× faster: how many times faster than the faster of `stacked` and `compiled`. Geometric "
    f"means, in brackets the range over the cells and how many are slower ({LOST})."
)


def _refused(result: Result) -> list[str]:
    rows = [row for row in result.rows if row.error]
    lines = [f"* `{r.provider}`, {r.case}, {r.dtype}, {r.mode}: {r.error}" for r in rows]
    if lines[MOST_REFUSED:]:
        lines[MOST_REFUSED:] = [f"* and {len(lines) - MOST_REFUSED} more, see the JSON"]
    return ["### Refused, hence not timed", "\n".join(lines)] if rows else []


def _losers(rows: Sequence[Row]) -> list[str]:
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in filter(loses, rows):
        kinds.setdefault((row.dtype, row.mode), []).append(row)
    return [
        f"{dtype}, {mode}, {len(lost)}: "
        + ", ".join(f"{row.case} ({speedup(row):.2f})" for row in sorted(lost, key=speedup))
        for (dtype, mode), lost in kinds.items()
    ] or ["None."]


def _not_measured(result: Result) -> str:
    reasons = [f"`{rule.provider}`: {rule.reason}" for rule in VIEWS[result.device].left_out]
    reasons += [f"`{name}`: {reason}" for name, reason in result.skipped.items()]
    reasons += [gpu_report.unreached(result)] if result.not_measured else []
    first = [row.first_call_s or 0 for row in result.rows if row.provider == "compiled"]
    return (
        f"Not measured: {'; '.join(reasons)}. The first calls of `compiled`, which compile, took "
        f"{sum(first):.0f} s."
    )


def page(result: Result) -> str:
    """Every cell, in tables of shapes × tokens for each dtype, mode and activation."""
    view, floor = VIEWS[result.device], any(row.floor_us is not None for row in result.rows)
    parts = [
        f"# {result.device}: every cell of the grid",
        machine(result),
        f"Each cell: median {view.unit} of `{result.preferred}`, × the faster of `stacked` and "
        f"`compiled` ({LOST} where slower), {'floor in %' if floor else '% of the bare matmuls'}. "
        f"The other providers and the spread: [{result.name}.csv]({result.name}.csv). "
        f"{_not_measured(result)}",
        *([view.reading] if view.reading else []),
    ]
    found = {row.cell: row for row in result.rows if row.provider == result.preferred}
    dtypes = list(dict.fromkeys(row.dtype for row in result.rows))
    for dtype, mode, activation in itertools.product(dtypes, MODES, view.activations):
        lines = []
        for (D, H), (E, R) in itertools.product(view.widths, view.bottlenecks):
            names = (view.case(T, D, H, E, R, activation).name for T in view.tokens)
            cells = [_text(found.get((name, dtype, mode)), view.per_ms) for name in names]
            lines.append([f"D{D} H{H}", f"E{E} R{R}", *cells])
        columns = ["widths", "adapters", *(f"T {T}" for T in view.tokens)]
        parts += [f"## {dtype}, {mode}, {activation}", markdown(columns, lines, text_columns=2)]
    return "\n\n".join(parts) + "\n"


def _text(row: Row | None, per_ms: float = 1) -> str:
    if row is None or (row.error is None and speedup(row) is None):
        return "–"
    if row.error:
        return "refused"
    mark = f" {LOST}" if loses(row) else ""
    share = row.share_of_matmuls if row.floor_us is None else share_of_floor(row)
    time = number(per_ms * (row.graph_ms or row.median_ms))
    return f"{time} · {speedup(row):.2f}{mark} · {100 * share:.0f} %"


def print_grid(result: Result, console: Console) -> None:
    """Targets and means, and the cells if they are few."""
    found = []
    rows = ours(result)
    if len(result.cells()) <= MOST_PRINTED:
        last = "% of matmuls" if all(row.floor_us is None for row in rows) else _OF_FLOOR
        table = rich_table("Cells", (*CELL_COLUMNS, last), 3)
        for cells in result.cells():
            table.add_row(*_cell_line(result, cells), style="red" if _is_lost(cells) else None)
        found.append(table)
    if rows:
        found.append(target_table(TARGET_COLUMNS, target_cells(result)))
        columns = band_columns(rows)[:-1]
        means = rich_table(f"Geometric means (range, cells lost {LOST})", columns, 3)
        for line in band_cells(rows, VIEWS[result.device].bands):
            means.add_row(*line[: len(columns)])
        found.append(means)
    print_tables(found, result, console)
    for text in (gpu_report.measured(result), gpu_report.unreached(result)):
        if text:
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _is_lost(cells: Iterable[Row]) -> bool:
    return any(loses(row) for row in cells if row.group == grid.GROUP)


def _cell_line(result: Result, cells: Iterable[Row]) -> list[str]:
    rows = {row.provider: row for row in cells}
    first = next(iter(rows.values()))
    names = ("loop", "stacked", "compiled", result.preferred, "matmuls")
    times = [
        "–" if n not in rows else "refused" if rows[n].error else number(rows[n].median_ms)
        for n in names
    ]
    mine = rows.get(result.preferred)
    text = _text(mine) if mine and not mine.error else "–"
    ratios = text.split(" · ")[1:] if text != "–" else ["–", "–"]
    return [first.case, first.dtype, first.mode, *times, *ratios]
