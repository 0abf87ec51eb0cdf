# SPDX-License-Identifier: Apache-2.0
"""How a GPU is measured in the grid: time on the device, time in a CUDA graph, time of the host.

Three different numbers. The first says what a call costs in a queue that is never empty, the second
what it costs without the host, the third how fast the host can queue calls. The functions work
without a GPU too, where they time the CPU and there are no graphs: for dry runs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from measure import FLUSH_BYTES, Clock, Runs, seconds_of, synchronize

HOST_CALLS, HOST_ROUNDS = 10, 5
# The host may be this much slower than when its time was taken, before the device has to wait.
HOST_SLACK = 1.5
MOST_FLUSHES = 100  # ahead of one call: about 7 ms
GRAPH_WARMUP = 2


class Stopwatch:
    """Events of the device around each call, behind a flush of the caches.

    The flush is repeated until it takes longer than the host needs to queue the call, so that the
    device never waits for the host between the kernels of a call.
    """

    def __init__(self) -> None:
        self._cache = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self.flush_s = min(self._timed(self._cache.zero_, flushes=1) for _ in range(5))

    def _timed(self, run: Callable[[], object], *, flushes: int) -> float:
        events = self._queue(run, flushes=flushes)
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def _queue(self, run: Callable[[], object], *, flushes: int) -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for _ in range(flushes):
            self._cache.zero_()
        events[0].record()
        run()
        events[1].record()
        return events

    def clock(self, runs: Runs) -> Clock:
        """Times one call of each in the order it is given."""
        flushes = {name: self._flushes(run) for name, run in runs.items()}

        def one_round(order: Sequence[str]) -> dict[str, float]:
            events = {name: self._queue(runs[name], flushes=flushes[name]) for name in order}
            torch.cuda.synchronize()
            return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}

        return one_round

    def _flushes(self, run: Callable[[], object]) -> int:
        queued = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            queued.append(time.perf_counter() - started)
        wanted = math.ceil(HOST_SLACK * min(queued) / max(self.flush_s, 1e-6))
        return min(MOST_FLUSHES, max(1, wanted))


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """One call as a CUDA graph; the result replays it. Nothing may be compiled in the call."""
    current, stream, graph = (
        torch.cuda.current_stream(),
        torch.cuda.Stream(),
        torch.cuda.CUDAGraph(),
    )
    # The outer context is there for captures that fail: they may leave another stream behind.
    with torch.cuda.stream(current):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARMUP):
                run()
        current.wait_stream(stream)
        with torch.cuda.graph(graph):
            run()
    return graph.replay


def host_us(run: Callable[[], object], device: str) -> float:
    """Microseconds that the host needs to queue a call: median over several calls in a row."""
    found = []
    for _ in range(HOST_ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(HOST_CALLS):
            run()
        found.append((time.perf_counter() - started) / HOST_CALLS)
    synchronize(device)
    return 1e6 * statistics.median(found)


def is_lost(device: str) -> bool:
    """Whether the process cannot use the device any more, as after an illegal access."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        return float(torch.ones(1, device=device).sum()) != 1
    except RuntimeError:
        return True


def forget(device: str) -> None:
    """Give memory back that the allocator keeps, after one that ran out of it."""
    if device == "cuda":
        torch.cuda.empty_cache()


def rates(device: str) -> dict[str, float]:
    """What a matmul of 8192³ in bf16 and a copy of a GiB reach: TFLOP/s, TB/s read and written."""
    if device != "cuda":
        return {}
    width = 8192
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    matmul_s = _many_s(lambda: torch.mm(a, b), device) or math.nan
    copy_s = _many_s(lambda: target.copy_(source), device) or math.nan
    return {
        "matmul_tflop_s": round(2 * width**3 / matmul_s / 1e12, 1),
        "copy_tb_s": round(2 * source.numel() / copy_s / 1e12, 2),
    }


def _many_s(run: Callable[[], object], device: str, *, calls: int = 20) -> float:
    def many() -> None:
        for _ in range(calls):
            run()

    run()
    return min(seconds_of(many, device) for _ in range(3)) / calls
