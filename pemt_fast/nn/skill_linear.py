# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose tasks have one low-rank pair each, made of parts that they share.

Poly and MHR average skills, MTL-LoRA transforms between shared projections. The arithmetic is in
`ops/skill_mixture.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pemt_fast.nn.adapted_linear import AdaptedLinear, Beside
from pemt_fast.nn.routers import Router, wide
from pemt_fast.nn.routing import UNSEEN_TASK, Routing, RoutingState, per_row
from pemt_fast.nn.wrapped_linear import at_least_float
from pemt_fast.ops.skill_mixture import skill_mixture


class TaskFactors(NamedTuple):
    """Low-rank pairs of tasks, and the pair of each sequence; None where there is only one."""

    down: Tensor  # [M, R, D]
    up: Tensor  # [M, R, H], with the scale
    task_ids: Tensor | None  # [B]

    def to(self, dtype: torch.dtype) -> TaskFactors:
        """In another dtype."""
        return self._replace(down=self.down.to(dtype), up=self.up.to(dtype))

    def adapt(self, x: Tensor, beside: Beside, impl: str) -> Tensor:
        """`beside` plus what the pairs make of `x [B, S, D]`; beams have rows of their own."""
        task_ids = per_row(self.task_ids, x.shape[0])
        return skill_mixture(x, None, self.down, self.up, task_ids=task_ids, **beside, impl=impl)


class SkillLinear(AdaptedLinear):
    """`y = W·x + scale·(Σ_k w_k·B_k)·(Σ_k w_k·A_k)·x`: Poly, with splits MHR.

    Args:
        base, routing, scale, dropout: As in `AdaptedLinear`.
        rank: R of every skill.
        router: The weights w per task.
        num_skills: K.
        num_splits: P, a divisor of both widths of the layer.
        impl: Implementation of the operator.
    """

    takes_linear = True

    def __init__(
        self,
        base: Any,
        routing: Routing,
        rank: int,
        router: Router,
        num_skills: int,
        num_splits: int = 1,
        *,
        scale: float,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(base, routing, scale=scale, dropout=dropout)
        self.impl = impl
        out_features, in_features = base.weight.shape
        for name, width in (("input", in_features), ("output", out_features)):
            if width % num_splits:
                raise ValueError(
                    f"num_splits must divide the {name} width {width} of the layer, "
                    f"got {num_splits}"
                )
        splits = (num_splits,) if num_splits > 1 else ()
        d, h = in_features // num_splits, out_features // num_splits
        bound = math.sqrt(1 / d)  # Kaiming-uniform with a = √5, for each skill and split
        self.a = nn.Parameter(torch.empty(*splits, num_skills, rank, d).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(*splits, num_skills, rank, h))
        self.router = router

    def prepare(self, state: RoutingState, rows: int) -> TaskFactors:
        """The factors of all tasks, or those of each sequence if there are fewer of them.

        Always with those of an unseen task: a compiled step keeps its shapes.
        """
        mixing, task_rows = self.router(state.task_rows(rows), rows)
        if task_rows is not None and len(mixing) > rows:
            mixing, task_rows = mixing[task_rows], torch.arange(rows, device=mixing.device)
        down, up = self._mixed(mixing)
        # Rounded here, once, instead of in every step; a quantised weight has no dtype for that.
        weight = self.weight if self.weight.is_floating_point() else self.a
        return TaskFactors(down, self.scale * up, task_rows).to(weight.dtype)

    def adapt(self, x: Tensor, beside: Beside, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        if self.name in state.prepared:
            return state.prepared[self.name].adapt(x, beside, self.impl)
        rows = x.shape[0]
        mixing, task_rows = self.router(state.task_rows(rows), rows, state.may_be_unseen)
        return skill_mixture(
            x, mixing, self.a, self.b, task_ids=task_rows, scale=self.scale, impl=self.impl,
            **beside,
        )  # fmt: skip

    def _mixed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`[M, R, D]` and `[M, R, H]` of `weights [M, K]` or `[M, P, K]`; splits side by side."""
        if weights.dim() == 2:
            a, b = (
                torch.einsum("mk,krd->mrd", weights.to(s.dtype), s)
                for s in (wide(self.a), wide(self.b))
            )
            return a, b
        a, b = (
            torch.einsum("mpk,pkrd->mrpd", weights.to(s.dtype), s).flatten(2)
            for s in (wide(self.a), wide(self.b))
        )
        return a, b

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """As in `AdaptedLinear`, N = R."""
        down, up = self._mixed(self.router.of_task(task).unsqueeze(0))
        return down[0].detach(), self.scale * up[0].detach()


class MtlLoraLinear(AdaptedLinear):
    """`y = W·x + scale·Σ_i softmax(w_t / τ)_i·B_i·Λ_t·A·x` for task t.

    Starts with `Λ_t = I`, `B_i = 0`, A and w Kaiming-uniform. Per task it is one low-rank pair,
    `Λ_t·A` and `Σ_i softmax(w_t / τ)_i·B_i`; an unseen task gets the mean of both over the tasks.
    Source: github pUmpKin-Co/MTL-LoRA, src/adapter/mlora.py.

    Args:
        base, routing, scale, dropout: As in `AdaptedLinear`.
        rank: R.
        num_tasks: T.
        num_up: n, the number of up-projections.
        temperature: τ.
        diagonal: `Λ_t` holds the diagonal only.
        impl: Implementation of the operator.
    """

    takes_linear = True

    def __init__(
        self,
        base: Any,
        routing: Routing,
        rank: int,
        num_tasks: int,
        num_up: int,
        temperature: float,
        *,
        diagonal: bool = False,
        scale: float,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(base, routing, scale=scale, dropout=dropout)
        self.impl = impl
        out_features, in_features = base.weight.shape
        self.temperature = temperature
        self.a = nn.Parameter(torch.empty(rank, in_features))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        start = torch.ones(rank) if diagonal else torch.eye(rank)
        self.transforms = nn.Parameter(start.repeat(num_tasks, *(1,) * start.dim()))
        self.b = nn.Parameter(torch.zeros(num_up, rank, out_features))
        self.logits = nn.Parameter(torch.empty(num_tasks, num_up))
        nn.init.kaiming_uniform_(self.logits, a=math.sqrt(5))

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """`[T, R, D]` and `[T, R, H]`, the low-rank pair of every task."""
        if self.transforms.dim() == 2:
            down = self.transforms.unsqueeze(-1) * self.a
        else:
            down = self.transforms @ self.a
        weights = torch.softmax(wide(self.logits) / self.temperature, -1).to(self.b.dtype)
        return down, torch.einsum("tn,nrh->trh", weights, self.b)

    def prepare(self, state: RoutingState, rows: int) -> TaskFactors:
        """The pairs of all tasks, and always those of an unseen one, as in `SkillLinear`."""
        return self._task_factors(state.task_rows(rows), may_be_unseen=True)

    def _task_factors(self, task_ids: Tensor | None, *, may_be_unseen: bool) -> TaskFactors:
        down, up = self._pairs()
        if task_ids is not None and may_be_unseen:
            down, up = (torch.cat([pairs, pairs.mean(0, keepdim=True)]) for pairs in (down, up))
            task_ids = torch.where(task_ids == UNSEEN_TASK, len(down) - 1, task_ids)
        return TaskFactors(down, self.scale * up, task_ids)

    def adapt(self, x: Tensor, beside: Beside, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        if self.name in state.prepared:
            return state.prepared[self.name].adapt(x, beside, self.impl)
        task_ids, may_be_unseen = state.task_rows(x.shape[0]), state.may_be_unseen
        factors = self._task_factors(task_ids, may_be_unseen=may_be_unseen)
        return factors.adapt(x, beside, self.impl)

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """As in `AdaptedLinear`."""
        down, up = (at_least_float(pairs) for pairs in self._pairs())
        if task == UNSEEN_TASK:
            return down.mean(0), self.scale * up.mean(0)
        return down[task], self.scale * up[task]
