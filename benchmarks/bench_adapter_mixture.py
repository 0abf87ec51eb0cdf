# SPDX-License-Identifier: Apache-2.0
"""Measure `adapter_mixture` against its baselines; prints a table, writes JSON and CSV.

    python benchmarks/bench_adapter_mixture.py [--device cuda] [--quick] [--only "t5-base"]

Run it as a path, not with `-m`. Sizes are in `cases.py`, contenders in `providers.py`, the protocol
in `README.md`; `report.py` makes tables and plots of what this writes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch
from cases import DTYPES, Case, select
from checking import Oracle
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
from records import RESULTS, Result, Row, environment
from rich.console import Console
from tables import print_result

from pemt_fast.timing import ratio

console = Console()


def available(device: str) -> tuple[list[Provider], dict[str, str]]:
    """The providers that can run, and the reasons of the others."""
    runnable, skipped = [], {}
    for provider in PROVIDERS:
        reason = provider.missing(torch.device(device))
        if reason is None:
            runnable.append(provider)
        else:
            skipped[provider.name] = reason
            console.print(f"skipped {provider.name}: {reason}", highlight=False, soft_wrap=True)
    return runnable, skipped


def new_row(case: Case, dtype: str, mode: str, provider: str) -> Row:
    """A row without numbers."""
    return Row(
        case.name, case.group, dtype, mode, provider, B=case.B, S=case.S, T=case.T, N=case.N,
        E=case.E, R=case.R, D=case.D, H=case.H, gate=case.gate, activation=case.activation,
    )  # fmt: skip


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
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
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
        console.print(
            f"[{i}/{len(cells)}] {case.name}, {dtype}, {mode}: "
            f"{time.perf_counter() - started:.1f} s{remark}",
            highlight=False,
            markup=False,
        )
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time adapter_mixture against its baselines.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few cases instead of all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the results")
    parser.add_argument("--rounds", type=int, help="per cell; about a second's worth if not given")
    parser.add_argument("--threads", type=int, help="of the CPU; all cores if not given")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    options.cells = select(options.device, quick=options.quick, only=options.only)
    if not options.cells:
        parser.error(f"--only {options.only!r}: no case for {options.device} has that in its name")
    return options


def main() -> int:
    """Returns the exit status: 1 if a provider was refused."""
    options = arguments()
    threads = pin_threads(options.threads)
    stamp = environment(threads)
    providers, skipped = available(options.device)
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
    print_result(result, console)
    console.print(f"written: {result.save(options.out)}", highlight=False, soft_wrap=True)
    refused = [row for row in rows if row.error]
    for row in refused:
        message = f"{', '.join(row.cell)}: {row.provider} was refused: {row.error}"
        console.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
