# SPDX-License-Identifier: Apache-2.0
"""What a run of the T5 suite says: the targets, a table per mode, the tail alone.

Texts for the terminal and for `report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from records import Result, Row
from rich.console import Console
from rich.text import Text
from t5_cases import FORWARD, GENERATE, MODES, OURS, STEP
from t5_records import MODEL, TAIL, T5Row
from tables import LOST, machine, markdown, number, print_tables, rich_table
from targets import TARGET_COLUMNS, Target, target_lines, target_table

COLUMNS = (
    "case", "dtype", "contender", "ms", "20–80 %", "added %", "mixture's FLOP %", "added / mixture",
    "added / all adapters", "× published", "× stacked", "peak MiB", "deviation",
)  # fmt: skip
TAIL_COLUMNS = (
    "case", "dtype", "contender", "ms", "20–80 %", "% of matmuls", "× published", "× stacked",
    "peak MiB", "deviation",
)  # fmt: skip
READING = (
    "added: time beyond plain T5, over the time of plain T5; beside it the operations of the "
    "mixture's matmuls over those of T5's, and the quotient of both, also with the operations of "
    "target adapter and loss. × published, × stacked: how many times faster than these "
    f"({LOST}: slower). deviation: the largest relative difference to float64."
)
TITLES = {
    FORWARD: "Forward, without labels and gradients",
    STEP: "A step: forward, both losses, backward",
    GENERATE: "Greedy generation of 32 tokens",
}


def _found(value: float | None) -> float:
    return math.nan if value is None else value  # a target cannot be reached by what is not known


def _speedup(row: Row) -> float:
    return _found(row.speedup.get("published"))


def _over_share(row: Any) -> float:
    return _found(row.over_share())


def _is(group: str, mode: str, dtype: str | None, *shapes: str) -> Callable[[Row], bool]:
    def keep(row: Row) -> bool:
        if (row.group, row.mode) != (group, mode) or dtype not in (None, row.dtype):
            return False
        return not shapes or row.case.startswith(shapes)

    return keep


def targets(result: Result) -> tuple[Target, ...]:
    """Those of the device; some compare ours with another row of the same cell."""
    others: dict[tuple[str, ...], Any] = {(*row.cell, row.provider): row for row in result.rows}

    def memory(row: Row) -> float:
        published, ours = (others[(*row.cell, n)].peak_memory_mib for n in ("published", OURS))
        return ours / published if published and ours else math.nan

    def less_added(row: Row) -> float:
        published, ours = (others[(*row.cell, n)].added for n in ("published", OURS))
        # Nothing added, by the noise of the machine, is infinitely less.
        return math.nan if None in (published, ours) else published / ours if ours > 0 else math.inf

    every = {"every_cell": True}
    if result.device == "cuda":
        large = ("t5-base", "t5-large")
        return (
            Target("t5-base and t5-large, step", "published's added time / ours", 2.0,
                   _is(MODEL, STEP, None, *large), less_added, **every),
        )  # fmt: skip
    base, over = "t5-base", "added time / mixture's FLOP"
    return (
        *(Target(f"{base}, step, {dtype}", "× published", bound, _is(MODEL, STEP, dtype, base),
                 _speedup, **every) for dtype, bound in (("fp32", 1.6), ("bf16", 2.0))),
        *(Target(f"{base}, {mode}", over, 1.15, _is(MODEL, mode, None, base),
                 _over_share, at_most=True, **every)
          for mode in (FORWARD, STEP)),
        *(Target(f"tail, {dtype}", "× published", bound, _is(TAIL, STEP, dtype), _speedup, **every)
          for dtype, bound in (("fp32", 1.8), ("bf16", 3.3))),
        Target("tail", "peak memory / published's", 0.2, _is(TAIL, STEP, None), memory,
               at_most=True, **every),
    )  # fmt: skip


def target_cells(result: Result) -> list[list[str]]:
    """A line of `TARGET_COLUMNS` for each target."""
    return target_lines(targets(result), result, lambda row: f"{row.case}, {row.dtype}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _speedups(row: T5Row) -> list[str]:
    cells = []
    for baseline in ("published", "stacked"):
        lost = f" {LOST}" if row.loses_to(baseline) else ""
        ratio = row.speedup.get(baseline)
        cells.append("–" if ratio is None else f"{ratio:.2f}{lost}")
    return cells


def row_cells(row: T5Row) -> list[str]:
    """One text per column of `COLUMNS`, or of `TAIL_COLUMNS` for a row of the tail."""
    columns = TAIL_COLUMNS if row.group == TAIL else COLUMNS
    name = row.provider if row.impl is None else f"{row.provider} ({row.impl})"
    head = [row.case, row.dtype, name]
    if row.error:
        return [*head, f"refused: {row.error}", *[""] * (len(columns) - 4)]
    spread = "–" if row.p20_ms is None else f"{number(row.p20_ms)}–{number(row.p80_ms)}"
    head += [number(row.median_ms), spread]
    deviation = "–" if row.deviation is None else f"{row.deviation:.0e}"
    last = [*_speedups(row), number(row.peak_memory_mib), deviation]
    if row.group == TAIL:
        return [*head, _percent(row.share_of_matmuls), *last]
    over = (row.over_share(), row.over_share(all_adapters=True))
    cells = [_percent(row.added), _percent(row.flop_share)]
    return [*head, *cells, *("–" if v is None else f"{v:.2f}" for v in over), *last]


def _tables(result: Result) -> list[tuple[str, tuple[str, ...], list[T5Row]]]:
    """Title, columns and rows of every table that has rows."""
    rows: list[T5Row] = result.rows  # type: ignore[assignment]
    layers = sorted({row.layers for row in rows if row.group == MODEL})
    cut = f"{', '.join(map(str, layers))} layers of encoder and decoder each"
    found: list[tuple[str, tuple[str, ...], list[T5Row]]] = [
        (f"{TITLES[mode]}; {cut}", COLUMNS,
         [r for r in rows if r.group == MODEL and r.mode == mode])
        for mode in MODES
    ]  # fmt: skip
    title = "The feed-forward tail alone: forward with the loss, backward"
    found.append((title, TAIL_COLUMNS, [r for r in rows if r.group == TAIL]))
    return [table for table in found if table[2]]


def section(result: Result) -> list[str]:
    """The part of `results/README.md` on this run, in paragraphs."""
    parts = [f"## {result.device}: PEMT's second stage on T5", machine(result), "### T5: targets"]
    parts += [markdown(TARGET_COLUMNS, target_cells(result), text_columns=2), READING]
    for title, columns, rows in _tables(result):
        cells = [row_cells(row) for row in rows]
        parts += [f"### {title}", markdown(columns, cells, text_columns=3)]
    return parts


def print_t5(result: Result, console: Console) -> None:
    """Targets and all tables."""
    shown = []
    for title, columns, rows in _tables(result):
        table = rich_table(title, columns, text_columns=3)
        for row in rows:
            lost = row.error or row.loses_to("published") or row.loses_to("stacked")
            cells = row_cells(row)
            if row.error:  # in full below the tables
                cells[3] = "refused"
            table.add_row(*map(Text, cells), style="red" if lost else None)
        shown.append(table)
    reached = target_table(TARGET_COLUMNS, target_cells(result))
    print_tables([*shown, reached], result, console)
