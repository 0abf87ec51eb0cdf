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
from pathlib import Path

from grid import CELLS, CONTENDERS, SUITE, grid_case
from records import BASELINES, OURS_PREFIX, Result, Row, new_row, newest

# Of a run that was shortened (`--quick`, `--rounds`): never taken for the real one.
SHORTENED_SUITE = f"{SUITE}-quick"

_SHAPE = ("D", "H", "E", "R", "activation", "T", "dtype", "mode")
_TIMES = {"median_ms": "ms", "p20_ms": "20 %", "p80_ms": "80 %", "first_call_s": "first s"}
_MATMULS = "matmuls"
_PROVIDERS = (*CONTENDERS, _MATMULS)
_STAMP = ("date", "commit", "cpu", "torch")

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
    head = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "rows"}
    refused = [[*row.cell, row.provider, row.error] for row in result.rows if row.error]
    columns = _columns(result)
    lines = [_line(rows, columns) for rows in result.cells()]
    text = json.dumps(head | {"refused": refused, "columns": columns}, indent=1).removesuffix("\n}")
    cells = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    _replace(path, f'{text},\n "cells": [\n{cells}\n ]\n}}\n')
    stamp = [result.environment[key] for key in _STAMP]
    table = path.with_suffix(".csv.new")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([[*columns, *_STAMP], *([*line, *stamp] for line in lines)])
    table.replace(path.with_suffix(".csv"))
    return path


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".json.new")
    beside.write_text(text)
    beside.replace(path)


def _columns(result: Result) -> list[str]:
    columns = [*_SHAPE, "rounds"]
    for provider in _PROVIDERS:
        rows = [row for row in result.rows if row.provider == provider]
        columns += [
            f"{provider} {unit}"
            for field, unit in _TIMES.items()
            if any(getattr(row, field) is not None for row in rows)
        ]
        columns += [f"{provider} × {b}" for b in BASELINES if any(b in row.speedup for row in rows)]
        if any(row.share_of_matmuls is not None for row in rows):
            columns.append(f"{provider} × {_MATMULS}")
    return columns


def _line(rows: list[Row], columns: list[str]) -> list[Value]:
    """The values of one cell, in the order of the columns."""
    values: dict[str, Value] = {name: getattr(rows[0], name) for name in _SHAPE}
    values["rounds"] = max(row.rounds for row in rows)
    for row in rows:
        for field, unit in _TIMES.items():
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
    rows = []
    for line in lines:
        rows += _rows(dict(zip(columns, line, strict=True)), errors)
    return Result(**values, rows=rows)


def _rows(values: dict[str, Value], errors: dict) -> list[Row]:
    """The rows of one cell, without providers that were left out of it."""
    D, H, E, R, activation, T, dtype, mode = (values[name] for name in _SHAPE)
    case = grid_case(T, D, H, E, R, activation)
    rows = []
    for provider in _PROVIDERS:
        row = new_row(case, dtype, mode, provider)
        row.error = errors.get((*row.cell, provider))
        for field, unit in _TIMES.items():
            setattr(row, field, values.get(f"{provider} {unit}"))
        if row.median_ms is None and row.error is None:
            continue
        row.rounds = 0 if row.error else values["rounds"]
        if provider.startswith(OURS_PREFIX):
            ratios = {b: values.get(f"{provider} × {b}") for b in BASELINES}
            row.speedup = {b: ratio for b, ratio in ratios.items() if ratio is not None}
            row.share_of_matmuls = values.get(f"{provider} × {_MATMULS}")
        rows.append(row)
    return rows


def newest_grid(folder: Path) -> dict[str, Result]:
    """The latest complete run of the grid on each device, by device."""
    return newest(folder, SUITE, load)
