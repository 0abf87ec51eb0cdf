# SPDX-License-Identifier: Apache-2.0
"""The tables: the same cells of text for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from records import BASELINES, Result, Row, Summary, geometric_mean, summaries
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOST = "▼"  # ours is slower than the baseline of the column
COLUMNS = (
    "provider", "ms", "20–80 %", "min", "TFLOP/s", "GB/s", "% of matmuls", "peak MiB", "first s",
    *(f"× {baseline}" for baseline in BASELINES),
)  # fmt: skip
SUMMARY_COLUMNS = (
    "implementation", "dtype", "mode", "cells", *(f"× {baseline}" for baseline in BASELINES),
)  # fmt: skip


def number(value: float | None) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    if 0 < abs(value) < 0.01:
        return f"{value:.4f}" if abs(value) >= 0.0001 else "<0.0001"
    return f"{value:.{digits}f}"


def mean_and_range(ratios: Sequence[float]) -> str:
    """Geometric mean, range, and how many are lost."""
    if not ratios:
        return "–"
    lost = sum(round(ratio, 2) < 1 for ratio in ratios)
    remark = f", {lost} {LOST}" if lost else ""
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}{remark})"


def _ratio(row: Row, baseline: str) -> str:
    if baseline not in row.speedup:
        return "–"
    return f"{row.speedup[baseline]:.2f}{' ' + LOST if row.loses_to(baseline) else ''}"


def row_cells(row: Row) -> list[str]:
    """One text per column of `COLUMNS`; a refused provider shows why."""
    if row.error:
        return [row.provider, f"refused: {row.error}", *[""] * (len(COLUMNS) - 2)]
    spread = "–" if row.p20_ms is None else f"{number(row.p20_ms)}–{number(row.p80_ms)}"
    share = "–" if row.share_of_matmuls is None else f"{100 * row.share_of_matmuls:.0f}"
    return [
        row.provider,
        number(row.median_ms),
        spread,
        number(row.min_ms),
        number(row.tflop_s),
        number(row.bandwidth_gb_s),
        share,
        number(row.peak_memory_mib),
        number(row.first_call_s),
        *(_ratio(row, baseline) for baseline in BASELINES),
    ]


def cell_title(row: Row) -> str:
    """Shape, dtype and mode in words."""
    return (
        f"{row.case} · {row.dtype} · {row.mode} (T={row.T}, E={row.E}, R={row.R}, D={row.D}, "
        f"H={row.H}, gate {row.gate}, {row.activation})"
    )


def summary_cells(result: Result, found: list[Summary] | None = None) -> list[list[str]]:
    """Rows for `SUMMARY_COLUMNS`: geometric mean, range, and how many cells are lost."""
    found = summaries(result) if found is None else found
    rows: dict[tuple[str, str, str], dict[str, Summary]] = {}
    for summary in found:
        key = (summary.provider, summary.dtype, summary.mode)
        rows.setdefault(key, {})[summary.baseline] = summary
    return [
        [
            *key,
            str(max(s.cells for s in against.values())),
            *(_summary(against.get(b)) for b in BASELINES),
        ]
        for key, against in rows.items()
    ]


def _summary(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    lost = f", {summary.lost} {LOST}" if summary.lost else ""
    return f"{summary.mean:.2f} ({summary.worst:.2f}–{summary.best:.2f}{lost})"


def host_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the price of a call in microseconds, per dtype and mode."""
    rows = [row for row in result.rows if row.group == "host"]
    kinds = list(dict.fromkeys((row.dtype, row.mode) for row in rows))
    times: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        text = "refused" if row.median_ms is None else number(1e3 * row.median_ms)
        times.setdefault(row.provider, {})[row.dtype, row.mode] = text
    columns = ["provider", *(f"µs {dtype} {mode}" for dtype, mode in kinds)]
    return columns, [[name, *(t.get(k, "–") for k in kinds)] for name, t in times.items()]


def machine(result: Result) -> str:
    """One line: where, with what, which commit, when."""
    e = result.environment
    versions = {"driver": e.get("driver"), "CUDA": e["cuda"], "Triton": e.get("triton")}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gpu = f"{e['gpu']}, {known}; " if result.device == "cuda" and e["gpu"] else ""
    dirty = " with uncommitted changes" if e["dirty"] else ""
    commit = f"commit {e['commit']}{dirty}" if e["commit"] else "no commit known"
    return (
        f"{gpu}{e['cpu']} ({e['cpu_capability']}), {e['threads']} threads; torch {e['torch']}, "
        f"Python {e['python']}, pemt_fast {e['pemt_fast']}; {commit}; {str(e['date'])[:10]}"
    )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; all but the first columns are aligned to the right."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(columns))]
    escaped = ([str(cell).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *escaped))


def rich_table(title: str, columns: Sequence[str], text_columns: int = 1) -> Table:
    """An empty table for the terminal; all but the first columns are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        justify = "left" if i < text_columns else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    return table


def print_result(result: Result, console: Console) -> None:
    """All cells, the price of a call, and the geometric means."""
    table = rich_table("Ratios above 1: faster than the baseline of the column", COLUMNS)
    for rows in result.cells():
        table.add_row(Text(rows[0].case, style="bold"), rows[0].dtype, rows[0].mode)
        for row in rows:
            lost = any(row.loses_to(baseline) for baseline in BASELINES)
            cells = row_cells(row)
            if row.error:  # in full below the tables
                cells[1] = "refused"
            table.add_row(*map(Text, cells), style="red" if row.error or lost else None)
        table.add_section()
    host_columns, host_rows = host_table(result)
    host = rich_table("Host time of a call with next to no work", host_columns)
    for cells in host_rows:
        host.add_row(*cells)
    means = rich_table(f"Geometric means (range, cells lost {LOST})", SUMMARY_COLUMNS, 3)
    for cells in summary_cells(result):
        means.add_row(*cells)
    print_tables((table, host, means), result, console)


def print_tables(tables: Sequence[Table], result: Result, console: Console) -> None:
    """Those that have rows, and the machine below."""
    # Piped output has no width of its own; a table that is cut says nothing.
    wide = console if console.is_terminal else Console(file=console.file, width=190)
    for table in tables:
        if table.row_count:
            wide.print(table)
    wide.print(machine(result), highlight=False, markup=False, soft_wrap=True)
