# SPDX-License-Identifier: Apache-2.0
"""Routers: how much of each skill a task gets.

A router answers with rows of weights and, where the rows are those of the tasks, with the row of
each sequence; operators that mix once per task need both. A task that was not trained
(`UNSEEN_TASK`) gets the uniform average of the skills that all tasks share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt_fast.nn.routing import UNSEEN_TASK

# Added to the sum of a task's weights before dividing by it, as in the code of Poly.
_EPS = 1e-12

# Weights, and the row of each sequence; without the latter one row per sequence or one for all.
Rows = tuple[Tensor, Tensor | None]


class Router(nn.Module):
    """Weights of the skills for the tasks of a batch, at least float32."""

    def table(self) -> Tensor:
        """Weights of every task without noise, `[T, …, K]`."""
        raise NotImplementedError

    def unseen(self, table: Tensor) -> Tensor:
        """The row of a task that was not trained, like a row of `table`."""
        return torch.full_like(table[0], 1 / table.shape[-1])

    def forward(self, task_ids: Tensor | None, rows: int, may_be_unseen: bool = True) -> Rows:
        """Rows for `task_ids [rows]`; None where there is only one task.

        Without `may_be_unseen` no id is `UNSEEN_TASK`.
        """
        return self._select(self.table(), task_ids, may_be_unseen)

    def of_task(self, task: int) -> Tensor:
        """Weights of one task without noise."""
        table = self.table()
        return self.unseen(table) if task == UNSEEN_TASK else table[task]

    def _select(self, table: Tensor, task_ids: Tensor | None, may_be_unseen: bool) -> Rows:
        if task_ids is None or not may_be_unseen:
            return table, task_ids
        table = torch.cat([table, self.unseen(table).unsqueeze(0)])
        return table, torch.where(task_ids == UNSEEN_TASK, len(table) - 1, task_ids)


class SkillRouter(Router):
    """Poly's: a relaxed choice of skills per task, `σ(logits)` divided by its sum.

    In training logistic noise is added to the logits, drawn anew for every sequence (the
    Gumbel-sigmoid at temperature 1). Source: github huggingface/peft, tuners/poly/router.py.

    Args:
        num_tasks: T.
        num_skills: K.
        num_splits: P; more than one makes MHR's choice per split.
        noise: Whether to add the noise.
    """

    def __init__(
        self, num_tasks: int, num_skills: int, num_splits: int = 1, *, noise: bool = True
    ) -> None:
        super().__init__()
        logits = torch.empty(num_tasks, num_splits, num_skills).uniform_(-1e-3, 1e-3)
        self.logits = nn.Parameter(logits)
        self.noise = noise

    def table(self) -> Tensor:
        """`[T, K]`, with splits `[T, P, K]`."""
        return self._weights(wide(self.logits))

    def _weights(self, logits: Tensor) -> Tensor:
        chosen = torch.sigmoid(logits)
        total = chosen.sum(-1, keepdim=True) + _EPS
        # In place where autograd has not kept it: tables of many tasks are most of the memory.
        weights = chosen / total if chosen.requires_grad else chosen.div_(total)
        return weights.squeeze(-2) if self.logits.shape[1] == 1 else weights

    def forward(self, task_ids: Tensor | None, rows: int, may_be_unseen: bool = True) -> Rows:
        """As in `Router`; one row per sequence where there is noise."""
        if not (self.training and self.noise):
            return super().forward(task_ids, rows, may_be_unseen)
        logits = wide(self.logits)
        if task_ids is None:
            task_ids, may_be_unseen = logits.new_zeros(rows, dtype=torch.int64), False
        seen = task_ids.clamp_min(0) if may_be_unseen else task_ids
        # F.embedding adds up the gradients of a task's rows in a fixed order; an index would not.
        chosen = F.embedding(seen, logits.flatten(1)).view(rows, *logits.shape[1:])
        weights = self._weights(chosen + _logistic(chosen))
        if may_be_unseen:
            unseen = _per_row(task_ids == UNSEEN_TASK, weights)
            weights = torch.where(unseen, self.unseen(weights), weights)
        return weights, None

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        T, P, K = self.logits.shape
        return f"tasks={T}, skills={K}, splits={P}, noise={self.noise}"


class CustomizedRouter(Router):
    """C-Poly's `W = [W_A | W_B]`: A skills that all tasks choose from, B of each task's own.

    `W_A` is a `SkillRouter`; `W_B [T, T·B]` starts as a unit diagonal: every task uses its own
    skills with weight 1 and none of the others.

    Args:
        num_tasks: T.
        num_common: A; may be 0.
        num_specific: B; may be 0, which leaves Poly.
        trains_specific: Train all of `W_B`, so that tasks may come to use each other's skills;
            otherwise it stays as it is.
        noise: As in `SkillRouter`.
    """

    def __init__(
        self,
        num_tasks: int,
        num_common: int,
        num_specific: int,
        *,
        trains_specific: bool = False,
        noise: bool = True,
    ) -> None:
        super().__init__()
        self.common = SkillRouter(num_tasks, num_common, noise=noise) if num_common else None
        own = torch.eye(num_tasks).repeat_interleave(num_specific, 1)  # [T, T·B]
        self.specific = nn.Parameter(own, requires_grad=trains_specific)

    def table(self) -> Tensor:
        """`[T, A + T·B]`."""
        specific = wide(self.specific)
        if self.common is None:
            return specific
        return torch.cat([self.common.table(), specific], -1)

    def unseen(self, table: Tensor) -> Tensor:
        """Uniform over the common skills; without any, over the specific ones."""
        if self.common is None:
            return super().unseen(table)
        skills = self.common.logits.shape[-1]
        row = torch.zeros_like(table[0])
        row[:skills] = 1 / skills
        return row

    def forward(self, task_ids: Tensor | None, rows: int, may_be_unseen: bool = True) -> Rows:
        """As in `Router`."""
        if self.common is None or not (self.training and self.common.noise):
            return super().forward(task_ids, rows, may_be_unseen)
        common, _ = self.common(task_ids, rows, may_be_unseen)
        specific = wide(self.specific)
        if task_ids is None:
            specific = specific.expand(rows, -1)
        else:
            specific = F.embedding(task_ids.clamp_min(0), specific)
            if may_be_unseen:
                specific = specific * _per_row(task_ids != UNSEEN_TASK, specific)
        return torch.cat([common, specific], -1), None

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"tasks={self.specific.shape[0]}, specific={self.specific.shape[1]}"


class TaskEmbeddingRouter(Router):
    """MoE-LoRA's: `softmax(W_g·e_t)` with an embedding `e_t` per task.

    Source: github pUmpKin-Co/MTL-LoRA, src/adapter/moelora.py; its table of embeddings has one row
    more than there are tasks, and so has this one.

    Args:
        num_tasks: T.
        num_skills: Number of experts.
        width: Of an embedding.
    """

    def __init__(self, num_tasks: int, num_skills: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_tasks + 1, width))
        self.w_gate = nn.Parameter(torch.empty(num_skills, width))
        nn.init.kaiming_uniform_(self.w_gate, a=5**0.5)

    def table(self) -> Tensor:
        """`[T, E]`."""
        return torch.softmax(wide(self.embedding[:-1]) @ wide(self.w_gate).t(), -1)


def wide(tensor: Tensor) -> Tensor:
    """In float32, float64 as it is; differentiable."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _per_row(flags: Tensor, like: Tensor) -> Tensor:
    """`[rows]` for the rows of a tensor of more dimensions."""
    return flags.view(-1, *(1,) * (like.dim() - 1))


def _logistic(like: Tensor) -> Tensor:
    """Noise of the logistic distribution, `log u − log(1 − u)`."""
    return torch.rand_like(like).logit_(torch.finfo(like.dtype).eps)
