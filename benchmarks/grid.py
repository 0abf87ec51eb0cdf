# SPDX-License-Identifier: Apache-2.0
"""The grid that decides whether the CPU kernels reach their targets, as data.

Every width, bottleneck and number of tokens, with identity and with relu; the letters are those of
`cases.py`. A family is one shape in one dtype with all its numbers of tokens and modes. Measured by
`grid_run.py` (`--suite grid`), judged by `grid_targets.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

from cases import FORWARD, FROZEN, MODES, TRAINABLE, Case, select

SUITE = "grid"
GROUP = "targets"

Cell = tuple[Case, str, str]  # case, dtype, mode

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
WIDTHS = ((512, 512), (768, 768), (1024, 1024), (3072, 768), (768, 2304))  # (D, H)
BOTTLENECKS = ((1, 64), (6, 16), (6, 64), (16, 64), (32, 8))  # (E, R)
ACTIVATIONS = ("relu", "identity")
SEQUENCE = 128  # tokens per sequence, where there is a gate per sequence

_QUICK = ((512, 512), (6, 16), (1, 32, 512))


def modes_of(T: int) -> tuple[str, ...]:
    """One token is decoding, a few dozen the decoder beside frozen adapters, more is training."""
    return (FORWARD,) if T == 1 else (FORWARD, FROZEN) if T < SEQUENCE else tuple(MODES)


def grid_case(T: int, D: int, H: int, E: int, R: int, activation: str) -> Case:
    """PEMT's low-rank sources (identity, a gate per sequence, no biases), or all there is at once.

    The latter is relu with biases and a gate per token, over one sequence of T tokens.
    """
    per_token = activation != "identity"
    S = T if per_token else min(T, SEQUENCE)
    name = f"T{T} D{D} H{H} E{E} R{R} {activation}"
    return Case(
        name, GROUP, T // S, S, E, R, D, H, "[B, S, E]" if per_token else "[B, E]", activation,
        per_token, modes_of(T), devices=("cpu",),
        quick=(D, H) == _QUICK[0] and (E, R) == _QUICK[1] and T in _QUICK[2],
    )  # fmt: skip


GRID = tuple(
    grid_case(T, D, H, E, R, activation)
    for (D, H), (E, R), activation, T in itertools.product(WIDTHS, BOTTLENECKS, ACTIVATIONS, TOKENS)
)
CELLS: tuple[Cell, ...] = tuple(select("cpu", among=GRID))

# Who is measured, in this order, beside the bare matmuls.
OURS = "ours-cpu"
CONTENDERS = ("loop", "stacked", "compiled", OURS)
LOOP_SHARE = 0.3  # of a cell's measured time: the loop has rounds of its own


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A contender that would cost more time than it tells."""

    provider: str
    where: Callable[[Case], bool]
    reason: str


# Not shown with the whole grid either: `published` and `ours-torch` are in the operator's suite.
LEFT_OUT = (
    LeftOut("loop", lambda case: case.T > 2048, "not above 2048 tokens: minutes for a known loser"),
    LeftOut(
        "compiled",
        lambda case: case.T == 1,
        "not for one token, which would need compilations of its own and is judged against stacked",
    ),
    LeftOut("published", lambda case: True, "only in the operator's suite"),
    LeftOut("ours-torch", lambda case: True, "only in the operator's suite"),
)


def left_out(provider: str, case: Case) -> bool:
    """Whether this contender is not measured for this case."""
    return any(rule.provider == provider and rule.where(case) for rule in LEFT_OUT)


def families(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells by shape and dtype; in each family by mode, the most tokens first.

    The compiler decides from the first shape it sees whether to share loops among threads.
    """
    found: dict[tuple[object, ...], list[Cell]] = {}
    for case, dtype, mode in cells:
        key = (case.D, case.H, case.E, case.R, case.activation, dtype)
        found.setdefault(key, []).append((case, dtype, mode))
    order = list(MODES)
    for family in found.values():
        family.sort(key=lambda cell: (order.index(cell[2]), -cell[0].T))
    return list(found.values())


# What the estimate below assumes of a machine with two cores: FLOP/s of its matmuls, and the work
# of the contenders in passes of bare matmuls. While a run goes on only the ratios matter.
_FLOP_S = {"fp32": 205e9, "bf16": 950e9}
_PASSES, _LOOP_PASSES = 4.2, 3.5  # the loop is timed together with ours once more
_CHECK_S = 0.2  # inputs, oracle and comparison of a cell
_COMPILATION_S = {FORWARD: 1.0, FROZEN: 1.6, TRAINABLE: 1.0}


def estimated_s(cells: Iterable[Cell], *, cell_s: float, fewest_rounds: int) -> float:
    """How long these cells take, with nothing compiled before."""
    total = 0.0
    for family in families(cells):
        for mode in {mode for _, _, mode in family}:
            sequences = {min(case.B, 2) for case, _, m in family if m == mode and case.T > 1}
            total += len(sequences) * _COMPILATION_S[mode]
        for case, dtype, mode in family:
            one_pass_s = case.flop(mode) / _FLOP_S[dtype]
            passes = [_PASSES] if left_out("loop", case) else [_PASSES, _LOOP_PASSES]
            total += _CHECK_S + 1.5 * sum(passes) * one_pass_s  # first calls and check
            for budget_s, p in zip((cell_s, LOOP_SHARE * cell_s), passes, strict=False):
                total += max(budget_s, fewest_rounds * p * one_pass_s)
    return total
