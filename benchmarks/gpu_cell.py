# SPDX-License-Identifier: Apache-2.0
"""Measures one shape of the GPU's grid: every provider checked, then timed against the others.

Whatever a provider raises becomes the error of its row. Which shapes, and for how long:
`gpu_run.py`; how the device is timed: `gpu_measure.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch
import torch._inductor.config
from checking import BASELINE_SLACK, Oracle
from gpu_grid import (
    COMPARED_TOKENS,
    CONTENDERS,
    GRAPH_TOKENS,
    HOST_TOKENS,
    MEMORY_TOKENS,
    DeviceCase,
    left_out,
)
from gpu_measure import Stopwatch, captured, forget, host_us, is_lost
from grid import Cell
from measure import Runs, peak_memory_mib, seconds_of, time_briefly
from providers import (
    BOUND,
    Provider,
    bare_matmuls,
    compile_stacked,
    grouped,
    grouped_mm_missing,
    routing_of,
    step,
)
from records import BASELINES, GRAPH, OURS_PREFIX, Row, first_line, new_row
from roofline import floor_us

from pemt_fast.timing import ratio

COMPILED, GROUPED = "compiled", "grouped"
COMPILER_MODE = "max-autotune-no-cudagraphs"
COMPILATION_SHARE = 0.45  # of the budget, for the compiled baseline
# A compilation cannot be stopped: with less than this left none is begun.
LONGEST_COMPILATION_S = 50.0


class DeviceLost(Exception):
    """The process cannot use the device any more; has what was measured of the shape."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__("the device is lost to this process")
        self.rows = rows


class Budget:
    """Seconds of a run, and how many of them the compiler may still take."""

    def __init__(self, total_s: float) -> None:
        self._ends = time.perf_counter() + total_s
        self.compilation_s = COMPILATION_SHARE * total_s

    def left_s(self) -> float:
        """Until the run should end."""
        return self._ends - time.perf_counter()

    def may_compile(self) -> bool:
        """Whether another compilation fits."""
        return self.compilation_s > 0 and self.left_s() > LONGEST_COMPILATION_S


def contenders(providers: list[Provider], device: str) -> tuple[list[Provider], dict[str, str]]:
    """Those of the grid that can run, and the reasons of the others."""
    by_name = {provider.name: provider for provider in providers}
    if COMPILED in by_name:
        if hasattr(torch._inductor.config, "autotune_num_choices_displayed"):
            torch._inductor.config.autotune_num_choices_displayed = 0  # pages of tables
        compiled = functools.partial(compile_stacked, mode=COMPILER_MODE)
        by_name[COMPILED] = dataclasses.replace(by_name[COMPILED], build=compiled)
    reason = grouped_mm_missing(torch.device(device))
    if reason is None:
        by_name[GROUPED] = Provider(GROUPED, lambda: grouped)
    found = [by_name[name] for name in CONTENDERS if name in by_name]
    return found, {} if reason is None else {GROUPED: reason}


class Bench:
    """Measures cells on one device.

    Args:
        providers: What `contenders` found.
        device: `cuda`, or `cpu` for a dry run.
        gpu: The name of the GPU, for its floor.
        budget: Asked before each compilation.
        rounds: Per cell; None for as many as fit into `cell_s`.
        cell_s: Seconds that a cell is timed.
    """

    def __init__(
        self, providers: list[Provider], device: str, gpu: str | None, budget: Budget,
        *, rounds: int | None, cell_s: float,
    ) -> None:  # fmt: skip
        self._providers, self._device, self._gpu, self._budget = providers, device, gpu, budget
        self._briefly = functools.partial(time_briefly, rounds=rounds, cell_s=cell_s)
        self._stopwatch = Stopwatch() if device == "cuda" else None
        self.notes: list[list[str]] = []

    def unit(self, cells: list[Cell]) -> list[Row]:
        """The cells of one case; they share inputs and oracle.

        Raises:
            DeviceLost: a provider broke the process's connection to the device.
        """
        case, dtype, _ = cells[0]
        rows: list[Row] = []
        try:
            oracle = Oracle(case, dtype, self._device, most_tokens=COMPARED_TOKENS)
        except Exception as error:  # out of memory, most likely
            self.notes += [[case.name, d, m, "", _line(error)] for _, d, m in cells]
            self._recover(rows)
            return rows
        for _, _, mode in cells:
            try:
                self._cell(oracle, mode, rows)
            except DeviceLost:
                raise
            except Exception as error:
                self.notes.append([case.name, dtype, mode, "", _line(error)])
                self._recover(rows)
        return rows

    def _cell(self, oracle: Oracle, mode: str, rows: list[Row]) -> None:
        """Appends the rows of one cell: check every provider, then time the correct ones."""
        case, dtype = oracle.case, oracle.dtype
        floor = floor_us(case, dtype, mode, self._gpu)
        mine: dict[str, Row] = {}
        runs: dict[str, Callable[[], object]] = {}
        inputs = oracle.inputs(mode)
        for provider in self._providers:
            if left_out(provider.name, case):
                continue
            if provider.name == COMPILED and not self._budget.may_compile():
                reason = "no seconds left for the compiler"
                self.notes.append([case.name, dtype, mode, COMPILED, reason])
                continue
            row = mine[provider.name] = new_row(case, dtype, mode, provider.name)
            row.floor_us = floor
            rows.append(row)
            try:
                runs[provider.name] = self._checked(provider, oracle, mode, row)
            except Exception as error:  # whatever a provider raises belongs into its row
                row.error = _line(error)
                self._recover(rows)
        row = mine[BOUND] = new_row(case, dtype, mode, BOUND)
        row.floor_us = floor
        rows.append(row)
        runs[BOUND] = bare_matmuls(inputs, mode)
        try:
            self._time(case, mine, runs)
        except Exception as error:
            for row in mine.values():
                if row.median_ms is None and row.error is None:
                    row.error = f"while it was timed: {_line(error)}"
            self.notes.append([case.name, dtype, mode, "graphs, host or memory", _line(error)])
            self._recover(rows)

    def _checked(self, provider: Provider, oracle: Oracle, mode: str, row: Row):
        """The call to time, of a provider that is right."""
        case, inputs = oracle.case, oracle.inputs(mode)
        if provider.name == COMPILED:
            torch._dynamo.reset()  # guards of other shapes would be evaluated at every call
        function = timed = provider.build()
        if provider.name == GROUPED:
            assert isinstance(case, DeviceCase)
            function = functools.partial(function, top_k=case.top_k)
            routing = routing_of(inputs.gate, case.top_k)
            timed = functools.partial(function, routing=routing)
        run = step(inputs, timed)
        started = time.perf_counter()
        try:
            row.first_call_s = seconds_of(run, self._device)
            ours = provider.name.startswith(OURS_PREFIX)
            oracle.check(function, mode, slack=1 if ours else BASELINE_SLACK)
        finally:
            if provider.name == COMPILED:
                self._budget.compilation_s -= time.perf_counter() - started
        return run

    def _recover(self, rows: list[Row]) -> None:
        if is_lost(self._device):
            raise DeviceLost(rows)
        forget(self._device)

    def _time(self, case: DeviceCase, rows: dict[str, Row], runs: Runs) -> None:
        """Writes times and our ratios into the rows."""
        clock = self._stopwatch.clock(runs) if self._stopwatch else None
        seconds = self._briefly(runs, clock=clock)
        for name in runs:
            rows[name].set_times(seconds[name])
        _compare(rows, seconds)
        if case.T <= GRAPH_TOKENS and self._stopwatch:
            self._time_graphs(rows, runs)
        for name, run in runs.items():
            if case.T == HOST_TOKENS:
                rows[name].host_us = host_us(run, self._device)
            if case.T == MEMORY_TOKENS:
                rows[name].peak_memory_mib = peak_memory_mib(run, self._device)

    def _time_graphs(self, rows: dict[str, Row], runs: Runs) -> None:
        """Once more as CUDA graphs; who cannot be captured is noted and left out."""
        replays = {}
        for name, run in runs.items():
            try:
                replays[name] = captured(run)
            except Exception as error:
                self.notes.append([*rows[name].cell, f"{name} in a graph", _line(error)])
        seconds = self._briefly(replays, clock=self._stopwatch.clock(replays))
        for name in replays:
            graph = dataclasses.replace(rows[name])
            graph.set_times(seconds[name])
            rows[name].graph_ms = graph.median_ms
        _compare(rows, seconds, GRAPH)


def _compare(rows: dict[str, Row], seconds: dict[str, list[float]], suffix: str = "") -> None:
    """Ratios of our rows to the baselines, and to the bare matmuls."""
    for name, row in rows.items():
        if not name.startswith(OURS_PREFIX) or name not in seconds:
            continue
        row.speedup |= {
            b + suffix: ratio(seconds, b, name) for b in (*BASELINES, GROUPED) if b in seconds
        }
        if not suffix:
            row.share_of_matmuls = ratio(seconds, BOUND, name)


def _line(error: Exception) -> str:
    return first_line(error)[:300]
