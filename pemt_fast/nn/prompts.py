# SPDX-License-Identifier: Apache-2.0
"""PEMT's task prompt: vectors in front of the encoder input, tied to the prompts of the sources.

`P̃ = P + Σ_k dropout(softmax(P·P_kᵀ))·P_k` with the trained prompt `P [P, d_model]` and the frozen
source prompts `P_k [P_k, d_model]`, recomputed at every pass; no scale, no temperature.
Source: github JachinLin2022/PEMT, `T5Stack.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CorrelationPrompt(nn.Module):
    """The correlation-guided task prompt; without sources, a plain soft prompt.

    Args:
        length: Number of prompt positions.
        d_model: Width of the model.
        source_lengths: Lengths of the frozen source prompts; they may differ.
        dropout: Dropout on the attention over source positions, in training only.
    """

    def __init__(
        self, length: int, d_model: int, source_lengths: Sequence[int] = (), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(length, d_model))
        self.sources = nn.ParameterList(
            nn.Parameter(torch.zeros(n, d_model), requires_grad=False) for n in source_lengths
        )
        self.dropout = dropout

    @property
    def length(self) -> int:
        """Number of prompt positions."""
        return self.prompt.shape[0]

    def forward(self) -> Tensor:
        """`[length, d_model]` in the dtype of the prompt."""
        if not len(self.sources):
            return self.prompt
        dtype = torch.float64 if self.prompt.dtype == torch.float64 else torch.float32
        # In float32: the scores are sums over d_model without a scale and saturate the softmax.
        prompt = self.prompt.to(dtype)
        attended = torch.zeros_like(prompt)
        for source in self.sources:
            source = source.to(dtype)
            attention = torch.softmax(prompt @ source.t(), dim=-1)
            attention = F.dropout(attention, self.dropout, self.training)
            attended = attended + attention @ source
        return (attended + prompt).to(self.prompt.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        sources = [s.shape[0] for s in self.sources]
        return f"length={self.length}, source_lengths={sources}, dropout={self.dropout}"
