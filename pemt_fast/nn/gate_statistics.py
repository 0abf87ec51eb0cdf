# SPDX-License-Identifier: Apache-2.0
"""What the gates chose, summed up while sequences pass: mean weights and how decided they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class GateStatistics:
    """Means of gate weights over all sequences seen so far, by layer.

    The sums stay on the device of the gates, in double precision: adding waits for nothing.

    Args:
        sources: Names of the E experts.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self._sums: dict[str, Tensor] = {}  # [E + 2]: weights, entropies, number of sequences

    def add(self, gates: Mapping[str, Tensor]) -> None:
        """Count the weights `[B, E]` of a forward pass, by layer."""
        for layer, gate in gates.items():
            weights = gate.detach().double()
            entropy = torch.special.entr(weights).sum(-1)
            rows = weights.new_full((1,), len(weights))
            sums = torch.cat([weights.sum(0), entropy.sum().unsqueeze(0), rows])
            self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums = {}

    def reduce(self) -> None:
        """Add up what all processes have counted; every process must call it."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            for layer in sorted(self._sums):
                distributed.all_reduce(self._sums[layer])

    def means(self) -> dict[str, list[float]]:
        """Mean weight of every expert, by layer; empty if nothing was counted."""
        return {layer: (s[:-2] / s[-1]).tolist() for layer, s in self._sums.items()}

    def metrics(self, prefix: str = "gate") -> dict[str, float]:
        """Means over the layers, as a trainer logs them.

        Returns:
            `{prefix}_{source}` for every expert, and `{prefix}_entropy`: the entropy of a
            sequence's gate as a part of the largest possible, 1 where all weigh the same, 0 where
            one has all. Empty if nothing was counted.
        """
        if not self._sums:
            return {}
        means = torch.stack([s[:-1] / s[-1] for s in self._sums.values()]).mean(0).tolist()
        named = {f"{prefix}_{name}": m for name, m in zip(self.sources, means[:-1], strict=True)}
        return named | {f"{prefix}_entropy": means[-1] / math.log(max(len(self.sources), 2))}
