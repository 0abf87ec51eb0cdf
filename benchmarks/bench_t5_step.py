# SPDX-License-Identifier: Apache-2.0
"""Measure PEMT's second stage on T5, and its feed-forward tail alone; writes JSON and CSV.

    python benchmarks/bench_t5_step.py [--device cuda] [--quick] [--only "t5-base"] [--profile]

Run it as a path, not with `-m`. Random weights; sizes are in `t5_cases.py`, contenders in
`t5_models.py` and `tail_forms.py`, one case in `t5_run.py`, the protocol in `README.md`;
`report.py` makes tables of what this writes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch
from cases import DTYPES
from command_line import check_options, chosen, conclude, console, new_parser, say
from measure import CELL_S, QUICK_CELL_S, pin_threads
from records import Result, environment, first_line
from rich.console import Console
from t5_cases import MODES, OURS, STEP, TAIL_NAME, T5Case, select
from t5_models import CONTENDERS, Models
from t5_records import SUITE, T5Row, t5_row
from t5_report import print_t5
from t5_run import checked, measure_mode, measure_tail, reference
from tables import number, rich_table

QUICK_ROUNDS = 3
PROFILED = 25  # operators in the table of --profile


def print_profile(models: Models, title: str, device: str) -> None:
    """The operators in which one step of ours spends its time, without what they call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    models.step(OURS)
    with torch.profiler.profile(activities=activities) as profile:
        models.step(OURS)
    clock = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, clock))
    whole = sum(getattr(event, clock) for event in events)
    table = rich_table(f"{title}: one step of ours", ("operator", "calls", "self ms", "% of all"))
    for event in events[:PROFILED]:
        self_us = getattr(event, clock)
        share = f"{100 * self_us / whole:.1f}" if whole else "–"
        table.add_row(event.key, str(event.count), number(self_us / 1e3), share)
    wide = console if console.is_terminal else Console(file=console.file, width=120)
    wide.print(table)


def measure_case(case: T5Case, options: argparse.Namespace, cell_s: float) -> list[T5Row]:
    """Both dtypes and all modes, with a line of progress for each."""
    rows: list[T5Row] = []
    try:
        expected = reference(case, options.device)
    except Exception as error:  # without a reference nobody can be checked
        reason = f"no reference: {first_line(error)}"
        cells = [(d, m, name) for d in DTYPES for m in MODES for name in CONTENDERS]
        found = [t5_row(case, *cell) for cell in cells]
        for row in found:
            row.error = reason
        return found
    for dtype in DTYPES:
        gc.collect()
        models = Models(case, DTYPES[dtype], options.device)
        right = checked(models, expected, dtype)
        for mode in MODES:
            started = time.perf_counter()
            rows += measure_mode(
                case, models, mode, dtype, right,
                device=options.device, rounds=options.rounds, cell_s=cell_s,
            )  # fmt: skip
            took = time.perf_counter() - started
            say(f"{case.name}, {case.layers} layers, {dtype}, {mode}: {took:.1f} s")
            if options.profile and mode == STEP and not isinstance(right[OURS], str):
                print_profile(models, f"{case.name}, {dtype}", options.device)
    return rows


def run(options: argparse.Namespace, stamp: dict[str, object]) -> tuple[Result, Path]:
    """All that is asked for, saved as partial after every case; returns where the result is."""
    cell_s = QUICK_CELL_S if options.quick else CELL_S
    result = Result(options.device, stamp, True, OURS, {}, [], suite=SUITE)
    path = Path()
    if options.tail:
        for dtype in DTYPES:
            started = time.perf_counter()
            rows = measure_tail(dtype, options.device, rounds=options.rounds, cell_s=cell_s)
            result.rows += rows
            say(f"{TAIL_NAME}, {dtype}: {time.perf_counter() - started:.1f} s")
        path = result.save(options.out)
    for case in options.cases:
        result.rows += measure_case(case, options, cell_s)
        path = result.save(options.out)
    shortened = (options.quick, options.only, options.rounds, options.layers)
    if not any(shortened):
        path = result.complete(options.out)
    return result, path


def arguments() -> argparse.Namespace:
    """What the command line says, with the cases to measure."""
    parser = new_parser("Time PEMT's second stage on T5.", quick="the smallest case, 1 + 1 layers")
    layers = "of encoder and decoder each; 3 on the CPU, all on a GPU if not given"
    parser.add_argument("--layers", type=int, metavar="N", help=layers)
    parser.add_argument("--profile", action="store_true", help="operators of a step of ours")
    options = parser.parse_args()
    check_options(parser, options, "layers")
    if options.quick and options.rounds is None:
        options.rounds = QUICK_ROUNDS
    found = select(options.device, quick=options.quick, layers=options.layers)
    options.cases = chosen(parser, options.only, found, TAIL_NAME)
    options.tail = options.only in TAIL_NAME
    for case in options.cases:
        if case.layers > case.shape.layers:
            parser.error(f"--layers must be at most {case.shape.layers} for {case.shape.name}")
    return options


def main() -> int:
    """Returns the exit status: 1 if a contender was refused."""
    options = arguments()
    stamp = environment(pin_threads(options.threads), options.commit)
    result, path = run(options, stamp)
    print_t5(result, console)
    return conclude(result, path)


if __name__ == "__main__":
    sys.exit(main())
