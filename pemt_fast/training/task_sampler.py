# SPDX-License-Identifier: Apache-2.0
"""Order of the examples of several tasks: mixed batches, small tasks not forgotten.

Every example is drawn by first drawing its task, task t of n_t examples with probability
`n_t^(1/τ) / Σ n^(1/τ)`: temperature τ = 1 is proportional to size, a large one draws all tasks
equally often. Within a task the examples come in random order, each once before any comes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TaskSampler(Sampler[int]):
    """Indices of examples for a data loader.

    Args:
        task_ids: The task of every example.
        temperature: τ, at least 1.
        num_samples: Indices per epoch; by default as many as there are examples.
        seed: With the epoch (`set_epoch`) it decides the order.

    Raises:
        ValueError: there is no example, or the temperature is below 1.
    """

    def __init__(
        self,
        task_ids: Sequence[int],
        *,
        temperature: float = 1.0,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not len(task_ids):
            raise ValueError("task_ids must hold at least one example, got none")
        if not temperature >= 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        ids = torch.as_tensor(task_ids, dtype=torch.int64)
        self._examples = [(ids == task).nonzero().flatten() for task in ids.unique().tolist()]
        sizes = torch.tensor([len(own) for own in self._examples], dtype=torch.float64)
        # Divided by the largest first: a power of a large number overflows.
        shares = (sizes / sizes.max()) ** (1 / temperature)
        self.probabilities = shares / shares.sum()
        self.num_samples = len(ids) if num_samples is None else num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order in every epoch; the trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        tasks = torch.multinomial(
            self.probabilities, self.num_samples, replacement=True, generator=generator
        )
        waiting: list[list[int]] = [[] for _ in self._examples]
        for task in tasks.tolist():
            if not waiting[task]:
                own = self._examples[task]
                waiting[task] = own[torch.randperm(len(own), generator=generator)].tolist()
            yield waiting[task].pop()
