# SPDX-License-Identifier: Apache-2.0
"""Measure Poly and MHR against peft, on layers and on T5-base; writes JSON and CSV.

    python benchmarks/bench_poly.py [--device cuda] [--quick] [--only "128 tokens"]

Run it as a path, not with `-m`. Cases are in `poly_cases.py`, contenders in `poly_models.py`, the
protocol in `README.md`; `report.py` makes tables of what this writes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES
from command_line import check_options, chosen, conclude, console, new_parser, say
from measure import CELL_S, QUICK_CELL_S, peak_memory_mib, pin_threads, time_interleaved
from poly_cases import (
    COMPILED,
    CPU_LAYERS,
    GENERATE,
    LAYER_MODES,
    LAYERS,
    MODEL_MODES,
    OURS,
    PEFT,
    PLAIN,
    PolyCase,
    models,
)
from poly_models import Layers, Models
from poly_records import SUITE, PolyRow, poly_row
from poly_report import print_poly
from records import Result, environment, first_line
from t5_checking import check, check_tokens

from pemt_fast.ops.dispatch import auto_impl
from pemt_fast.timing import ratio

# T5-base is slow on a CPU: rounds of a cell, and calls whose median is the memory.
MODEL_ROUNDS, MEMORY_CALLS = 11, 3


def checked(case: PolyCase, subject: Layers | Models, dtype: str) -> dict[str, float | str]:
    """Deviation from peft in float64 of every contender that is right, reason of every other."""
    kind = type(subject)
    exact = kind(case, torch.float64, "cpu").results(PEFT)
    found: dict[str, float | str] = {}
    contenders = (PEFT, *((COMPILED,) if case.compiles else ()), OURS)
    for name in contenders:
        try:
            found[name] = check(subject.results(name), exact, dtype)
            # With noise the same draws; a compiler has a generator of its own.
            if dtype == "fp32" and name == OURS:
                check(
                    subject.results(name, training=True),
                    subject.results(PEFT, training=True), dtype,
                )  # fmt: skip
        except Exception as error:  # whatever a contender raises belongs into its rows
            found[name] = first_line(error)
    return found


def measure(
    case: PolyCase, subject: Layers | Models, mode: str, dtype: str,
    right: dict[str, float | str], options: argparse.Namespace,
) -> list[PolyRow]:  # fmt: skip
    """The rows of one cell."""
    rows = {name: poly_row(case, dtype, mode, name) for name in (PLAIN, *right)}
    impl = auto_impl(torch.device(options.device), DTYPES[dtype])
    rows[OURS].impl = "torch" if impl == "triton" else impl
    runs: dict[str, Callable[[], object]] = {}
    for name, row in rows.items():
        verdict = right.get(name, 0.0)
        if isinstance(verdict, str):
            row.error = verdict
            continue
        row.deviation = None if name == PLAIN else verdict
        runs[name] = subject.run(name, mode)
        runs[name]()
    if mode == GENERATE and dtype == "fp32" and {PEFT, OURS} <= runs.keys():
        try:
            made: list[Any] = [runs[name]() for name in (OURS, PEFT)]
            check_tokens(*made)
        except AssertionError as error:
            rows[OURS].error = first_line(error)
            del runs[OURS]
    rounds = options.rounds
    if rounds is None and case.target and options.device == "cpu":
        rounds = MODEL_ROUNDS
    seconds = time_interleaved(runs, options.device, rounds=rounds, cell_s=options.cell_s)
    for name, run in runs.items():
        row = rows[name]
        row.set_times(seconds[name])
        row.added = ratio(seconds, name, PLAIN) - 1
        row.speedup = {b: ratio(seconds, b, name) for b in (PEFT, COMPILED) if b in seconds}
        if mode != GENERATE:
            calls = 1 if case.target else MEMORY_CALLS
            found = [peak_memory_mib(run, options.device) for _ in range(calls)]
            known = [peak for peak in found if peak is not None]
            row.peak_memory_mib = statistics.median(known) if known else None
    if PEFT in rows and OURS in runs:
        theirs, own = rows[PEFT].added, rows[OURS].added
        if theirs is not None and own is not None and own > 0:
            rows[OURS].speedup[f"{PEFT} added"] = theirs / own
    return list(rows.values())


def measure_case(case: PolyCase, options: argparse.Namespace) -> list[PolyRow]:
    """Both dtypes and all modes, with a line of progress for each."""
    rows: list[PolyRow] = []
    for dtype in DTYPES:
        gc.collect()
        subject = (Models if case.target else Layers)(case, DTYPES[dtype], options.device)
        right = checked(case, subject, dtype)
        for mode in MODEL_MODES if case.target else LAYER_MODES:
            started = time.perf_counter()
            rows += measure(case, subject, mode, dtype, right, options)
            say(f"{case.name}, {dtype}, {mode}: {time.perf_counter() - started:.1f} s")
    return rows


def arguments() -> argparse.Namespace:
    """What the command line says, with the cases to measure."""
    parser = new_parser("Time Poly and MHR against peft.", quick="short cells, T5-base with 1 + 1")
    options = parser.parse_args()
    check_options(parser, options)
    layers = 1 if options.quick else CPU_LAYERS if options.device == "cpu" else 12
    options.cell_s = QUICK_CELL_S if options.quick else CELL_S
    options.cases = chosen(parser, options.only, (*LAYERS, *models(layers)))
    return options


def main() -> int:
    """Returns the exit status: 1 if a contender was refused."""
    options = arguments()
    stamp = environment(pin_threads(options.threads), options.commit)
    result = Result(options.device, stamp, True, OURS, {}, [], suite=SUITE)
    path = Path()
    for case in options.cases:
        result.rows += measure_case(case, options)  # type: ignore[arg-type]
        path = result.save(options.out)
    if not any((options.quick, options.only, options.rounds)):
        path = result.complete(options.out)
    print_poly(result, console)
    return conclude(result, path)


if __name__ == "__main__":
    sys.exit(main())
