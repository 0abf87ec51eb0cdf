# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels that a run will need, in several processes at once.

A compiled kernel is found again on disk by whoever needs it next. One process would spend more
time on the compilations of the grid than on its measurement.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterable
from multiprocessing.process import BaseProcess

from cases import DTYPES, MODES, Case
from checking import with_gradients
from grid import Cell
from providers import PROVIDERS, step

MOST_PROCESSES = 18


def jobs(cells: Iterable[Cell]) -> list[list[Cell]]:
    """A job per number of adapters and mode, with the narrowest case of each number of tokens.

    Which kernel runs does not depend on the widths, as long as these are multiples of its tiles.
    """
    narrowest: dict[tuple[int, str, int], Cell] = {}
    for cell in cells:
        case, _, mode = cell
        known = narrowest.get((case.E, mode, case.T))
        if known is None or case.D + case.H < known[0].D + known[0].H:
            narrowest[case.E, mode, case.T] = cell
    wanted = sorted(narrowest.values(), key=lambda cell: (cell[0].E, list(MODES).index(cell[2])))
    groups = itertools.groupby(wanted, key=lambda cell: (cell[0].E, cell[2]))
    return [list(group) for _, group in groups]


def call_each(cells: Iterable[Cell], provider: str, device: str) -> int:
    """Call the provider once per cell; returns how many calls went well.

    What goes wrong is not told here: the run will meet it again.
    """
    function = next(p for p in PROVIDERS if p.name == provider).build()
    done = 0
    for case, dtype, mode in cells:
        try:
            step(_inputs(case, dtype, mode, device), function)()
            done += 1
        except Exception:  # noqa: S112
            continue
    return done


def _inputs(case: Case, dtype: str, mode: str, device: str):
    return with_gradients(case.inputs(DTYPES[dtype], device), MODES[mode])


def compile_ahead(cells: Iterable[Cell], provider: str, device: str, *, limit_s: float) -> str:
    """Calls all cells in processes of their own, which end after `limit_s`; says what was done."""
    started = time.perf_counter()
    wanted = jobs(cells)
    count = min(len(wanted), os.cpu_count() or 1, MOST_PROCESSES)
    # The mode that compiles most comes first: no process should get two of these.
    wanted.sort(key=len, reverse=True)
    shares = [list(itertools.chain(*wanted[i::count])) for i in range(count)]
    context = multiprocessing.get_context("spawn")  # a fork has no use of the device
    processes: list[BaseProcess] = [
        context.Process(target=call_each, args=(share, provider, device), daemon=True)
        for share in shares
    ]
    for process in processes:
        process.start()
    late = 0
    for process in processes:
        process.join(max(0.0, started + limit_s - time.perf_counter()))
        if process.is_alive():
            process.kill()
            process.join()
            late += 1
    passed = time.perf_counter() - started
    return f"compiled ahead in {count} processes: {passed:.0f} s" + (
        f", {late} of them stopped" if late else ""
    )
