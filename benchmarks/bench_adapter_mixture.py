# SPDX-License-Identifier: Apache-2.0
"""Measure `adapter_mixture` against its baselines; prints a table, writes JSON and CSV.

    python benchmarks/bench_adapter_mixture.py [--device cuda] [--quick] [--only "t5-base"]
    python benchmarks/bench_adapter_mixture.py --suite grid [--device cuda] [--resume FILE]

Run it as a path, not with `-m`. Sizes are in `cases.py`, contenders in `providers.py`, the protocol
in `README.md`; `report.py` makes tables and plots of what this writes. The grids of the kernels'
targets are suites of their own, run by `grid_run.py` and, on a GPU, `gpu_run.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from pathlib import Path

import gpu_grid
import gpu_run
import grid
import grid_run
import torch
from cases import CASES, DTYPES, Case, select
from checking import Oracle
from command_line import check_options, conclude, console, new_parser, say
from grid_report import print_grid
from measure import (
    CELL_S,
    QUICK_CELL_S,
    one_thread,
    peak_memory_mib,
    pin_threads,
    seconds_of,
    synchronize,
    time_host,
    time_interleaved,
)
from providers import BASELINES, BOUND, PROVIDERS, Provider, bare_matmuls, preferred, step
from records import OPERATOR, Result, Row, environment, first_line, new_row
from tables import print_result

from pemt_fast.timing import ratio


def available(device: str) -> tuple[list[Provider], dict[str, str]]:
    """The providers that can run, and the reasons of the others."""
    runnable, skipped = [], {}
    for provider in PROVIDERS:
        reason = provider.missing(torch.device(device))
        if reason is None:
            runnable.append(provider)
        else:
            skipped[provider.name] = reason
            say(f"skipped {provider.name}: {reason}")
    return runnable, skipped


def measure_cell(
    oracle: Oracle,
    mode: str,
    providers: list[Provider],
    *,
    rounds: int | None,
    cell_s: float = CELL_S,
) -> list[Row]:
    """Check every provider, then time the correct ones against each other, then their memory."""
    case, dtype, device = oracle.case, oracle.dtype, oracle.device
    inputs = oracle.inputs(mode)
    rows, runs = {}, {}
    torch._dynamo.reset()  # guards of other shapes would be evaluated at every call
    for provider in providers:
        row = rows[provider.name] = new_row(case, dtype, mode, provider.name)
        function = provider.build()
        run = step(inputs, function)
        try:
            row.first_call_s = seconds_of(run, device)
            oracle.check(function, mode, exempt=provider.exempt)
        except Exception as error:  # whatever a provider raises belongs into its row
            row.error = first_line(error)
            continue
        runs[provider.name] = run
    rows[BOUND] = new_row(case, dtype, mode, BOUND)
    runs[BOUND] = bare_matmuls(inputs, mode)
    if case.group == "host":
        seconds = time_host(runs, rounds=rounds, cell_s=cell_s)
    else:
        seconds = time_interleaved(runs, device, rounds=rounds, cell_s=cell_s)
    for name, run in runs.items():
        fill(rows[name], case, seconds)
        rows[name].peak_memory_mib = peak_memory_mib(run, device)
    synchronize(device)
    return list(rows.values())


def fill(row: Row, case: Case, seconds: dict[str, list[float]]) -> None:
    """Write times, rates and ratios into the row."""
    row.set_times(seconds[row.provider])
    median_s = row.median_ms / 1e3
    row.tflop_s = case.flop(row.mode) / median_s / 1e12
    row.bandwidth_gb_s = case.traffic_bytes(row.mode, DTYPES[row.dtype]) / median_s / 1e9
    row.share_of_matmuls = ratio(seconds, BOUND, row.provider)
    row.speedup = {
        baseline.name: ratio(seconds, baseline.name, row.provider)
        for baseline in BASELINES
        if baseline.name in seconds
    }


def measure(
    cells: list[tuple[Case, str, str]],
    device: str,
    providers: list[Provider],
    *,
    rounds: int | None,
    cell_s: float,
) -> list[Row]:
    """All cells, with a line of progress for each."""
    rows: list[Row] = []
    oracle: Oracle | None = None
    for i, (case, dtype, mode) in enumerate(cells, 1):
        if oracle is None or (oracle.case, oracle.dtype) != (case, dtype):
            oracle = Oracle(case, dtype, device)
        started = time.perf_counter()
        # Threads that wait for one another would hide what a call costs.
        with one_thread() if case.group == "host" else contextlib.nullcontext():
            found = measure_cell(oracle, mode, providers, rounds=rounds, cell_s=cell_s)
        rows += found
        refused = [row.provider for row in found if row.error]
        remark = f"; refused: {', '.join(refused)}" if refused else ""
        took = time.perf_counter() - started
        say(f"[{i}/{len(cells)}] {case.name}, {dtype}, {mode}: {took:.1f} s{remark}")
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser(
        "Time adapter_mixture against its baselines.",
        quick="a few cases instead of all",
        rounds="about a second's worth",
    )
    parser.add_argument("--suite", choices=(OPERATOR, grid.SUITE), default=OPERATOR)
    resume = "partial result of --suite grid to complete"
    parser.add_argument("--resume", type=Path, metavar="FILE", help=resume)
    budget = f"of the GPU's grid; {gpu_run.BUDGET_S:.0f}, or {gpu_run.QUICK_BUDGET_S:.0f} if quick"
    parser.add_argument("--budget-s", type=float, metavar="SECONDS", help=budget)
    dry = "the GPU's grid on the CPU, in tiny sizes"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    # How often a process was started anew because its predecessor lost the device.
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def arguments() -> argparse.Namespace:
    """What the command line says, with the cells to measure."""
    command_line = parser()
    options, error = command_line.parse_args(), command_line.error
    gpu_grid_asked = options.suite == grid.SUITE and options.device == "cuda"
    check_options(command_line, options, "budget_s", needs_device=not options.dry_run)
    if (options.dry_run or options.budget_s) and not gpu_grid_asked:
        error("--dry-run and --budget-s are for --suite grid --device cuda")
    if options.resume is not None and options.suite != grid.SUITE:
        error("--resume is for --suite grid")
    if options.resume is not None and not options.resume.is_file():
        error(f"--resume: there is no file {options.resume}")
    if gpu_grid_asked:
        options.cells = gpu_grid.select(
            dry_run=options.dry_run, quick=options.quick, only=options.only
        )
    else:
        among = grid.GRID if options.suite == grid.SUITE else CASES
        options.cells = select(options.device, quick=options.quick, only=options.only, among=among)
    if not options.cells:
        error(f"--only {options.only!r}: no case for {options.device} has that in its name")
    return options


def run(
    options: argparse.Namespace,
    stamp: dict[str, object],
    providers: list[Provider],
    skipped: dict[str, str],
) -> tuple[Result, Path]:
    """The operator's suite; returns where its result was written."""
    cell_s = QUICK_CELL_S if options.quick else CELL_S
    rows = measure(options.cells, options.device, providers, rounds=options.rounds, cell_s=cell_s)
    result = Result(
        device=options.device,
        environment=stamp,
        partial=options.quick or bool(options.only) or options.rounds is not None,
        preferred=preferred(options.device),
        skipped=skipped,
        rows=rows,
    )
    return result, result.save(options.out)


def go_on(restart: gpu_run.Restart, options: argparse.Namespace) -> int:
    """Another process completes the run of this one, which lost the device; its exit status."""
    command = [sys.executable, *sys.argv, "--resume", str(restart.path)]
    command += ["--budget-s", str(max(1.0, restart.budget_s))]
    command += ["--restarts", str(options.restarts + 1)]
    say(f"going on: {' '.join(command)}")
    sys.stdout.flush()
    return subprocess.run(command).returncode


def main() -> int:
    """Returns the exit status: 1 if a provider was refused, 2 if a run cannot be resumed."""
    options = arguments()
    stamp = environment(pin_threads(options.threads), options.commit)
    providers, skipped = available("cpu" if options.dry_run else options.device)
    if options.suite == grid.SUITE:
        suite = grid_run if options.device == "cpu" else gpu_run
        try:
            result, path = suite.run(options, stamp, providers, skipped, console)
        except grid_run.CannotResume as error:
            say(str(error), style="red")
            return 2
        except gpu_run.Restart as restart:
            return go_on(restart, options)
        print_grid(result, console)
    else:
        result, path = run(options, stamp, providers, skipped)
        print_result(result, console)
    return conclude(result, path)


if __name__ == "__main__":
    sys.exit(main())
