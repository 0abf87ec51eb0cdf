# SPDX-License-Identifier: Apache-2.0
"""One case of the T5 suite: check the contenders, time the right ones interleaved, then memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from cases import DTYPES
from measure import peak_memory_mib, synchronize, time_interleaved
from records import first_line
from t5_cases import GENERATE, OURS, PLAIN, STEP, TAIL_NAME, T5Case
from t5_cases import TAIL as TAIL_CASE
from t5_checking import check, check_tokens
from t5_models import CONTENDERS, Models
from t5_records import TAIL, T5Row, t5_row
from tail_forms import FORMS, bare_matmuls
from torch import Tensor

from pemt_fast.nn.routing import RoutingState
from pemt_fast.ops.dispatch import auto_impl
from pemt_fast.timing import ratio

MATMULS = "matmuls"
# Calls whose median is the memory: on the CPU one is good to a tenth of so large an amount.
MEMORY_CALLS = 3
# On the CPU, where a round takes up to half a minute: rounds by source tokens, if none are asked
# for. The long case measures memory once.
CPU_ROUNDS = {128: 5, 512: 3}
_BASELINES = tuple(FORMS)
Runs = dict[str, Callable[[], object]]


def reference(case: T5Case, device: str) -> dict[str, Tensor]:
    """What the published form computes in float64."""
    return Models(case, torch.float64, device).results("published")


def checked(models: Models, expected: dict[str, Tensor], dtype: str) -> dict[str, float | str]:
    """Deviation of every contender that is right, reason of every other."""
    found: dict[str, float | str] = {}
    for name in (*FORMS, OURS):
        try:
            found[name] = check(models.results(name), expected, dtype)
        except Exception as error:  # whatever a contender raises belongs into its rows
            found[name] = first_line(error)
    return found


def rounds_of(case: T5Case, device: str) -> int | None:
    """Rounds of a case if none are asked for; None for what the other suites do."""
    return CPU_ROUNDS.get(case.source) if device == "cpu" else None


def _time(
    rows: dict[str, T5Row],
    runs: Runs,
    device: str,
    rounds: int | None,
    cell_s: float,
    memory_calls: int = MEMORY_CALLS,
) -> dict[str, list[float]]:
    """Times, ratios and, but for generation, memory of the rows."""
    seconds = time_interleaved(runs, device, rounds=rounds, cell_s=cell_s)
    for name in runs:
        row = rows[name]
        row.set_times(seconds[name])
        row.speedup = {b: ratio(seconds, b, name) for b in _BASELINES if b in seconds}
        if row.mode != GENERATE:
            found = [peak_memory_mib(runs[name], device) for _ in range(memory_calls)]
            known = [peak for peak in found if peak is not None]
            row.peak_memory_mib = statistics.median(known) if known else None
    synchronize(device)
    return seconds


def measure_mode(
    case: T5Case,
    models: Models,
    mode: str,
    dtype: str,
    right: dict[str, float | str],
    *,
    device: str,
    rounds: int | None,
    cell_s: float,
) -> list[T5Row]:
    """The rows of one cell."""
    rows = {name: t5_row(case, dtype, mode, name) for name in CONTENDERS}
    rows[OURS].impl = auto_impl(torch.device(device), DTYPES[dtype])
    tokens: Tensor | None = None
    runs: Runs = {}
    for name, row in rows.items():
        verdict = right.get(name)
        try:
            assert not isinstance(verdict, str), verdict
            if mode == GENERATE and dtype == "fp32" and name != PLAIN:
                made = models.generate(name)
                tokens = made if tokens is None else tokens
                check_tokens(made, tokens)
        except Exception as error:
            row.error = verdict if isinstance(verdict, str) else first_line(error)
            continue
        row.deviation = verdict
        runs[name] = models.run(name, mode)
    rounds = rounds or rounds_of(case, device)
    memory_calls = 1 if device == "cpu" and case.source > 128 else MEMORY_CALLS
    seconds = _time(rows, runs, device, rounds, cell_s, memory_calls)
    for name in runs:
        row = rows[name]
        row.flop_share = case.share(mode)
        row.adapters_share = case.share(mode, all_adapters=True)
        row.added = None if name == PLAIN else ratio(seconds, name, PLAIN) - 1
    return list(rows.values())


class TailRun:
    """A step of one tail: forward with the loss, gradients of h and of what is trained."""

    def __init__(self, dtype: torch.dtype, device: str, case: T5Case) -> None:
        self._models = Models(case, dtype, device)
        tails = self._models.tails
        self.tails = {name: tails[name][0] for name in (*FORMS, OURS)}
        ours = self.tails[OURS]
        generator = torch.Generator().manual_seed(2)
        shape = (case.B, case.encoded, case.shape.D)
        # relu behind the first linear; rounded, so that every dtype has the same values.
        h = torch.randn(shape, generator=generator).relu().bfloat16()
        grad = torch.randn(*shape[:2], case.shape.H, generator=generator).bfloat16()
        self.h = h.to(device, dtype).requires_grad_()
        self.grad = grad.to(device, dtype)
        self.mask = torch.ones(shape[:2], dtype=torch.bool, device=device)
        self.mask[::2, -case.encoded // 4 :] = False
        self.trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
        # As T5's loss has it, but for one tail: weight 0.1, times the tokens behind the gradient.
        self._loss_weight = 0.1 * case.B * case.encoded

    def results(self, name: str) -> dict[str, Tensor]:
        """Output, loss and gradients."""
        routing = self._models.adapted.routing
        state = RoutingState(wants_loss=True, encoder_mask=self.mask)
        with routing.use(state):
            z = self.tails[name](self.h)
        (loss,) = state.losses.values()
        leaves = (self.h, *self.trained.values())
        total = self._loss_weight * loss
        grads = torch.autograd.grad((z, total), leaves, (self.grad, torch.ones_like(total)))
        named = zip(("h", *self.trained), grads, strict=True)
        return {"z": z.detach(), "loss": loss.detach()} | {f"d_{n}": g for n, g in named}

    def run(self, name: str) -> Callable[[], object]:
        """One step of a contender, or of the bare matmuls."""
        if name == MATMULS:
            return bare_matmuls(self.tails[OURS], self.h, self.grad)
        return lambda: self.results(name)


def measure_tail(dtype: str, device: str, *, rounds: int | None, cell_s: float) -> list[T5Row]:
    """The rows of the tail in one dtype."""
    expected = TailRun(torch.float64, device, TAIL_CASE).results("published")
    tail = TailRun(DTYPES[dtype], device, TAIL_CASE)
    names: Sequence[str] = (*FORMS, OURS, MATMULS)
    rows = {n: t5_row(TAIL_CASE, dtype, STEP, n, group=TAIL, name=TAIL_NAME) for n in names}
    rows[OURS].impl = auto_impl(torch.device(device), DTYPES[dtype])
    runs: Runs = {}
    for name, row in rows.items():
        try:
            if name != MATMULS:
                row.deviation = check(tail.results(name), expected, dtype)
        except Exception as error:  # whatever a contender raises belongs into its row
            row.error = first_line(error)
            continue
        runs[name] = tail.run(name)
    seconds = _time(rows, runs, device, rounds, cell_s)
    for name in runs:
        rows[name].share_of_matmuls = ratio(seconds, MATMULS, name)
    return list(rows.values())
