# SPDX-License-Identifier: Apache-2.0
"""Measure the grid of `grid.py`, one family after the other; what is measured is saved at once.

Differs from the operator's suite where 1 700 cells ask for it: one compilation serves all numbers
of tokens, of large cells only some tokens are compared with the oracle, rounds are fewer, memory is
not measured. Started by `bench_adapter_mixture.py --suite grid`; files: `grid_records.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import MODES
from checking import BASELINE_SLACK, Oracle
from grid import CONTENDERS, LOOP_SHARE, OURS, SUITE, Cell, estimated_s, families, left_out
from grid_records import SHORTENED_SUITE, cells_of, is_complete, load, save
from measure import (
    FEWEST_GRID_ROUNDS,
    GRID_CELL_S,
    QUICK_GRID_CELL_S,
    Runs,
    seconds_of,
    time_briefly,
)
from providers import (
    BOUND,
    Mixture,
    Provider,
    bare_matmuls,
    compile_stacked,
    mark_tokens,
    step,
)
from records import BASELINES, Result, Row, first_line, new_row
from rich.console import Console

from pemt_fast.timing import ratio

COMPARED_TOKENS = 512  # with the oracle, of cells that have more
COMPILED, LOOP = "compiled", "loop"
# Their first call compiles, or packs weights for the next one; checked is what the later calls do.
FIRST_DIFFERS = (COMPILED, OURS)


class CannotResume(Exception):
    """The file to go on with was measured under other conditions."""


def contenders(providers: list[Provider]) -> list[Provider]:
    """Those of the grid that can run; the compiler is asked for any number of tokens."""
    by_name = {provider.name: provider for provider in providers}
    found = [by_name[name] for name in CONTENDERS if name in by_name]
    return [
        dataclasses.replace(p, build=lambda: compile_stacked(any_tokens=True))
        if p.name == COMPILED
        else p
        for p in found
    ]


def measure_cell(
    oracle: Oracle,
    mode: str,
    functions: dict[str, Mixture],
    *,
    rounds: int | None,
    cell_s: float,
) -> list[Row]:
    """Check every function, then time the correct ones and the bare matmuls against each other."""
    case, dtype = oracle.case, oracle.dtype
    inputs = oracle.inputs(mode)
    rows, runs = {}, {}
    for name, function in functions.items():
        if left_out(name, case):
            continue
        row = rows[name] = new_row(case, dtype, mode, name)
        run = step(inputs, function)
        try:
            if name in FIRST_DIFFERS:
                row.first_call_s = seconds_of(run, "cpu")
            oracle.check(function, mode, slack=1 if name == OURS else BASELINE_SLACK)
        except Exception as error:  # whatever a provider raises belongs into its row
            row.error = first_line(error)
            continue
        runs[name] = run
    rows[BOUND] = new_row(case, dtype, mode, BOUND)
    runs[BOUND] = bare_matmuls(inputs, mode)
    fill(rows, runs, rounds=rounds, cell_s=cell_s)
    return list(rows.values())


def fill(rows: dict[str, Row], runs: Runs, *, rounds: int | None, cell_s: float) -> None:
    """Time the runs and write times and our ratios into their rows.

    The loop has rounds of its own, shared with ours alone: among the others its many temporaries
    would slow down whoever runs after it.
    """
    together = {name: run for name, run in runs.items() if name != LOOP}
    seconds = time_briefly(together, rounds=rounds, cell_s=cell_s)
    for name in together:
        rows[name].set_times(seconds[name])
    ours = rows[OURS] if OURS in runs else None
    if ours:
        ours.speedup = {b: ratio(seconds, b, OURS) for b in BASELINES if b in seconds}
        ours.share_of_matmuls = ratio(seconds, BOUND, OURS)
    if LOOP in runs:
        pair = {name: run for name, run in runs.items() if name in (LOOP, OURS)}
        seconds = time_briefly(pair, rounds=rounds, cell_s=LOOP_SHARE * cell_s)
        rows[LOOP].set_times(seconds[LOOP])
        if ours:
            ours.speedup = {LOOP: ratio(seconds, LOOP, OURS)} | ours.speedup


def measure_family(
    family: list[Cell], providers: list[Provider], *, rounds: int | None, cell_s: float
) -> list[Row]:
    """All cells of one shape and dtype; they share inputs, oracle and compiled code."""
    oracles = {
        case: Oracle(case, dtype, "cpu", most_tokens=COMPARED_TOKENS, prepare=mark_tokens)
        for case, dtype, _ in family
    }
    rows = []
    for mode in MODES:
        torch._dynamo.reset()  # guards of other modes would be evaluated at every call
        functions = {provider.name: provider.build() for provider in providers}
        for case, _, _ in (cell for cell in family if cell[2] == mode):
            rows += measure_cell(oracles[case], mode, functions, rounds=rounds, cell_s=cell_s)
    return rows


def measure(
    cells: list[Cell],
    providers: list[Provider],
    *,
    rounds: int | None,
    cell_s: float,
    keep: Callable[[list[Row]], None],
    console: Console,
) -> None:
    """Hand the rows of each family to `keep`, with a line of progress for each."""
    todo = families(cells)
    fewest = rounds or FEWEST_GRID_ROUNDS
    costs = [estimated_s(family, cell_s=cell_s, fewest_rounds=fewest) for family in todo]
    minutes = sum(costs) / 60
    console.print(
        f"{len(cells)} cells in {len(todo)} families, about {minutes:.0f} minutes on 2 cores",
        highlight=False,
    )
    started = time.perf_counter()
    for i, family in enumerate(todo, 1):
        found = measure_family(family, providers, rounds=rounds, cell_s=cell_s)
        keep(found)
        passed = time.perf_counter() - started
        left = passed * sum(costs[i:]) / sum(costs[:i]) / 60
        refused = sorted({row.provider for row in found if row.error})
        remark = f"; refused: {', '.join(refused)}" if refused else ""
        case, dtype, _ = family[0]
        console.print(
            f"[{i}/{len(todo)}] D{case.D} H{case.H} E{case.E} R{case.R} {case.activation}, "
            f"{dtype}: {len(family)} cells; {passed / 60:.1f} min, {left:.0f} left{remark}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def resumed(fresh: Result, path: Path, *, keep_refused: bool = False) -> Result:
    """The result in the file without what was refused, if `fresh` would be measured the same way.

    With `keep_refused` also what was refused, so that it is not measured again.

    Raises:
        CannotResume: Machine, versions, commit, protocol or providers differ.
    """
    old = load(path)
    differences = [
        f"{key} was {old.environment.get(key)}, is {value}"
        for key, value in fresh.environment.items()
        if key != "date" and old.environment.get(key) != value
    ]
    if old.suite != fresh.suite:
        differences.append(f"suite was {old.suite}, is {fresh.suite}")
    if set(old.skipped) != set(fresh.skipped):
        was, now = (", ".join(result.skipped) or "none" for result in (old, fresh))
        differences.append(f"not measured was {was}, is {now}")
    if differences:
        raise CannotResume(f"{path} cannot be resumed: {'; '.join(differences)}")
    refused = set() if keep_refused else {row.cell for row in old.rows if row.error}
    old.rows = [row for row in old.rows if row.cell not in refused]
    return old


def run(
    options: argparse.Namespace,
    stamp: dict[str, object],
    providers: list[Provider],
    skipped: dict[str, str],
    console: Console,
) -> tuple[Result, Path]:
    """Measure what the options ask for and is not in the file to resume; returns where it is."""
    shortened = options.quick or options.rounds is not None
    cell_s = QUICK_GRID_CELL_S if options.quick else GRID_CELL_S
    result = Result(
        device=options.device,
        environment=stamp | {"cell_s": cell_s, "rounds": options.rounds},
        partial=True,
        preferred=OURS,
        skipped={name: reason for name, reason in skipped.items() if name in CONTENDERS},
        rows=[],
        suite=SHORTENED_SUITE if shortened else SUITE,
    )
    if options.resume:
        result = resumed(result, options.resume)
    partial = options.out / f"{dataclasses.replace(result, partial=True).name}.json"
    if partial.exists() and not options.resume and not shortened:
        raise CannotResume(f"{partial} exists: go on with --resume {partial}, or remove it")
    done = cells_of(result)
    cells = [cell for cell in options.cells if (cell[0].name, *cell[1:]) not in done]

    def keep(rows: list[Row]) -> None:
        result.rows += rows
        save(result, options.out)

    measure(
        cells, contenders(providers), rounds=options.rounds, cell_s=cell_s, keep=keep,
        console=console,
    )  # fmt: skip
    if not is_complete(result):
        return result, partial
    result.partial = False
    path = save(result, options.out)
    for leftover in (partial, partial.with_suffix(".csv")):
        leftover.unlink(missing_ok=True)
    return result, path
