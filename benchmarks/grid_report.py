# SPDX-License-Identifier: Apache-2.0
"""What a run of the grid says: the targets, means over bands of tokens, and every cell.

Texts for the terminal and for `report.py`; what a target is: `grid_targets.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from cases import MODES
from grid import ACTIVATIONS, BOTTLENECKS, LEFT_OUT, OURS, TOKENS, WIDTHS, grid_case
from grid_targets import TARGETS, loses, ours, speedup
from records import Result, Row, geometric_mean
from rich.console import Console
from tables import LOST, machine, markdown, number, print_tables, rich_table

BANDS: dict[str, Callable[[int], bool]] = {
    "T ≥ 512": lambda T: T >= 512,
    "T = 128": lambda T: T == 128,
    "T ≤ 32": lambda T: T <= 32,
}
WORST = 3  # cells named beside a mean
MOST_PRINTED = 100  # cells in the terminal

TARGET_COLUMNS = ("where", "what", "target", "cells", "found", "worst cell", "reached")
BAND_COLUMNS = ("dtype", "mode", "tokens", "cells", "× faster", "× loop", "% of matmuls", "worst")
CELL_COLUMNS = (
    "case", "dtype", "mode", "loop ms", "stacked ms", "compiled ms", "ours ms", "matmuls ms",
    "× faster", "% of matmuls",
)  # fmt: skip


def target_cells(result: Result) -> list[list[str]]:
    """A line of `TARGET_COLUMNS` for each target; with a refused cell it is not reached."""
    lines = []
    for target in TARGETS:
        kept = [row for row in ours(result) if target.keep(row)]
        refused = [row for row in ours(result, refused=True) if target.keep(row)]
        count = f"{len(kept)}, {len(refused)} refused" if refused else str(len(kept))
        bound = f"{'≤' if target.at_most else '≥'} {target.bound:.2f}"
        found = worst = "–"
        if kept:
            found, row = f"{target.found(kept):.2f}", target.worst(kept)
            worst = f"{target.value(row):.2f} {row.case}, {row.mode}"
        reached = "**no**" if refused or (kept and not target.reached(kept)) else "yes"
        reached = reached if kept or refused else "not measured"
        lines.append([target.where, target.what, bound, count, found, worst, reached])
    return lines


# --- means over bands ----------------------------------------------------------------------------


def band_cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line of `BAND_COLUMNS` for each dtype, mode and band that has cells."""
    lines = []
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for dtype, mode, (name, holds) in itertools.product(dtypes, MODES, BANDS.items()):
        kept = [row for row in rows if (row.dtype, row.mode) == (dtype, mode) and holds(row.T)]
        if not kept:
            continue
        shares = [100 * row.share_of_matmuls for row in kept]
        worst = sorted(kept, key=speedup)[:WORST]
        line = [dtype, mode, name, str(len(kept)), _spread([speedup(row) for row in kept])]
        line.append(_spread([row.speedup["loop"] for row in kept if "loop" in row.speedup]))
        line.append(f"{geometric_mean(shares):.0f} ({min(shares):.0f}–{max(shares):.0f})")
        line.append("; ".join(f"{speedup(row):.2f} {row.case}" for row in worst))
        lines.append(line)
    return lines


def _spread(ratios: Sequence[float]) -> str:
    """Geometric mean, range, and how many are lost."""
    if not ratios:
        return "–"
    lost = sum(round(ratio, 2) < 1 for ratio in ratios)
    remark = f", {lost} {LOST}" if lost else ""
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}{remark})"


# --- pages ---------------------------------------------------------------------------------------


def grid_plot_name(result: Result) -> str:
    """The picture of `plots.plot_grid`."""
    return f"{result.device}-grid-heatmap.png"


def page_name(result: Result) -> str:
    """The file of `page`."""
    return f"{result.device}-grid.md"


def section(result: Result) -> list[str]:
    """The paragraphs for `results/README.md`."""
    parts = [f"## {result.device}: the grid of the kernels' targets", machine(result)]
    rows = ours(result)
    if not rows:
        return [*parts, f"`{OURS}` was not measured: {result.skipped.get(OURS, 'refused')}."]
    parts += ["### Targets", markdown(TARGET_COLUMNS, target_cells(result), text_columns=2)]
    parts += _refused(result)
    parts += ["### Means of the grid", _READING, markdown(BAND_COLUMNS, band_cells(rows), 3)]
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
    reasons = [f"`{rule.provider}`: {rule.reason}" for rule in LEFT_OUT]
    reasons += [f"`{name}`: {reason}" for name, reason in result.skipped.items()]
    first = [row.first_call_s or 0 for row in result.rows if row.provider == "compiled"]
    return (
        f"Not measured: {'; '.join(reasons)}. The first calls of `compiled`, which compile, took "
        f"{sum(first):.0f} s."
    )


def page(result: Result) -> str:
    """Every cell, in tables of shapes × tokens for each dtype, mode and activation."""
    parts = [
        f"# {result.device}: every cell of the grid",
        machine(result),
        f"Each cell: median ms of `{OURS}`, × the faster of `stacked` and `compiled` ({LOST} where "
        f"slower), % of the bare matmuls. The other providers and the spread: [{result.name}.csv]"
        f"({result.name}.csv). {_not_measured(result)}",
    ]
    found = {row.cell: row for row in result.rows if row.provider == OURS}
    dtypes = list(dict.fromkeys(row.dtype for row in result.rows))
    for dtype, mode, activation in itertools.product(dtypes, MODES, ACTIVATIONS):
        lines = []
        for (D, H), (E, R) in itertools.product(WIDTHS, BOTTLENECKS):
            names = (grid_case(T, D, H, E, R, activation).name for T in TOKENS)
            cells = [_text(found.get((name, dtype, mode))) for name in names]
            lines.append([f"D{D} H{H}", f"E{E} R{R}", *cells])
        columns = ["widths", "adapters", *(f"T {T}" for T in TOKENS)]
        parts += [f"## {dtype}, {mode}, {activation}", markdown(columns, lines, text_columns=2)]
    return "\n\n".join(parts) + "\n"


def _text(row: Row | None) -> str:
    if row is None or (row.error is None and speedup(row) is None):
        return "–"
    if row.error:
        return "refused"
    mark = f" {LOST}" if loses(row) else ""
    share = f"{100 * row.share_of_matmuls:.0f} %"
    return f"{number(row.median_ms)} · {speedup(row):.2f}{mark} · {share}"


def print_grid(result: Result, console: Console) -> None:
    """Targets and means, and the cells if they are few."""
    found = []
    if len(result.cells()) <= MOST_PRINTED:
        table = rich_table("Cells", CELL_COLUMNS, 3)
        for cells in result.cells():
            table.add_row(*_cell_line(cells), style="red" if any(map(loses, cells)) else None)
        found.append(table)
    rows = ours(result)
    for title, columns, lines, text_columns in (
        ("Targets", TARGET_COLUMNS, target_cells(result), 2),
        (f"Geometric means (range, cells lost {LOST})", BAND_COLUMNS[:-1], band_cells(rows), 3),
    ):
        table = rich_table(title, columns, text_columns)
        for line in lines:
            table.add_row(*(cell.replace("**", "") for cell in line[: len(columns)]))
        found += [table] if rows else []
    print_tables(found, result, console)


def _cell_line(cells: Iterable[Row]) -> list[str]:
    rows = {row.provider: row for row in cells}
    first = next(iter(rows.values()))
    names = ("loop", "stacked", "compiled", OURS, "matmuls")
    times = [
        "–" if n not in rows else "refused" if rows[n].error else number(rows[n].median_ms)
        for n in names
    ]
    mine = rows.get(OURS)
    _, *ratios = _text(mine).split(" · ") if mine and not mine.error else ("", "–", "–")
    return [first.case, first.dtype, first.mode, *times, *ratios]
