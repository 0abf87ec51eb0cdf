# SPDX-License-Identifier: Apache-2.0
"""Linear layers with low-rank adapters in parallel: LoRA and the mixtures of it.

`y = W·x + adapt(dropout(x))`, where `adapt` is linear in x for a given task: `x·downᵀ·up` with the
factors that `factors(task)` returns. What differs is how a task's factors come about; each
class gives its formula. The arithmetic is in `ops/adapter_mixture.py` (sums of products) and
`ops/skill_mixture.py` (products of averages).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt_fast.nn.mixture import AdapterMixture
from pemt_fast.nn.routers import Router, wide
from pemt_fast.nn.routing import UNSEEN_TASK, Routing, RoutingState
from pemt_fast.nn.wrapped_linear import WrappedLinear, at_least_float, check_merges_into
from pemt_fast.ops.skill_mixture import skill_mixture


class AdaptedLinear(WrappedLinear):
    """What all of them share.

    Args:
        base: The linear layer, `[H, D]`.
        routing: Shared with the wrapped model.
        scale: Factor of what the adapters add, α / r.
        dropout: On the adapters' input, in training.
    """

    def __init__(self, base: Any, routing: Routing, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, routing)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, H]`."""
        out = self.base(x)
        if not self.routing.enabled or self._is_merged_now():
            return out
        state = self.routing.current()
        return self.adapt(F.dropout(x, self.dropout, self.training), out, state)

    def adapt(self, x: Tensor, base: Tensor, state: RoutingState) -> Tensor:
        """`base` plus what the adapters make of x."""
        raise NotImplementedError

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """`down [N, D]` and `up [N, H]` of a task, without noise and with the scale in `up`."""
        raise NotImplementedError

    def merged_delta(self, task: int | None = None) -> Tensor:
        """As in `WrappedLinear`: `upᵀ·down` of the task."""
        check_merges_into(self.base)
        down, up = self.factors(0 if task is None else task)
        return at_least_float(up).t() @ at_least_float(down)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"scale={self.scale:g}, dropout={self.dropout}"


class MixtureLinear(AdaptedLinear):
    """`y = W·x + scale·Σ_e g_e·B_e·A_e·x`: LoRA, MoE-LoRA and C-Poly are of this form.

    Args:
        base, routing, scale, dropout: As in `AdaptedLinear`.
        ranks: One per adapter.
        router: The weights g per task; None for 1 each, as in LoRA.
        impl: Implementation of the operator.
    """

    def __init__(
        self,
        base: Any,
        routing: Routing,
        ranks: tuple[int, ...],
        router: Router | None = None,
        *,
        scale: float,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(base, routing, scale=scale, dropout=dropout)
        out_features, in_features = base.weight.shape
        self.mixture = AdapterMixture(
            in_features, out_features, ranks, activation="identity", bias=False, impl=impl
        )
        nn.init.zeros_(self.mixture.w_up)
        self.router = router

    def _gate(self, x: Tensor, state: RoutingState) -> Tensor:
        if self.router is None:
            return torch.full((len(self.mixture.ranks),), self.scale, device=x.device)
        rows = x.shape[0]
        weights, task_rows = self.router(state.task_rows(rows), rows)
        if task_rows is not None:
            weights = F.embedding(task_rows, weights)
        elif len(weights) == 1:
            weights = weights[0]
        return self.scale * weights

    def adapt(self, x: Tensor, base: Tensor, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        return self.mixture(x, self._gate(x, state), base)

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """As in `AdaptedLinear`: the adapters one below the other, N = ΣR."""
        up, ranks = at_least_float(self.mixture.w_up), self.mixture.ranks
        if self.router is None:
            return self.mixture.w_down.detach(), self.scale * up
        weights = self.scale * self.router.of_task(task).detach()
        per_unit = weights.repeat_interleave(torch.tensor(ranks, device=weights.device))
        return self.mixture.w_down.detach(), up * per_unit.unsqueeze(1)


class MultiLoraLinear(MixtureLinear):
    """`y = W·x + scale·Σ_i s_i ⊙ (B_i·A_i·x)` with trained `s_i [H]` that start at 0.

    A and B start Kaiming-uniform. Source: github pUmpKin-Co/MTL-LoRA, src/adapter/multilora.py.
    """

    def __init__(self, base: Any, routing: Routing, ranks: tuple[int, ...], **options: Any) -> None:
        super().__init__(base, routing, ranks, None, **options)
        self.mixture.reset_parameters()
        self.scaling = nn.Parameter(torch.zeros(len(ranks), base.weight.shape[0]))

    def _up(self) -> Tensor:
        w_up, ranks = self.mixture.w_up, self.mixture.ranks
        scaling = torch.cat([s.expand(r, -1) for s, r in zip(self.scaling, ranks, strict=True)])
        return w_up * scaling.to(w_up.dtype)

    def adapt(self, x: Tensor, base: Tensor, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        return self.mixture(x, self._gate(x, state), base, w_up=self._up())

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """As in `AdaptedLinear`; the same for all tasks."""
        return self.mixture.w_down.detach(), self.scale * at_least_float(self._up())


class SkillLinear(AdaptedLinear):
    """`y = W·x + scale·(Σ_k w_k·B_k)·(Σ_k w_k·A_k)·x`: Poly, with splits MHR.

    Args:
        base, routing, scale, dropout: As in `AdaptedLinear`.
        rank: R of every skill.
        router: The weights w per task.
        num_skills: K.
        num_splits: P, a divisor of both widths of the layer.
    """

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
    ) -> None:
        super().__init__(base, routing, scale=scale, dropout=dropout)
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

    def adapt(self, x: Tensor, base: Tensor, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        rows = x.shape[0]
        mixing, task_rows = self.router(state.task_rows(rows), rows)
        return skill_mixture(
            x, mixing, self.a, self.b, task_ids=task_rows, base=base, scale=self.scale
        )

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """As in `AdaptedLinear`, N = R."""
        weights = self.router.of_task(task).detach()
        down, up = (
            torch.einsum("...k,...krd->...rd", weights.to(skills.dtype), skills)
            for skills in (at_least_float(self.a), at_least_float(self.b))
        )
        if weights.dim() > 1:  # [P, R, D / P]: splits share the hidden units
            down, up = down.transpose(0, 1).flatten(1), up.transpose(0, 1).flatten(1)
        return down, self.scale * up


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
    """

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
    ) -> None:
        super().__init__(base, routing, scale=scale, dropout=dropout)
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

    def adapt(self, x: Tensor, base: Tensor, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        down, up = self._pairs()
        task_ids = state.task_rows(x.shape[0])
        tasks = len(down)
        mixing = torch.eye(tasks, device=x.device)
        if task_ids is not None:
            mixing = torch.cat([mixing, mixing.new_full((1, tasks), 1 / tasks)])
            task_ids = torch.where(task_ids == UNSEEN_TASK, tasks, task_ids)
        return skill_mixture(x, mixing, down, up, task_ids=task_ids, base=base, scale=self.scale)

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """As in `AdaptedLinear`."""
        down, up = (at_least_float(pairs) for pairs in self._pairs())
        if task == UNSEEN_TASK:
            return down.mean(0), self.scale * up.mean(0)
        return down[task], self.scale * up[task]
