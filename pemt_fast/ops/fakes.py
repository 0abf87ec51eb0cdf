# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of what the registered operators return, for tracing: no values, no loops.

The same for every implementation. `T` may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    x: Tensor, w_up: Tensor, ranks: Sequence[int], *, with_hidden: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[..., H]`, hidden units `[..., N]`, what is saved `[T, N]`; empty if not wanted."""
    lead, n = x.shape[:-1], sum(ranks)
    tokens = 1
    for size in lead:
        tokens = tokens * size
    return (
        x.new_empty(*lead, w_up.shape[-1]),
        x.new_empty(*lead, n) if with_hidden else x.new_empty(0),
        x.new_empty(tokens, n) if save else x.new_empty(0),
    )


def backward(
    grad_out: Tensor | None,
    grad_hidden: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x and of `inputs` (gate, w_down, w_up, b_down, b_up), empty if not needed."""
    first = grad_out if grad_out is not None else grad_hidden
    assert first is not None
    like: list[Tensor | None] = [
        first.new_empty(*first.shape[:-1], inputs[1].shape[-1]),
        *(None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
          for t in inputs),
    ]  # fmt: skip
    return tuple(
        grad if wanted and grad is not None else first.new_empty(0)
        for grad, wanted in zip(like, needs, strict=True)
    )
