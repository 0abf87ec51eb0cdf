# SPDX-License-Identifier: Apache-2.0
"""What a run of the grid leaves behind: one short line per cell, as JSON and CSV.

In memory it is a `Result` like any other. In the files a cell is one line with all its providers:
the rows of `records.py` would take ten times the space. Numbers have four significant digits, and
only our own rows carry ratios.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import gpu_grid
from cases import Case
from grid import CELLS, CONTENDERS, SUITE, grid_case
from records import BASELINES, GRAPH, OURS_PREFIX, Result, Row, new_row, newest

# Of a run that was shortened (`--quick`, `--rounds`): never taken for the real one.
SHORTENED_SUITE = f"{SUITE}-quick"
DRY_SUITE = f"{SUITE}-dry"  # the grid of the GPU, on a CPU

_MATMULS = "matmuls"
_CELL = ("dtype", "mode")
_TIMES = {"median_ms": "ms", "p20_ms": "20 %", "p80_ms": "80 %", "first_call_s": "first s"}
_ON_A_GPU = {"graph_ms": "graph ms", "host_us": "host µs", "peak_memory_mib": "peak MiB"}
_FLOOR = "floor µs"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the files of one device's grid hold: the shape of a cell, providers, numbers."""

    shape: tuple[str, ...]
    case: Callable[..., Case]  # of the values of `shape`
    providers: tuple[str, ...]
    numbers: dict[str, str]  # field of a row -> unit in the name of its column
    ratios: tuple[str, ...]  # keys of `Row.speedup`
    stamp: tuple[str, ...]  # of the environment, for each line of the CSV


LAYOUTS = {
    "cpu": Layout(
        shape=("D", "H", "E", "R", "activation", "T"),
        case=grid_case,
        providers=(*CONTENDERS, _MATMULS),
        numbers=_TIMES,
        ratios=BASELINES,
        stamp=("date", "commit", "cpu", "torch"),
    ),
    "cuda": Layout(
        shape=("group", "D", "H", "E", "R", "T"),
        case=gpu_grid.device_case,
        providers=(*gpu_grid.CONTENDERS, _MATMULS),
        numbers=_TIMES | _ON_A_GPU,
        ratios=(*BASELINES, "grouped", *(b + GRAPH for b in BASELINES)),
        stamp=("date", "commit", "gpu", "driver", "cuda", "torch", "triton"),
    ),
}

Value = str | int | float | None


def cells_of(result: Result) -> set[tuple[str, str, str]]:
    """What has been measured: case, dtype, mode."""
    return {row.cell for row in result.rows}


def is_complete(result: Result) -> bool:
    """Whether every cell of the grid is there, at full length."""
    wanted = {(case.name, dtype, mode) for case, dtype, mode in CELLS}
    return result.suite == SUITE and wanted <= cells_of(result)


def save(result: Result, folder: Path) -> Path:
    """Write `<name>.json` and `<name>.csv`, each at once; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    layout = LAYOUTS[result.device]
    fields = [f.name for f in dataclasses.fields(result) if f.name not in ("rows", "not_measured")]
    head = {name: getattr(result, name) for name in fields}
    refused = [[*row.cell, row.provider, row.error] for row in result.rows if row.error]
    columns = _columns(result, layout)
    lines = [_line(rows, columns, layout) for rows in result.cells()]
    text = json.dumps(head | {"refused": refused, "columns": columns}, indent=1).removesuffix("\n}")
    tables = {"not_measured": result.not_measured} if result.not_measured else {}
    for name, table in (tables | {"cells": lines}).items():
        body = ",\n".join(json.dumps(line, separators=(",", ":")) for line in table)
        text += f',\n "{name}": [\n{body}\n ]'
    _replace(path, f"{text}\n}}\n")
    stamp = [result.environment[key] for key in layout.stamp]
    table = path.with_suffix(".csv.new")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([[*columns, *layout.stamp], *([*li, *stamp] for li in lines)])
    table.replace(path.with_suffix(".csv"))
    return path


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".json.new")
    beside.write_text(text)
    beside.replace(path)


def _columns(result: Result, layout: Layout) -> list[str]:
    columns = [*layout.shape, *_CELL, "rounds"]
    if any(row.floor_us is not None for row in result.rows):
        columns.append(_FLOOR)
    for provider in layout.providers:
        rows = [row for row in result.rows if row.provider == provider]
        columns += [
            f"{provider} {unit}"
            for field, unit in layout.numbers.items()
            if any(getattr(row, field) is not None for row in rows)
        ]
        columns += [
            f"{provider} × {b}" for b in layout.ratios if any(b in row.speedup for row in rows)
        ]
        if any(row.share_of_matmuls is not None for row in rows):
            columns.append(f"{provider} × {_MATMULS}")
    return columns


def _line(rows: list[Row], columns: list[str], layout: Layout) -> list[Value]:
    """The values of one cell, in the order of the columns."""
    first = rows[0]
    values: dict[str, Value] = {name: getattr(first, name) for name in (*layout.shape, *_CELL)}
    values["rounds"] = max(row.rounds for row in rows)
    values[_FLOOR] = _rounded(first.floor_us)
    for row in rows:
        for field, unit in layout.numbers.items():
            values[f"{row.provider} {unit}"] = _rounded(getattr(row, field))
        for baseline, ratio in row.speedup.items():
            values[f"{row.provider} × {baseline}"] = _rounded(ratio)
        values[f"{row.provider} × {_MATMULS}"] = _rounded(row.share_of_matmuls)
    return [values.get(column) for column in columns]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def load(path: Path) -> Result:
    """The inverse of `save`, to four digits; what the files leave out stays empty."""
    values = json.loads(path.read_text())
    columns, lines, refused = (values.pop(key) for key in ("columns", "cells", "refused"))
    errors = {tuple(key): error for *key, error in refused}
    layout = LAYOUTS[values["device"]]
    rows = []
    for line in lines:
        rows += _rows(dict(zip(columns, line, strict=True)), errors, layout)
    return Result(**values, rows=rows)


def _rows(values: dict[str, Value], errors: dict, layout: Layout) -> list[Row]:
    """The rows of one cell, without providers that were left out of it."""
    case = layout.case(**{name: values[name] for name in layout.shape})
    rows = []
    for provider in layout.providers:
        row = new_row(case, str(values["dtype"]), str(values["mode"]), provider)
        row.error = errors.get((*row.cell, provider))
        row.floor_us = values.get(_FLOOR)
        for field, unit in layout.numbers.items():
            setattr(row, field, values.get(f"{provider} {unit}"))
        if row.median_ms is None and row.error is None:
            continue
        row.rounds = 0 if row.error else values["rounds"]
        if provider.startswith(OURS_PREFIX):
            ratios = {b: values.get(f"{provider} × {b}") for b in layout.ratios}
            row.speedup = {b: ratio for b, ratio in ratios.items() if ratio is not None}
            row.share_of_matmuls = values.get(f"{provider} × {_MATMULS}")
        rows.append(row)
    return rows


def newest_grid(folder: Path) -> dict[str, Result]:
    """The latest complete run of the grid on each device, by device."""
    return newest(folder, SUITE, load)
