# SPDX-License-Identifier: Apache-2.0
"""`impl="torch"` of `skill_mixture`: mix the factors, then batched matmuls, forward and backward.

Letters as in `skill_mixture.py`. Works on `x [B, S, D]`, `mixing [M, P, K]` of M tasks and P splits
and skills `[P, K, R, width / P]`. The factors `A_t [R, D]` and `B_t [R, H]` are mixed once per task
or once per sequence, whichever is less work by their shapes (`mixes_tasks`), never per token; in
float32 (float64 for float64), and rounded once to the dtype of `x`. The scale is part of the
weights of B, so it costs nothing per token. One row of `mixing` for all makes all tokens one
sequence. The rank is the slow dimension of both factors: no product then reads or writes a matrix
with rows of R elements but the hidden units. The formulas are derived in `docs/derivation.md`;
`skill_mixture.py` owns the memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Selecting one mixed factor, and summing its gradient, costs as much as mixing in this many skills.
SKILLS_PER_SELECTION = 4


class Gradients(NamedTuple):
    """Gradients of the inputs, `None` where not asked for."""

    d_x: Tensor | None  # [B, S, D], or one sequence of B·S
    d_mixing: Tensor | None  # [M, P, K]
    d_a: Tensor | None  # [P, K, R, D / P]
    d_b: Tensor | None  # [P, K, R, H / P]


def flat(rows: Tensor) -> Tensor:
    """`[B, ..., width]` as `[B, S, width]`."""
    if rows.dim() == 3:
        return rows
    return rows.reshape(rows.shape[0], math.prod(rows.shape[1:-1]), rows.shape[-1])


def with_splits(
    mixing: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """All three with their splits: `[M, P, K]`, `[P, K, R, D / P]` and `[P, K, R, H / P]`."""
    return (
        mixing if mixing is None or mixing.dim() == 3 else mixing.unsqueeze(1),
        a if a.dim() == 4 else a.unsqueeze(0),
        b if b.dim() == 4 else b.unsqueeze(0),
    )


def mixes_tasks(tasks: int, sequences: int, skills: int) -> bool:
    """Whether to mix the factors of all tasks and select, instead of mixing for each sequence."""
    return tasks * skills + sequences * SKILLS_PER_SELECTION < sequences * skills


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What factors are mixed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Weights:
    """The weights of one factor; without `rows` its skills are the factors of the tasks."""

    def __init__(self, rows: Tensor | None, scale: float):
        self.scale = scale
        self.rows = rows  # [P, rows, K], times the scale
        if rows is not None and scale != 1:
            self.rows = rows * scale

    def mix(self, skills: Tensor, wide: torch.dtype) -> Tensor:
        """`Σ_k rows[p, ·, k]·skills[p, k]`, `[P, rows, R·width]`."""
        P, K, R, width = skills.shape
        flat_skills = skills.reshape(P, K, R * width).to(wide)
        if self.rows is not None:
            return torch.bmm(self.rows, flat_skills)
        return flat_skills if self.scale == 1 else flat_skills * self.scale

    def unmix(self, d_mixed: Tensor) -> Tensor:
        """The gradient of the skills, `[P, K, R·width]`, of that of what was mixed."""
        if self.rows is not None:
            return torch.bmm(self.rows.transpose(1, 2), d_mixed)
        return d_mixed if self.scale == 1 else d_mixed * self.scale


class _Mixer:
    """The weights of one call: one row for each factor that is mixed, and how to select factors."""

    def __init__(
        self,
        mixing: Tensor | None,
        tasks: int,
        task_ids: Tensor | None,
        scale: float,
        sequences: int,
        like: Tensor,
    ):
        self.dtype, self.wide, self.scale = like.dtype, wide_dtype(like.dtype), scale
        self.tasks, self.task_ids = tasks, task_ids
        self.one_hot: Tensor | None = None
        self.selects_factors = task_ids is not None and (
            mixing is None or mixes_tasks(tasks, sequences, mixing.shape[-1])
        )
        rows = None
        if mixing is not None:
            rows = mixing.to(self.wide)
            if task_ids is not None and not self.selects_factors:
                rows = rows.index_select(0, task_ids)
            rows = rows.transpose(0, 1)
        self.for_a, self.for_b = _Weights(rows, 1), _Weights(rows, scale)

    def factors(self, weights: _Weights, skills: Tensor) -> Tensor:
        """The factor of each sequence, splits side by side."""
        P, _, R, width = skills.shape
        mixed = weights.mix(skills, self.wide)
        rows = mixed.shape[1]
        if P == 1:
            factors = mixed.view(rows, R, width).to(self.dtype)
        else:
            factors = mixed.new_empty(rows, R, P * width, dtype=self.dtype)
            side_by_side = mixed.view(P, rows, R, width).permute(1, 2, 0, 3)
            factors.view(rows, R, P, width).copy_(side_by_side)
        return factors.index_select(0, self._ids()) if self.selects_factors else factors

    def sums(self, d_factors: Tensor, splits: int) -> Tensor:
        """Gradients of the factors of each sequence as those of the mixed ones, `[P, rows, ·]`."""
        sequences, R, full_width = d_factors.shape
        width = full_width // splits
        d_factors = d_factors.to(self.wide)
        if self.selects_factors:
            d_factors = torch.mm(self._one_hot(), d_factors.view(sequences, R * full_width))
        apart = d_factors.view(-1, R, splits, width).permute(2, 0, 1, 3)
        return apart.reshape(splits, -1, R * width)

    def gradient(self, d_for_a: Tensor, d_for_b: Tensor) -> Tensor:
        """`d_mixing [M, P, K]` of the gradients of both kinds of weights, `[P, rows, K]`."""
        d_rows = torch.add(d_for_a, d_for_b, alpha=self.scale).transpose(0, 1)
        if self.task_ids is None or self.selects_factors:
            return d_rows
        rows, P, K = d_rows.shape
        return torch.mm(self._one_hot(), d_rows.reshape(rows, P * K)).view(-1, P, K)

    def _ids(self) -> Tensor:
        assert self.task_ids is not None
        return self.task_ids

    def _one_hot(self) -> Tensor:
        """`[M, B]`: sums over the sequences of each task by a matmul, in one order, on any device.

        Adding to the rows of a task one sequence at a time would have no order on a GPU.
        """
        if self.one_hot is None:
            ids = self._ids()
            tasks = torch.arange(self.tasks, device=ids.device, dtype=ids.dtype)
            self.one_hot = (tasks.unsqueeze(1) == ids.unsqueeze(0)).to(self.wide)
        return self.one_hot


def _as_one_sequence(rows: Tensor) -> Tensor:
    return rows.reshape(1, rows.shape[0] * rows.shape[1], rows.shape[2])


def forward(
    x: Tensor,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    task_ids: Tensor | None,
    base: Tensor | None,
    scale: float,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output `[B, S, H]` and `hidden = x·A_tᵀ` `[B, S, R]`, or both with one sequence of B·S.

    Args:
        x: `[B, S, D]`; the dtype of the computation. The matmuls accumulate in float32.
        mixing: `[M, P, K]`, any float dtype; None: a and b are the factors of M = K tasks, P = 1.
        a: `[P, K, R, D / P]`, any float dtype.
        b: `[P, K, R, H / P]`, any float dtype.
        task_ids: `[B]`, or None for M = B or M = 1.
        base: `[B, S, H]` or None; added inside the second matmul.
        scale: Factor of everything but the base.
        in_place: The base, in the dtype of x, may become the output.
    """
    tasks = a.shape[1] if mixing is None else mixing.shape[0]
    if tasks == 1:
        x, base = _as_one_sequence(x), None if base is None else _as_one_sequence(base)
        task_ids = None
    mixer = _Mixer(mixing, tasks, task_ids, scale, x.shape[0], x)
    hidden = torch.bmm(x, mixer.factors(mixer.for_a, a).transpose(1, 2))
    factor_b = mixer.factors(mixer.for_b, b)
    if base is None:
        return torch.bmm(hidden, factor_b), hidden
    if in_place:
        return base.baddbmm_(hidden, factor_b), hidden
    return torch.baddbmm(base.to(x.dtype), hidden, factor_b), hidden


def backward(
    grad_out: Tensor,
    x: Tensor | None,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    task_ids: Tensor | None,
    hidden: Tensor | None,
    scale: float,
    needs: tuple[bool, ...],
    d_linear: Tensor | None = None,
) -> Gradients:
    """Only the gradients that `needs` names, in the order of `Gradients`.

    `x` is needed for the gradients of `mixing` and `a`, `hidden` for those of `mixing` and `b`.
    Factors are mixed again: they may be larger than what the tokens keep. `d_linear`, like x, is
    what else belongs to d_x; it is overwritten.
    """
    needs_x, needs_mixing, needs_a, needs_b = needs
    splits = a.shape[0]
    tasks = a.shape[1] if mixing is None else mixing.shape[0]
    if tasks == 1:
        grad_out, task_ids = _as_one_sequence(grad_out), None
        x = None if x is None else _as_one_sequence(x)
        hidden = None if hidden is None else _as_one_sequence(hidden)
        d_linear = None if d_linear is None else _as_one_sequence(d_linear)
    mixer = _Mixer(mixing, tasks, task_ids, scale, grad_out.shape[0], grad_out)
    if needs_mixing:  # once for all uses
        a, b = a.to(mixer.wide), b.to(mixer.wide)
    d_x = d_mixing = d_a = d_b = None
    d_for_a = d_for_b = None
    if needs_x or needs_mixing or needs_a:
        d_hidden = torch.bmm(grad_out, mixer.factors(mixer.for_b, b).transpose(1, 2))
        if needs_x:
            factor_a = mixer.factors(mixer.for_a, a)
            d_x = (
                torch.bmm(d_hidden, factor_a)
                if d_linear is None
                else d_linear.baddbmm_(d_hidden, factor_a)
            )
        if x is not None and (needs_mixing or needs_a):
            d_factor_a = mixer.sums(torch.bmm(d_hidden.transpose(1, 2), x), splits)
            if needs_a:
                d_a = mixer.for_a.unmix(d_factor_a).view(a.shape)
            if needs_mixing:
                d_for_a = torch.bmm(d_factor_a, a.reshape(splits, a.shape[1], -1).transpose(1, 2))
    if hidden is not None and (needs_mixing or needs_b):
        d_factor_b = mixer.sums(torch.bmm(hidden.transpose(1, 2), grad_out), splits)
        if needs_b:
            d_b = mixer.for_b.unmix(d_factor_b).view(b.shape)
        if needs_mixing:
            d_for_b = torch.bmm(d_factor_b, b.reshape(splits, b.shape[1], -1).transpose(1, 2))
    if d_for_a is not None and d_for_b is not None:
        d_mixing = mixer.gradient(d_for_a, d_for_b)
    return Gradients(d_x, d_mixing, d_a, d_b)
