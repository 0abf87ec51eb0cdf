# SPDX-License-Identifier: Apache-2.0
"""What a wrapped model makes of its arguments: prompts in front of the text, checked task ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pemt_fast.nn.routing import UNSEEN_TASK

# One id or name per sequence of the batch.
TaskIds: TypeAlias = Tensor | Sequence[int] | Sequence[str]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_task_ids(
    task_ids: TaskIds | None,
    tasks: Sequence[str],
    batch: int,
    device: torch.device,
    *,
    knows_unseen: bool = False,
) -> Tensor | None:
    """The task of each sequence as `[B]` int64 on `device`; None where there is only one task.

    With `knows_unseen`, `UNSEEN_TASK` is an id like any other.

    Values are checked where that waits for nothing: not those of a tensor on a GPU, whose own
    indexing asserts them, and not while compiling.

    Raises:
        ValueError: none are given though there are several tasks, or one is not a task.
        TypeError: they are not integers or names.
    """
    known = ", ".join(f"{i}: {name}" for i, name in enumerate(tasks))
    if task_ids is None:
        if len(tasks) > 1:
            raise ValueError(
                f"task_ids must give the task of each of the {batch} sequences ({known}), got None"
            )
        return None
    if not isinstance(task_ids, Tensor):
        task_ids = torch.tensor([_number(t, tasks, known) for t in task_ids], dtype=torch.int64)
    if task_ids.dtype not in _INTEGERS:
        raise TypeError(f"task_ids must be integers or names of tasks, got {task_ids.dtype}")
    if task_ids.shape != (batch,):
        raise ValueError(
            f"task_ids must have shape [B] = [{batch}], one per sequence, "
            f"got {list(task_ids.shape)}"
        )
    least = UNSEEN_TASK if knows_unseen else 0
    looks = task_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and batch and not least <= int(task_ids.min()) <= int(task_ids.max()) < len(tasks):
        unseen = f", or {UNSEEN_TASK} for one that was not trained" if knows_unseen else ""
        raise ValueError(f"task_ids must be among {known}{unseen}; got {task_ids.tolist()}")
    return task_ids.to(device, torch.int64) if len(tasks) > 1 or knows_unseen else None


def _number(task: int | str, tasks: Sequence[str], known: str) -> int:
    if not isinstance(task, str):
        return task
    if task not in tasks:
        raise ValueError(f"task_ids must be among {known}; got {task!r}")
    return tasks.index(task)


def prepend_prompt(
    embeddings: Tensor, attention_mask: Tensor | None, prompt: Tensor, prompt_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`[prompt, text]` along the positions, and the mask that covers both.

    Args:
        embeddings: `[B, S, H]`.
        attention_mask: `[B, S]`; None where every position counts.
        prompt: `[B, P, H]`.
        prompt_mask: `[B, P]`; None where every position counts.
    """
    states = torch.cat([prompt.to(embeddings.dtype), embeddings], 1)
    if attention_mask is None and prompt_mask is None:
        return states, None
    if attention_mask is None:
        attention_mask = torch.ones(
            embeddings.shape[:2], dtype=torch.int64, device=embeddings.device
        )
    return states, prepend_mask(attention_mask, prompt.shape[1], prompt_mask)


def prepend_mask(attention_mask: Tensor, positions: int, prompt_mask: Tensor | None) -> Tensor:
    """`attention_mask [B, S]` with the prompt's part in front: `[B, P + S]`."""
    if prompt_mask is None:
        front = attention_mask.new_ones(attention_mask.shape[0], positions)
    else:
        front = prompt_mask.to(attention_mask.dtype)
    return torch.cat([front, attention_mask], 1)
