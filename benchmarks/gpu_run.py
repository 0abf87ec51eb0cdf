# SPDX-License-Identifier: Apache-2.0
"""Measure the grid of `gpu_grid.py` within a budget of seconds, in its order of priority.

What is measured is saved after every shape; what the budget does not reach is listed. A process
that loses the device is followed by another one. Started by `bench_adapter_mixture.py --suite grid
--device cuda`; one shape: `gpu_cell.py`, files: `grid_records.py`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

from compile_ahead import compile_ahead
from gpu_cell import COMPILED, Bench, Budget, DeviceLost, contenders
from gpu_grid import CONTENDERS, OURS
from gpu_measure import rates
from grid import SUITE, Cell
from grid_records import DRY_SUITE, SHORTENED_SUITE, cells_of, save
from grid_run import CannotResume, resumed
from measure import GPU_CELL_S, QUICK_GPU_CELL_S
from providers import Provider
from records import Result, nvidia_smi
from rich.console import Console

BUDGET_S, QUICK_BUDGET_S = 500.0, 90.0
AHEAD_SHARE = 0.25  # of the budget at most, for the kernels that are compiled ahead
PROGRESS_S = 10.0
MOST_RESTARTS = 4


class Restart(Exception):
    """Another process has to go on with the file, for so many seconds."""

    def __init__(self, path: Path, budget_s: float) -> None:
        super().__init__(str(path))
        self.path, self.budget_s = path, budget_s


def units(cells: list[Cell]) -> list[list[Cell]]:
    """The cells in their order; neighbours of one case share a unit."""
    return [list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell[0])]


def _take_up(fresh: Result, options: argparse.Namespace) -> Result:
    """The result in the file to resume; what lacks only the compiled baseline is measured again.

    After a restart everything that has rows stays: it would break the device again.
    """
    old = resumed(fresh, options.resume, keep_refused=bool(options.restarts))
    lacking = {tuple(note[:3]) for note in old.not_measured if note[3] == COMPILED}
    lacking = set() if options.restarts else lacking
    old.rows = [row for row in old.rows if row.cell not in lacking]
    old.partial, done = True, cells_of(old)
    old.not_measured = [note for note in old.not_measured if tuple(note[:3]) in done]
    return old


def _fresh(
    options: argparse.Namespace,
    stamp: dict[str, object],
    found: list[Provider],
    skipped: dict[str, str],
) -> Result:
    """A result without rows."""
    cell_s = QUICK_GPU_CELL_S if options.quick else GPU_CELL_S
    shortened = options.quick or options.rounds is not None
    has_ours = any(provider.name == OURS for provider in found)
    return Result(
        device="cuda",
        environment=stamp | {"cell_s": cell_s, "rounds": options.rounds},
        partial=True,
        # A dry run has to have something to report.
        preferred=OURS if has_ours or not options.dry_run else "ours-torch",
        skipped={name: reason for name, reason in skipped.items() if name in CONTENDERS},
        rows=[],
        suite=DRY_SUITE if options.dry_run else SHORTENED_SUITE if shortened else SUITE,
    )


def run(
    options: argparse.Namespace,
    stamp: dict[str, object],
    providers: list[Provider],
    skipped: dict[str, str],
    console: Console,
) -> tuple[Result, Path]:
    """Measure the cells of the options until the budget ends; returns where the result is.

    Raises:
        CannotResume: The file to go on with was measured under other conditions.
        Restart: The device is lost, another process has to go on.
    """
    device = "cpu" if options.dry_run else "cuda"
    total_s = options.budget_s or (QUICK_BUDGET_S if options.quick else BUDGET_S)
    budget, started = Budget(total_s), time.perf_counter()
    found, missing = contenders(providers, device)
    result = _fresh(options, stamp, found, skipped | missing)
    partial = options.out / f"{result.name}.json"
    if options.resume:
        result = _take_up(result, options)
    elif partial.exists() and result.suite == SUITE:
        raise CannotResume(f"{partial} exists: go on with --resume {partial}, or remove it")
    done = cells_of(result)
    cells = [cell for cell in options.cells if (cell[0].name, *cell[1:]) not in done]
    console.print(f"{len(cells)} cells, {total_s:.0f} s", highlight=False)
    measured = result.environment["measured"] = {"budget_s": total_s}
    if device == "cuda":
        if any(provider.name == OURS for provider in found) and not options.restarts:
            try:
                said = compile_ahead(cells, OURS, device, limit_s=AHEAD_SHARE * total_s)
            except OSError as error:  # then each kernel is compiled when it is first called
                said = f"nothing was compiled ahead: {error}"
            console.print(said, highlight=False, markup=False)
        measured |= rates(device)
        measured["clocks"] = nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")
    rounds, cell_s = options.rounds, result.environment["cell_s"]
    bench = Bench(found, device, str(stamp["gpu"]), budget, rounds=rounds, cell_s=cell_s)
    may_restart = options.restarts < MOST_RESTARTS
    path = _measure(bench, result, cells, budget, options.out, console, may_restart=may_restart)
    measured["seconds"] = round(time.perf_counter() - started, 1)
    if result.suite != SUITE or options.only:
        return result, save(result, options.out)
    result.partial = False
    done_path = save(result, options.out)
    for leftover in (path, path.with_suffix(".csv")):
        leftover.unlink(missing_ok=True)
    return result, done_path


def _measure(
    bench: Bench,
    result: Result,
    cells: list[Cell],
    budget: Budget,
    out: Path,
    console: Console,
    *,
    may_restart: bool,
) -> Path:
    """Fills the result, unit by unit; the path of the partial file."""
    path = out / f"{result.name}.json"
    kept = result.not_measured
    todo = units(cells)
    shown = -PROGRESS_S
    started = time.perf_counter()

    def write(rest: list[list[Cell]], reason: str) -> None:
        left = [[case.name, dtype, mode, "", reason] for unit in rest for case, dtype, mode in unit]
        result.not_measured = [*kept, *bench.notes, *left]
        save(result, out)

    for i, unit in enumerate(todo):
        if budget.left_s() <= 0:
            write(todo[i:], "not reached within the budget")
            console.print(f"the budget ends: {len(todo) - i} shapes are left", highlight=False)
            return path
        try:
            rows = bench.unit(unit)
        except DeviceLost as lost:
            result.rows += lost.rows
            untold = [row for row in lost.rows if row.median_ms is None and row.error is None]
            bench.notes += [[*row.cell, row.provider, "the device was lost"] for row in untold]
            touched = {row.cell for row in lost.rows}
            rest = [cell for cell in unit if (cell[0].name, *cell[1:]) not in touched]
            write([rest, *todo[i + 1 :]], "the device was lost")
            errors = [f"{row.provider}: {row.error}" for row in lost.rows if row.error]
            told = f"{unit[0][0].name}: the device was lost; {'; '.join(errors[-1:])}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
            if may_restart:
                raise Restart(path, budget.left_s()) from lost
            return path
        result.rows += rows
        write(todo[i + 1 :], "the run was stopped")
        refused = sorted({row.provider for row in rows if row.error})
        passed = time.perf_counter() - started
        if refused or passed - shown > PROGRESS_S or i + 1 == len(todo):
            shown = passed
            remark = f"; refused: {', '.join(refused)}" if refused else ""
            console.print(
                f"[{i + 1}/{len(todo)}] {unit[0][0].name}, {unit[-1][2]}: {passed:.0f} s, "
                f"{budget.left_s():.0f} s left{remark}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
    write([], "")
    return path
