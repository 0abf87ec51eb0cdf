# SPDX-License-Identifier: Apache-2.0
"""`AdapterMixture`: the parameters of many stacked adapters.

Weights of all adapters lie in one packed `[N, width]` tensor each, so that the operator needs no
copy and unequal ranks cost nothing. The arithmetic is `ops/adapter_mixture.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pemt_fast.nn.bottleneck import BottleneckAdapter
from pemt_fast.ops.adapter_mixture import adapter_mixture, adapter_mixture_with_hidden
from pemt_fast.ops.linear_mixture import linear_mixture
from pemt_fast.ops.target_mixture import mixture_with_target


class AdapterMixture(nn.Module):
    """`base + Σ_e gate_e·(act(x·w_down[e]ᵀ + b_down[e])·w_up[e] + b_up[e])` with own parameters.

    Args:
        in_features: D.
        out_features: H.
        ranks: One bottleneck width per adapter.
        activation: A name of `adapter_mixture`.
        bias: Whether the adapters have biases.
        impl: Implementation of the operator.

    Attributes:
        w_down: `[N, D]`, rows of adapter e at `rows(e)`.
        w_up: `[N, H]`.
        b_down: `[N]` or None.
        b_up: `[E, H]` or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        *,
        activation: str,
        bias: bool,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.activation = activation
        self.impl = impl
        n = sum(self.ranks)
        self.w_down = nn.Parameter(torch.empty(n, in_features))
        self.w_up = nn.Parameter(torch.empty(n, out_features))
        self.b_down = nn.Parameter(torch.empty(n)) if bias else None
        self.b_up = nn.Parameter(torch.empty(len(self.ranks), out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-uniform weights per adapter, zero biases."""
        for e, rank in enumerate(self.ranks):
            nn.init.kaiming_uniform_(self.w_down[self.rows(e)], a=math.sqrt(5))
            # fan-in of the up-projection is R, not H: the rows of w_up are its columns.
            nn.init.uniform_(self.w_up[self.rows(e)], -(rank**-0.5), rank**-0.5)
        for bias in (self.b_down, self.b_up):
            if bias is not None:
                nn.init.zeros_(bias)

    def rows(self, e: int) -> slice:
        """Rows of adapter `e` in the packed weights."""
        start = sum(self.ranks[:e])
        return slice(start, start + self.ranks[e])

    @torch.no_grad()
    def set_adapter(
        self,
        e: int,
        down: Tensor,
        up: Tensor,
        b_down: Tensor | None = None,
        b_up: Tensor | None = None,
    ) -> None:
        """Copy one adapter given in `nn.Linear` layout.

        Args:
            e: Which adapter.
            down: `[R, D]`.
            up: `[H, R]`.
            b_down: `[R]`.
            b_up: `[H]`.
        """
        rows = self.rows(e)
        pairs = [(self.w_down[rows], down), (self.w_up[rows], up.t())]
        if self.b_down is not None and self.b_up is not None:
            if b_down is None or b_up is None:
                raise ValueError(f"adapter {e} needs biases, got none")
            pairs += [(self.b_down[rows], b_down), (self.b_up[e], b_up)]
        for own, given in pairs:
            if own.shape != given.shape:
                raise ValueError(
                    f"adapter {e} must have shape {list(own.shape)}, got {list(given.shape)}"
                )
            own.copy_(given)

    def forward(
        self,
        x: Tensor,
        gate: Tensor,
        base: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        w_up: Tensor | None = None,
    ) -> Tensor:
        """`x [..., D]`, `gate` as in `adapter_mixture`; returns `[..., H]`.

        `weight [H, D]` and `bias [H]` of a linear make the base, if they are given. `w_up [N, H]`
        stands for the parameter where something is made of it first.
        """
        parameters = self.w_down, self.w_up if w_up is None else w_up, self.b_down, self.b_up
        if weight is not None:
            return linear_mixture(
                x, weight, gate, *parameters, activation=self.activation, bias=bias,
                impl=self.impl, ranks=self.ranks,
            )  # fmt: skip
        return adapter_mixture(
            x, gate, *parameters, activation=self.activation, base=base, impl=self.impl,
            ranks=self.ranks,
        )  # fmt: skip

    def forward_with_hidden(
        self, x: Tensor, gate: Tensor, base: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with the ungated hidden units `[..., N]`."""
        return adapter_mixture_with_hidden(
            x, gate, self.w_down, self.w_up, self.b_down, self.b_up,
            activation=self.activation, base=base, impl=self.impl, ranks=self.ranks,
        )  # fmt: skip

    def beside(
        self, linear: nn.Linear, x: Tensor, gate: Tensor, *, with_hidden: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`linear(x)` plus the mixture, in one call; the hidden units `[..., N]` if asked for."""
        found = linear_mixture(
            x, linear.weight, gate, self.w_down, self.w_up, self.b_down, self.b_up,
            activation=self.activation, bias=linear.bias, impl=self.impl, ranks=self.ranks,
            with_hidden=with_hidden,
        )  # fmt: skip
        return found if isinstance(found, tuple) else (found, None)

    def then(
        self, adapter: BottleneckAdapter, x: Tensor, gate: Tensor, base: Tensor | None
    ) -> Tensor:
        """`adapter(y, y)` of `y = self(x, gate, base)`, without gradients: one call."""
        return mixture_with_target(
            x, gate, self.w_down, self.w_up, self.b_down, self.b_up, activation=self.activation,
            base=base, target=adapter.as_target(), impl=self.impl, ranks=self.ranks,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"D={self.w_down.shape[1]}, H={self.w_up.shape[1]}, ranks={self.ranks}, "
            f"activation={self.activation}"
        )
