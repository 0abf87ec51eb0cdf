# SPDX-License-Identifier: Apache-2.0
"""What a model with several targets holds once per target, chosen by each sequence's task id.

The target adapters are one `AdapterMixture` whose gate is the task's one-hot row, the prompts are
`TargetPrompts`; the gates and layer norms are here. Gradients of a task's rows are added up in a
fixed order: no atomics.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt_fast.nn.routing import Routing


class TargetGates(nn.Module):
    """`softmax(pooled · w_gate[task])`; `w_gate [K, D, E]` starts at zero."""

    def __init__(self, num_targets: int, in_features: int, num_adapters: int) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.zeros(num_targets, in_features, num_adapters))

    def forward(self, pooled: Tensor, task_ids: Tensor) -> Tensor:
        """`pooled [B, D]`, `task_ids [B]` to gate weights `[B, E]`, at least float32."""
        K, D, E = self.w_gate.shape
        # All K gates are a few hundred columns: cheaper than B copies of [D, E].
        columns = self.w_gate.to(pooled.dtype).transpose(0, 1).reshape(D, K * E)
        scores = torch.mm(pooled, columns).view(-1, K, E)
        rows = task_ids.view(-1, 1, 1).expand(-1, 1, E)
        return torch.softmax(scores.gather(1, rows).squeeze(1), dim=-1)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        K, D, E = self.w_gate.shape
        return f"targets={K}, D={D}, E={E}"


class TargetNorm(nn.Module):
    """A layer norm of T5 with trained weights per target in place of its own.

    Args:
        base: T5's layer norm; it stays as it is, and is what runs while adapters are disabled.
        num_targets: K; every target starts from T5's weights.
        routing: Shared with the wrapped model.
    """

    def __init__(self, base: Any, num_targets: int, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.weights = nn.Parameter(base.weight.detach().repeat(num_targets, 1))  # [K, d_model]
        # T5's own arithmetic, whichever class it is, with a weight that changes nothing.
        self.unit = copy.deepcopy(base)
        del self.unit.weight
        self.unit.register_buffer("weight", torch.ones_like(base.weight), persistent=False)

    @property
    def weight(self) -> Tensor:
        """T5's own weight."""
        return self.base.weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, d_model]` to the same."""
        if not self.routing.enabled:
            return self.base(hidden_states)
        task_ids = self.routing.current().task_rows(hidden_states.shape[0])
        assert task_ids is not None  # the wrapped model asks for them
        return F.embedding(task_ids, self.weights).unsqueeze(1) * self.unit(hidden_states)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"targets={self.weights.shape[0]}"
