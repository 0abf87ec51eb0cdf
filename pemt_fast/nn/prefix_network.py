# SPDX-License-Identifier: Apache-2.0
"""The networks that make a prefix, their search and what remains of them.

A network is a chain of cells on a trained seed, `h_0 = seed`, and a projection to keys and values:

    h_l = Σ_o w_lo·o(h_{l-1}, seed), w_l from softmax(α_l / τ)     while it is searched
    h_l = o_l(h_{l-1}, seed), o_l = argmax_o α_lo                   afterwards
    [K; V] = h_L·W_outᵀ

The temperature τ falls, the weight of the entropy of the softmax rises and the share of `none`
fades out over the search, so that the mixture has all but decided before the argmax does. The form
is that of differentiable architecture search (Liu et al., "DARTS", 2019); PEML's own search space
is not published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pemt_fast.nn.prefix_operators import OPERATORS
from pemt_fast.sharding import whole

# The logit of what cannot be chosen; finite, so that 0 times its logarithm is 0.
_CLOSED = -1e4


class SearchSchedule(nn.Module):
    """Where the search is, for all cells; not part of a checkpoint.

    Args:
        temperature: At the start and at the end, between them geometric.
        entropy_weight: At the end; it rises from 0 in a straight line.
    """

    temperature: Tensor
    entropy_weight: Tensor
    none_share: Tensor

    def __init__(self, temperature: tuple[float, float], entropy_weight: float) -> None:
        super().__init__()
        self.bounds = temperature
        self.final_entropy_weight = entropy_weight
        # Tensors: a compiled step does not look at their values.
        self.register_buffer("temperature", torch.tensor(temperature[0]), persistent=False)
        self.register_buffer("entropy_weight", torch.tensor(0.0), persistent=False)
        # Part of its softmax that `none` keeps: it falls from 1 to 0 in a straight line.
        self.register_buffer("none_share", torch.tensor(1.0), persistent=False)

    def at(self, progress: float) -> None:
        """Set all of it for a part of the search, 0 to 1."""
        first, last = self.bounds
        self.temperature.fill_(first * (last / first) ** progress)
        self.entropy_weight.fill_(self.final_entropy_weight * progress)
        self.none_share.fill_(1 - progress)


class Logits(nn.Module):
    """`α [L, operators]` of one network, or of all that share their architecture.

    In the first cell `skip` is `identity`: where there is both it has no weight.
    """

    closed: Tensor
    is_none: Tensor

    def __init__(self, depth: int, operators: Sequence[str], schedule: SearchSchedule) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(depth, len(operators)))
        self.operators = tuple(operators)
        self.schedule = schedule
        closed = torch.zeros(depth, len(operators), dtype=torch.bool)
        if {"identity", "skip"} <= set(operators):
            closed[0, self.operators.index("skip")] = True
        self.register_buffer("closed", closed, persistent=False)
        is_none = torch.tensor([name == "none" and len(operators) > 1 for name in operators])
        self.register_buffer("is_none", is_none, persistent=False)

    def weights(self) -> Tensor:
        """What each operator is multiplied with, at least float32, sums of 1.

        `softmax(α / τ)` of all but `none`, times what `none` leaves: it gets the part of its own
        softmax that the schedule says, at the end of the search nothing.
        """
        scaled = self._scaled()
        others = scaled.masked_fill(self.is_none, _CLOSED).softmax(-1)
        none = (scaled.softmax(-1) * self.is_none).sum(-1, keepdim=True)
        none = none * self.schedule.none_share
        return torch.where(self.is_none, none, (1 - none) * others)

    def entropy(self) -> Tensor:
        """Of the softmax over all but `none`, mean over the cells, a part of its largest value."""
        # Of logarithms, not of the weights: where one has underflowed to 0 the gradient of
        # `torch.special.entr` is not a number.
        logs = self._scaled().masked_fill(self.is_none, _CLOSED).log_softmax(-1)
        choices = (~(self.closed | self.is_none)).sum(-1)
        most = choices.clamp_min(2).to(logs.dtype).log()
        return (-(logs.exp() * logs).sum(-1) / most).mean()

    def _scaled(self) -> Tensor:
        alpha = whole(self.alpha)  # the loss and the log read it outside of the layers
        wide = alpha if alpha.dtype == torch.float64 else alpha.float()
        return (wide / self.schedule.temperature).masked_fill(self.closed, _CLOSED)

    def decided(self) -> tuple[str, ...]:
        """The operator of each cell with the largest weight; `none` only where there is no other.

        What `none` takes the others can make up for by larger values, so its weight says little.
        """
        alpha = whole(self.alpha.detach()).masked_fill(self.closed | self.is_none, _CLOSED)
        return tuple(self.operators[i] for i in alpha.argmax(-1).tolist())


class MixedCell(nn.Module):
    """All operators at once."""

    def __init__(self, operators: Sequence[str], width: int, rank: int) -> None:
        super().__init__()
        self.operators = nn.ModuleDict({name: OPERATORS[name](width, rank) for name in operators})

    def forward(self, h: Tensor, seed: Tensor, weights: Tensor) -> Tensor:
        """`[P, C]` from `weights [operators]`."""
        parts = torch.stack([operator(h, seed) for operator in self.operators.values()])
        return torch.einsum("o,opc->pc", weights.to(parts.dtype), parts)


class PrefixNetwork(nn.Module):
    """Seeds to keys and values.

    Args:
        operators: Names to search among, or None with an `architecture`.
        architecture: The operator of each cell, or None while it is searched.
        depth: L.
        width: C.
        rank: Of low-rank operators.
        out_features: Of keys and values together.
        out_std: Standard deviation of keys and values at the start, about.
        logits: Of the search; None with an architecture.
    """

    def __init__(
        self,
        operators: Sequence[str],
        architecture: Sequence[str] | None,
        depth: int,
        width: int,
        rank: int,
        out_features: int,
        *,
        out_std: float,
        logits: Logits | None = None,
    ) -> None:
        super().__init__()
        self.logits = logits if architecture is None else None
        if architecture is None:
            cells: list[nn.Module] = [MixedCell(operators, width, rank) for _ in range(depth)]
        else:
            cells = [OPERATORS[name](width, rank) for name in architecture]
        self.cells = nn.ModuleList(cells)
        self.out = nn.Parameter(torch.randn(out_features, width) * (out_std / math.sqrt(width)))

    def forward(self, seed: Tensor) -> Tensor:
        """`[P, C]` to `[P, out_features]`."""
        h, weights = seed, None if self.logits is None else self.logits.weights()
        for i, cell in enumerate(self.cells):
            h = cell(h, seed) if weights is None else cell(h, seed, weights[i])
        return h @ self.out.t()

    @torch.no_grad()
    def take(self, searched: PrefixNetwork, architecture: Sequence[str]) -> None:
        """Copy the values of the chosen operators of a searched network, and its projection."""
        for cell, mixed, name in zip(self.cells, searched.cells, architecture, strict=True):
            assert isinstance(mixed, MixedCell)
            cell.load_state_dict(mixed.operators[name].state_dict())
        self.out.copy_(searched.out)


class SearchedPrefix(nn.Module):
    """Where a layer's prefix comes from: a seed of its own and a network, which may be shared."""

    def __init__(self, network: PrefixNetwork, length: int, width: int) -> None:
        super().__init__()
        self.network = network
        self.seed = nn.Parameter(torch.randn(length, width))

    def forward(self) -> Tensor:
        """`[P, out_features]`."""
        found: Tensor = self.network(self.seed)
        return found


class ConstantPrefix(nn.Module):
    """A prefix as such: trained directly, as in prefix tuning, or what a network has made.

    Args:
        length: P.
        out_features: Of keys and values together.
        out_std: Standard deviation of the values at the start.
    """

    def __init__(self, length: int, out_features: int, out_std: float) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(length, out_features) * out_std)

    def forward(self) -> Tensor:
        """`[P, out_features]`."""
        return self.both
