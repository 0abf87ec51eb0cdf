# SPDX-License-Identifier: Apache-2.0
"""PEMT's task prompt: vectors in front of the encoder input, tied to the prompts of the sources.

`P̃ = P + Σ_k dropout(softmax(P·P_kᵀ))·P_k` with the trained prompt `P [P, d_model]` and the frozen
source prompts `P_k [P_k, d_model]`, recomputed at every pass; no scale, no temperature.
Source: github JachinLin2022/PEMT, `T5Stack.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
        self.sources = _source_prompts(source_lengths, d_model)
        self.dropout = dropout

    @property
    def length(self) -> int:
        """Number of prompt positions."""
        return self.prompt.shape[0]

    @property
    def trained(self) -> list[Tensor]:
        """The prompts of the targets: one."""
        return [self.prompt]

    def forward(self) -> Tensor:
        """`[length, d_model]` in the dtype of the prompt."""
        return correlate(self.prompt, self.sources, self.dropout if self.training else 0.0)

    def rows(self, batch: int, task_ids: Tensor | None) -> Tensor:
        """The prompt of each sequence, `[B, length, d_model]`: the same for all."""
        return self().unsqueeze(0).expand(batch, -1, -1)

    def mask(self, task_ids: Tensor | None) -> Tensor | None:
        """Which positions of each sequence's prompt count: all of them, None."""
        return None

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        sources = [s.shape[0] for s in self.sources]
        return f"length={self.length}, source_lengths={sources}, dropout={self.dropout}"


class TargetPrompts(nn.Module):
    """One correlation-guided prompt per target over the same source prompts.

    Shorter prompts are filled up in front, with positions that no mask lets through: T5 knows
    distances only, so each sequence sees what it would see alone.

    Args:
        lengths: Prompt positions per target.
        d_model: Width of the model.
        source_lengths: Lengths of the frozen source prompts.
        dropout: As in `CorrelationPrompt`.
    """

    counts: Tensor

    def __init__(
        self,
        lengths: Sequence[int],
        d_model: int,
        source_lengths: Sequence[int] = (),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.prompts = nn.ParameterList(nn.Parameter(torch.zeros(n, d_model)) for n in lengths)
        self.sources = _source_prompts(source_lengths, d_model)
        self.dropout = dropout
        self.length = max(lengths)
        starts = torch.tensor([self.length - n for n in lengths])
        counts = torch.arange(self.length) >= starts.unsqueeze(1)  # [K, P]
        self.register_buffer("counts", counts, persistent=False)
        self._pads = len(set(lengths)) > 1

    @property
    def trained(self) -> list[Tensor]:
        """The prompts of the targets."""
        return list(self.prompts)

    def forward(self) -> Tensor:
        """`[K, length, d_model]`, shorter prompts at the end of their positions."""
        dropout = self.dropout if self.training else 0.0
        prompts = [correlate(prompt, self.sources, dropout) for prompt in self.prompts]
        return torch.stack([F.pad(p, (0, 0, self.length - p.shape[0], 0)) for p in prompts])

    def rows(self, batch: int, task_ids: Tensor) -> Tensor:
        """The prompt of each sequence, `[B, length, d_model]`."""
        # F.embedding adds up the gradients of a task's rows in a fixed order; an index would not.
        return F.embedding(task_ids, self().flatten(1)).unflatten(1, (self.length, -1))

    def mask(self, task_ids: Tensor) -> Tensor | None:
        """Which positions of each sequence's prompt count, `[B, length]`; None for all."""
        return self.counts[task_ids] if self._pads else None

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        lengths = [p.shape[0] for p in self.prompts]
        sources = [s.shape[0] for s in self.sources]
        return f"lengths={lengths}, source_lengths={sources}, dropout={self.dropout}"


@torch.no_grad()
def init_prompts(
    prompt: CorrelationPrompt | TargetPrompts,
    embedding: Tensor,
    token_ids: Sequence[Sequence[int] | None],
    draw_from: str,
) -> None:
    """Start the prompts, then the sources, from rows of a table, in place.

    Args:
        prompt: The prompts.
        embedding: `[V, d_model]`, the model's input embeddings.
        token_ids: Per prompt the tokens that choose its rows, repeated or cut to its length; None
            for random tokens.
        draw_from: `vocabulary`: rows of `embedding`; `normal`: the same rows of a table drawn from
            N(0, 1), so that equal tokens share a row, as PEMT's released code does.
    """
    table = embedding if draw_from == "vocabulary" else torch.randn(embedding.shape)
    for parameter, ids in zip((*prompt.trained, *prompt.sources), token_ids, strict=False):
        length = parameter.shape[0]
        if ids is None:
            rows = torch.randint(len(table), (length,))
        else:
            rows = torch.tensor([ids[i % len(ids)] for i in range(length)])
        parameter.copy_(table[rows.to(table.device)])


def correlate(prompt: Tensor, sources: Iterable[Tensor], dropout: float) -> Tensor:
    """`prompt + Σ_k dropout(softmax(prompt·source_kᵀ))·source_k` in the dtype of the prompt."""
    dtype = torch.float64 if prompt.dtype == torch.float64 else torch.float32
    # In float32: the scores are sums over d_model without a scale and saturate the softmax.
    wide, attended = prompt.to(dtype), None
    for source in sources:
        source = source.to(dtype)
        attention = torch.softmax(wide @ source.t(), dim=-1)
        found = F.dropout(attention, dropout, dropout > 0) @ source
        attended = found if attended is None else attended + found
    return prompt if attended is None else (attended + wide).to(prompt.dtype)


def _source_prompts(lengths: Sequence[int], d_model: int) -> nn.ParameterList:
    return nn.ParameterList(
        nn.Parameter(torch.zeros(n, d_model), requires_grad=False) for n in lengths
    )
