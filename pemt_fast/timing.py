# SPDX-License-Identifier: Apache-2.0
"""Times several ways to do the same thing against each other, in one process, interleaved.

On a shared machine a single absolute time means little. Every round runs each candidate once, so
that slow moments hit all of them, in an order of its own, since a call pays for the caches that the
one before it leaves behind; medians and minima over the rounds are compared.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup_s: float = 0.2
) -> dict[str, list[float]]:
    """Seconds per call of every candidate, one list entry per round.

    Args:
        candidates: Name → function without arguments.
        rounds: Measured rounds.
        warmup_s: Each candidate runs at least this long, and at least twice, before the rounds.
    """
    cuda = torch.cuda.is_available()
    for run in candidates.values():
        started, calls = time.perf_counter(), 0
        while calls < 2 or time.perf_counter() - started < warmup_s:
            run()
            calls += 1
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            run = candidates[name]
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median_ms(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return 1e3 * statistics.median(seconds)


def ratio(seconds: Mapping[str, list[float]], slower: str, faster: str) -> float:
    """Median over the rounds of `slower / faster`, both of the same round."""
    pairs = zip(seconds[slower], seconds[faster], strict=True)
    return statistics.median(a / b for a, b in pairs)
