# SPDX-License-Identifier: Apache-2.0
"""Linear layers with low-rank adapters in parallel: LoRA and the mixtures of it.

`y = W·x + adapt(dropout(x))`, where `adapt` is linear in x for a given task: `x·downᵀ·up` with the
factors that `factors(task)` returns. What differs is how a task's factors come about; each
class gives its formula. Sums of products are here, with the arithmetic of `ops/adapter_mixture.py`;
products of averages are in `skill_linear.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt_fast.nn.mixture import AdapterMixture
from pemt_fast.nn.routers import Router
from pemt_fast.nn.routing import Routing, RoutingState, per_row
from pemt_fast.nn.wrapped_linear import (
    WrappedLinear,
    at_least_float,
    check_merges_into,
    is_plain,
)

# What an operator adds to, as its arguments: `base`, or `weight` and `bias` of the linear itself.
Beside = dict[str, Any]


class AdaptedLinear(WrappedLinear):
    """What all of them share.

    Args:
        base: The linear layer, `[H, D]`.
        routing: Shared with the wrapped model.
        scale: Factor of what the adapters add, α / r.
        dropout: On the adapters' input, in training.
    """

    takes_linear = False  # whether the operator behind `adapt` computes a plain base itself

    def __init__(self, base: Any, routing: Routing, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, routing)
        self.scale = scale
        self.dropout = dropout
        self.name = ""  # the wrapped model gives it one

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` to `[B, S, H]`."""
        if not self.routing.enabled or self._is_merged_now():
            return self.base(x)
        state, drops = self.routing.current(), self.training and self.dropout > 0
        if self.takes_linear and not drops and is_plain(self.base):
            return self.adapt(x, {"weight": self.weight, "bias": self.bias}, state)
        beside = {"base": self.base(x)}
        return self.adapt(F.dropout(x, self.dropout) if drops else x, beside, state)

    def adapt(self, x: Tensor, beside: Beside, state: RoutingState) -> Tensor:
        """What is beside the adapters plus what they make of x."""
        raise NotImplementedError

    def prepare(self, state: RoutingState, rows: int) -> Any:
        """What `adapt` makes of the task ids of `rows` sequences, the same in every step.

        `generate` calls it once and leaves the result in `state.prepared`. None: nothing.
        """
        return None

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

    takes_linear = True

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

    def prepare(self, state: RoutingState, rows: int) -> Tensor | None:
        """The gate."""
        return self._task_gate(state, rows)

    def _task_gate(self, state: RoutingState, rows: int) -> Tensor:
        """`[rows, E]`, or `[E]` where it is the same for all."""
        if self.router is None:
            return torch.full((len(self.mixture.ranks),), self.scale, device=self.weight.device)
        weights, task_rows = self.router(state.task_rows(rows), rows, state.may_be_unseen)
        if task_rows is not None:
            weights = F.embedding(task_rows, weights)
        elif len(weights) == 1:
            weights = weights[0]
        return self.scale * weights

    def adapt(self, x: Tensor, beside: Beside, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        return self.mixture(x, self._gate(x, state), **beside)

    def _gate(self, x: Tensor, state: RoutingState) -> Tensor:
        if self.name not in state.prepared:
            return self._task_gate(state, x.shape[0])
        gate: Tensor = state.prepared[self.name]
        return gate if gate.dim() == 1 else per_row(gate, x.shape[0])

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

    def adapt(self, x: Tensor, beside: Beside, state: RoutingState) -> Tensor:
        """As in `AdaptedLinear`."""
        return self.mixture(x, self._gate(x, state), **beside, w_up=self._up())

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """As in `AdaptedLinear`; the same for all tasks."""
        return self.mixture.w_down.detach(), self.scale * at_least_float(self._up())
