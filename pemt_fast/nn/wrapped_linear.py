# SPDX-License-Identifier: Apache-2.0
"""`WrappedLinear`: what every module does that takes the place of a linear layer of the model.

It keeps the layer, shows its weight and bias as its own, and can add what its adapters do to the
weight and take it away again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pemt_fast.nn.routing import Routing


class WrappedLinear(nn.Module):
    """A linear layer with something in parallel.

    Args:
        base: The layer.
        routing: Shared with the wrapped model.
    """

    def __init__(self, base: Any, routing: Routing) -> None:
        super().__init__()
        self.base: Any = base
        self.routing = routing
        self._unmerged: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """That of the layer: models look at its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """That of the layer."""
        return self.base.bias

    def merged_delta(self, task: int | None = None) -> Tensor:
        """What `merge` adds to the weight for a task, `[H, D]`, at least float32.

        Raises:
            ValueError: it depends on the input, or is not linear; the message says which.
        """
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapters."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self, task: int | None = None) -> None:
        """Add the adapters to the weight; the old values are kept for `unmerge`."""
        weight, delta = self.base.weight, self.merged_delta(task)
        self._unmerged = weight.data
        weight.data = (weight.data.to(delta.dtype) + delta).to(weight.dtype)

    def unmerge(self) -> None:
        """Give the weight its values of before `merge`, bit by bit."""
        if self._unmerged is not None:
            weight = self.base.weight
            weight.data = self._unmerged.to(weight.device, weight.dtype)
            self._unmerged = None

    def release(self) -> None:
        """Leave the layer as it was found; called before it goes back to its place."""
        self.unmerge()

    def _is_merged_now(self) -> bool:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapters are merged into the weights: unmerge() before training them"
            )
        return self.merged


def is_plain(base: nn.Module) -> bool:
    """Whether an operator may read the weight itself: no forward of its own, no hooks."""
    hooks = (
        base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks
    )  # fmt: skip
    plain = type(base) is nn.Linear and type(base.weight) is nn.Parameter
    return plain and not any(hooks)


def check_merges_into(base: nn.Module) -> None:
    """Raise unless `base` is a plain linear layer with a floating-point weight."""
    weight = base.weight
    if (
        type(base) is not nn.Linear
        or not isinstance(weight, Tensor)
        or not weight.is_floating_point()
    ):
        raise ValueError(
            f"the layer must be a plain nn.Linear to merge into, got {type(base).__name__}"
        )


def at_least_float(weight: Tensor) -> Tensor:
    """The values of a parameter in float32, float64 ones as they are."""
    return weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
