# SPDX-License-Identifier: Apache-2.0
"""Gates: how much of each adapter an instance gets.

PEMT's gate looks at the prompt only: the mean over the prompt positions, one row per sequence,
shared by all its tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PoolPromptFunction(torch.autograd.Function):
    """The states as they are and their pooled prompt; backward costs the prompt positions only.

    Its gradient is written into the gradient of the passed states. That one must be fresh and
    without another owner: the states that come out may only go into matmuls.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, states: Tensor, prompt_length: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.prompt_length = prompt_length
        ctx.save_for_backward(mask)
        return states, pool_prompt(states, prompt_length, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # noqa: D102
        ctx: Any, d_states: Tensor, d_pooled: Tensor
    ) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        share = 1 / ctx.prompt_length if mask is None else _share(mask, d_pooled.dtype)
        d_states[:, : ctx.prompt_length].add_(d_pooled.unsqueeze(1) * share)
        return d_states, None, None


def pool_in_passing(
    states: Tensor, prompt_length: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`states [B, S, D]` for the matmuls that follow, and `pool_prompt` of them."""
    if torch.compiler.is_compiling():  # which joins the passes of backward by itself
        return states, pool_prompt(states, prompt_length, mask)
    return PoolPromptFunction.apply(states, prompt_length, mask)


def pool_prompt(states: Tensor, prompt_length: int, mask: Tensor | None = None) -> Tensor:
    """Mean over the first `prompt_length` positions of `[B, S, D]`: `[B, D]`, at least float32.

    With `mask [B, prompt_length]`, over the positions for which it is true.
    """
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    states = states[:, :prompt_length]
    if mask is None:
        return states.mean(1, dtype=dtype)
    return (states.to(dtype) * _share(mask, dtype)).sum(1)


def _share(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What each prompt position counts for, `[B, P, 1]`."""
    return (mask.to(dtype) / mask.sum(1, keepdim=True)).unsqueeze(-1)


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
