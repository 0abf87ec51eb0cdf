# SPDX-License-Identifier: Apache-2.0
"""The operators that a prefix network is searched among: `[P, C]` to `[P, C]`.

P prefix positions of C features. `h` is what the operator before it made, `seed` the trained input
of the whole network. Linear parts start with the variance of their output that of their input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


def _weight(out_features: int, in_features: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(out_features, in_features) / math.sqrt(in_features))


class Operator(nn.Module):
    """One operator.

    Args:
        width: C.
        rank: Of a low-rank operator.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """`[P, C]`."""
        raise NotImplementedError


class Nothing(Operator):
    """`0`."""

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        return torch.zeros_like(h)


class Identity(Operator):
    """`h`."""

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        return h


class Skip(Operator):
    """`seed`: past everything before."""

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        return seed


class Linear(Operator):
    """`h·Wᵀ + b`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        self.w = _weight(width, width)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        return F.linear(h, self.w, self.b)


class LowRank(Operator):
    """`h·Aᵀ·Bᵀ`, A `[rank, C]`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        self.a = _weight(rank, width)
        self.b = _weight(width, rank)

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        return F.linear(F.linear(h, self.a), self.b)


class Gated(Operator):
    """`(h·W_vᵀ + b_v) ⊙ σ(h·W_gᵀ + b_g)`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        self.w = _weight(2 * width, width)
        self.b = nn.Parameter(torch.zeros(2 * width))

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        return F.glu(F.linear(h, self.w, self.b))


class Mlp(Operator):
    """`act(h·W_1ᵀ + b_1)·W_2ᵀ + b_2`, C hidden units."""

    activation: str

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        self.w1, self.w2 = _weight(width, width), _weight(width, width)
        self.b1, self.b2 = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        hidden = _ACTIVATIONS[self.activation](F.linear(h, self.w1, self.b1))
        return F.linear(hidden, self.w2, self.b2)


class Convolution(Operator):
    """`Σ_j h_{p+j}·W_jᵀ + b` over the neighbouring positions, zeros beyond the ends."""

    kernel: int

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, rank)
        w = torch.randn(width, width, self.kernel) / math.sqrt(width * self.kernel)
        self.w = nn.Parameter(w)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, seed: Tensor) -> Tensor:
        """As in `Operator`."""
        return F.conv1d(h.t().unsqueeze(0), self.w, self.b, padding=self.kernel // 2)[0].t()


class MlpRelu(Mlp):
    """As `Mlp`."""

    activation = "relu"


class MlpGelu(Mlp):
    """As `Mlp`."""

    activation = "gelu"


class MlpSilu(Mlp):
    """As `Mlp`."""

    activation = "silu"


class MlpTanh(Mlp):
    """As `Mlp`."""

    activation = "tanh"


class Convolution3(Convolution):
    """Over 3 positions."""

    kernel = 3


class Convolution5(Convolution):
    """Over 5 positions."""

    kernel = 5


OPERATORS: dict[str, type[Operator]] = {
    "identity": Identity,
    "skip": Skip,
    "linear": Linear,
    "low_rank": LowRank,
    "gated": Gated,
    "mlp_relu": MlpRelu,
    "mlp_gelu": MlpGelu,
    "mlp_silu": MlpSilu,
    "mlp_tanh": MlpTanh,
    "conv3": Convolution3,
    "conv5": Convolution5,
    "none": Nothing,  # last: the first one is taken where nothing has been decided
}
