# SPDX-License-Identifier: Apache-2.0
"""Gates: how much of each adapter an instance gets.

PEMT's gate looks at the prompt only: the mean over the prompt positions, one row per sequence,
shared by all its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pool_prompt(states: Tensor, prompt_length: int, mask: Tensor | None = None) -> Tensor:
    """Mean over the first `prompt_length` positions of `[B, S, D]`: `[B, D]`, at least float32.

    With `mask [B, prompt_length]`, over the positions for which it is true.
    """
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    states = states[:, :prompt_length]
    if mask is None:
        return states.mean(1, dtype=dtype)
    share = mask.to(dtype) / mask.sum(1, keepdim=True)
    return (states.to(dtype) * share.unsqueeze(-1)).sum(1)


def drop_below(gate: Tensor, threshold: float) -> Tensor:
    """Gate weights `[B, E]` with 0 for those below `threshold`; the others sum to 1 again.

    The largest one of each row stays, whatever it is.
    """
    kept = gate >= gate.amax(-1, keepdim=True).clamp_max(threshold)
    gate = gate * kept
    return gate / gate.sum(-1, keepdim=True)


class PooledGate(nn.Module):
    """`softmax(pooled · w_gate)`; `w_gate [D, E]` starts at zero, so the gate starts uniform."""

    def __init__(self, in_features: int, num_adapters: int) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.zeros(in_features, num_adapters))

    def forward(self, pooled: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """`pooled [B, D]` to gate weights `[B, E]` that sum to 1, at least float32.

        All sequences share the gate, whatever `task_ids` says; see `TargetGates`.
        """
        return torch.softmax(torch.mm(pooled, self.w_gate.to(pooled.dtype)), dim=-1)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"D={self.w_gate.shape[0]}, E={self.w_gate.shape[1]}"
