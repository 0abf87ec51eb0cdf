# SPDX-License-Identifier: Apache-2.0
"""How it is measured: threads, rounds, memory. The protocol in words: `README.md`.

Candidates are functions without arguments, by name. On the CPU the rounds are those of
`pemt_fast.timing`; on a GPU device events time each call, behind a flush of the caches.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from pemt_fast.timing import interleave

Runs = Mapping[str, Callable[[], object]]
Clock = Callable[[Sequence[str]], Mapping[str, float]]  # names in order -> seconds of each call

CELL_S, QUICK_CELL_S = 0.8, 0.3  # measured time per cell, unless the rounds are given
FEWEST_ROUNDS, MOST_ROUNDS = 7, 200
GRID_CELL_S, QUICK_GRID_CELL_S = 0.2, 0.05  # the same for the grid, with its many cells
GPU_CELL_S, QUICK_GPU_CELL_S = 0.08, 0.03
FEWEST_GRID_ROUNDS = 5
WARMUP_SHARE = 0.1  # of a cell of the grid
WARMUP_S = 0.05  # per candidate; the check before has already run each of them
HOST_CALLS = 20  # per round, where the price of a call is measured
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


def pin_threads(threads: int | None) -> int:
    """Use this many threads, on as many fixed cores where the system allows it.

    Before the first parallel work of the process: later threads inherit the cores.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if threads is None:
        threads = torch.get_num_threads() if allowed is None else len(allowed)
        threads = min(threads, torch.get_num_threads())
    if allowed is not None:
        os.sched_setaffinity(0, allowed[:threads])
    torch.set_num_threads(threads)
    return threads


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within this context torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronize(device: str) -> None:
    """Wait for the device; nothing to do on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def rounds_for(runs: Runs, device: str, cell_s: float) -> int:
    """So many rounds that the cell takes about `cell_s`."""
    one_round = sum(seconds_of(run, device) for run in runs.values())
    return min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(cell_s / max(one_round, 1e-9))))


def time_interleaved(
    runs: Runs, device: str, *, rounds: int | None, cell_s: float = CELL_S
) -> dict[str, list[float]]:
    """Seconds per call of each candidate, one entry per round; each round runs all of them."""
    rounds = rounds or rounds_for(runs, device, cell_s)
    if device == "cuda":
        return _interleave_on_device(runs, rounds)
    return interleave(runs, rounds=rounds, warmup_s=WARMUP_S)


def time_briefly(
    runs: Runs, *, rounds: int | None, cell_s: float, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Like `time_interleaved`, for many cells whose candidates have just been checked.

    Rounds go on until `cell_s` have passed, at least `FEWEST_GRID_ROUNDS`. Those of the first tenth
    of the time are warm-up: they are dropped as far as the fewest remain. Each round has an order
    of its own, since a call pays for the caches that the one before it leaves behind. `clock` times
    one round; if it is not given, each call on the CPU.
    """
    clock = clock or (lambda order: {name: seconds_of(runs[name], "cpu") for name in order})
    fewest, budget_s = (rounds, 0.0) if rounds else (FEWEST_GRID_ROUNDS, cell_s)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    started, warmup, done, passed = time.perf_counter(), 0, 0, 0.0
    while done < fewest or (passed < budget_s and done < MOST_ROUNDS):
        shuffle(order)
        for name, call_s in clock(order).items():
            seconds[name].append(call_s)
        warmup += passed < WARMUP_SHARE * budget_s
        done, passed = done + 1, time.perf_counter() - started
    dropped = min(warmup, done - fewest)
    return {name: all_rounds[dropped:] for name, all_rounds in seconds.items()}


def time_host(runs: Runs, *, rounds: int | None, cell_s: float = CELL_S) -> dict[str, list[float]]:
    """Seconds of the host per call: many calls in a row, waiting for the device only at the end."""

    def repeated(run: Callable[[], object]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(HOST_CALLS):
                run()

        return many

    many = {name: repeated(run) for name, run in runs.items()}
    rounds = rounds or rounds_for(many, "cpu", cell_s)
    seconds = interleave(many, rounds=rounds, warmup_s=WARMUP_S)
    return {name: [s / HOST_CALLS for s in all_rounds] for name, all_rounds in seconds.items()}


def _interleave_on_device(runs: Runs, rounds: int) -> dict[str, list[float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for run in runs.values():
        started = time.perf_counter()
        while time.perf_counter() - started < WARMUP_S:
            run()
            torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        events = {}
        for name, run in runs.items():
            events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            # The flush also keeps the device busy while the host queues the call.
            flush.zero_()
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def peak_memory_mib(run: Callable[[], object], device: str) -> float | None:
    """Most memory that one call needs beyond what was there before it, results included.

    On a GPU what torch's allocator handed out. On the CPU the growth of the resident set, as the
    kernel counts it: also what a library takes for itself, and pages the allocator could not reuse.
    None where the system does not tell.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # free pages of the heap would hide the first uses
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = _status_mib("VmRSS")
    except (OSError, AttributeError):
        return None
    result = run()
    peak = _status_mib("VmHWM")
    del result
    return max(0.0, peak - before)


def _status_mib(field: str) -> float:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match.group(1)) / 1024
