# SPDX-License-Identifier: Apache-2.0
"""What a run of the Poly suite says: the targets, and a table for layers and for models."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from poly_cases import COMPILED, FORWARD, GENERATE, MANY, OURS, PEFT, STEP
from poly_records import LAYER, MODEL, PolyRow
from records import Result, Row
from rich.console import Console
from rich.text import Text
from tables import LOST, machine, markdown, mean_and_range, number, print_tables, rich_table
from targets import TARGET_COLUMNS, Target, target_lines, target_table

ADDED = f"{PEFT} added"
COLUMNS = (
    "case", "dtype", "mode", "contender", "ms", "20–80 %", "added %", "× peft", "added × peft",
    "× compiled", "peak MiB", "deviation",
)  # fmt: skip
SUMMARY_COLUMNS = ("what", "dtype", "mode", "cells", "× peft")
READING = (
    "Base layer or model included. added: time beyond the frozen layer or model alone, over its "
    "time; added × peft: peft's added time over ours. × peft, × compiled: how many times faster "
    f"than peft's layer, and than its arithmetic under torch.compile ({LOST}: slower). deviation: "
    "the largest relative difference to peft in float64. Adapters have the dtype of the model."
)
TITLES = {LAYER: "One layer of T5-base", MODEL: "T5-base, adapters at q and v"}


def _speedup(row: Row) -> float:
    return row.speedup.get(PEFT, math.nan)


def _added(row: Row) -> float:
    return row.speedup.get(ADDED, math.nan)


def targets(result: Result) -> tuple[Target, ...]:
    """At least as fast everywhere, twice where there are many skills; no more memory."""
    others: dict[tuple[str, ...], Any] = {(*row.cell, row.provider): row for row in result.rows}

    def memory(row: Row) -> float:
        theirs, own = (others[(*row.cell, n)].peak_memory_mib for n in (PEFT, OURS))
        return own / theirs if theirs and own is not None else math.nan

    def group(name: str, mode: str | None = None) -> Any:
        return lambda row: row.group == name and mode in (None, row.mode)

    def many(row: Row) -> bool:
        return row.E >= MANY

    every: Any = {"every_cell": True}
    where = f"{MANY} skills or more"
    return (
        *(Target(f"one layer, {mode}", "× peft", 1.0, group(LAYER, mode), _speedup, **every)
          for mode in (FORWARD, STEP)),
        *(Target(f"T5-base, {mode}", "× peft", 1.0, group(MODEL, mode), _speedup, **every)
          for mode in (FORWARD, STEP, GENERATE)),
        Target(where, "× peft", 2.0, many, _speedup, **every),
        Target(where, "peft's added time / ours", 2.0, many, _added, **every),
        Target("everywhere", "peak memory / peft's", 1.0, lambda row: row.mode != GENERATE, memory,
               every_cell=True, at_most=True),
    )  # fmt: skip


def target_cells(result: Result) -> list[list[str]]:
    """A line of `TARGET_COLUMNS` for each target."""
    return target_lines(targets(result), result, lambda row: f"{row.case}, {row.dtype}, {row.mode}")


def summary_cells(result: Result) -> list[list[str]]:
    """A line of `SUMMARY_COLUMNS` for layers and for models, per dtype and mode.

    A cell counts where peft and ours were both timed; how often either was refused stands beside.
    """
    pools: dict[tuple[str, str, str], list[Row]] = {}
    for title, rows in _groups(result):
        for row in rows:
            pools.setdefault((title, row.dtype, row.mode), []).append(row)
    lines = []
    for key, pool in pools.items():
        ratios = [row.speedup[PEFT] for row in pool if row.provider == OURS and PEFT in row.speedup]
        refused = Counter(row.provider for row in pool if row.error)
        reasons = [f"{name} {refused[name]}" for name in (PEFT, OURS) if refused[name]]
        remark = f"; refused: {', '.join(reasons)}" if reasons else ""
        lines.append([*key, f"{len(ratios)}{remark}", mean_and_range(ratios)])
    return lines


def row_cells(row: PolyRow) -> list[str]:
    """One text per column of `COLUMNS`."""
    name = row.provider if row.impl is None else f"{row.provider} ({row.impl})"
    head = [row.case, row.dtype, row.mode, name]
    if row.error:
        return [*head, f"refused: {row.error}", *[""] * (len(COLUMNS) - 5)]
    spread = "–" if row.p20_ms is None else f"{number(row.p20_ms)}–{number(row.p80_ms)}"

    def against(baseline: str) -> str:
        if row.provider != OURS or baseline not in row.speedup:
            return "–"
        return f"{row.speedup[baseline]:.2f}{f' {LOST}' if row.loses_to(baseline) else ''}"

    added = "–" if row.added is None else f"{100 * row.added:.1f}"
    deviation = "–" if row.deviation is None else f"{row.deviation:.0e}"
    ratios = (against(PEFT), against(ADDED), against(COMPILED))
    return [*head, number(row.median_ms), spread, added, *ratios,
            number(row.peak_memory_mib), deviation]  # fmt: skip


def _groups(result: Result) -> list[tuple[str, list[PolyRow]]]:
    rows: list[PolyRow] = result.rows  # type: ignore[assignment]
    found = [(TITLES[name], [row for row in rows if row.group == name]) for name in TITLES]
    return [group for group in found if group[1]]


def section(result: Result) -> list[str]:
    """The part of `results/README.md` on this run, in paragraphs."""
    parts = [f"## {result.device}: Poly and MHR against peft", machine(result), "### Poly: targets"]
    parts += [markdown(TARGET_COLUMNS, target_cells(result), text_columns=2), READING]
    for title, rows in _groups(result):
        parts += [f"### {title}", markdown(COLUMNS, map(row_cells, rows), text_columns=4)]  # type: ignore[arg-type]
    return parts


def print_poly(result: Result, console: Console) -> None:
    """Targets and all tables."""
    shown = []
    for title, rows in _groups(result):
        table = rich_table(title, COLUMNS, text_columns=4)
        for row in rows:
            cells = row_cells(row)
            if row.error:  # in full below the tables
                cells[4] = "refused"
            lost = row.error or row.loses_to(PEFT)
            table.add_row(*map(Text, cells), style="red" if lost else None)
        shown.append(table)
    reached = target_table(TARGET_COLUMNS, target_cells(result))
    print_tables([*shown, reached], result, console)
