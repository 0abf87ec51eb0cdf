# SPDX-License-Identifier: Apache-2.0
"""Shape, dtype, device and task rules of `skill_mixture`, checked once, at the door.

Every message names the argument, the letters and sizes expected, and what came. The letters are
those of `skill_mixture.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pemt_fast.ops.validation import (
    _check_device_and_dtype,
    _require_shape,
    _require_tensor,
    check_linear,
)
from pemt_fast.ops.watchers import nobody_watches

_ID_DTYPES = (torch.int64, torch.int32)


def check_skill_mixture(
    x: Tensor,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    task_ids: Tensor | None,
    base: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Raise on the first broken rule."""
    for name, value in (("x", x), ("a", a), ("b", b)):
        _require_tensor(name, value)
    if x.dim() < 2:
        raise ValueError(f"x must be [B, ..., D], got shape {list(x.shape)}")
    d, h = _check_skills(a, b)
    if x.shape[-1] != d:
        raise ValueError(
            f"x must be [B, ..., D] with D = {d}, the width of a over all splits, "
            f"got {list(x.shape)}"
        )
    if mixing is None:
        if a.dim() != 3:
            raise ValueError(
                f"a must be [M, R, D], the factors of the tasks, when mixing is None, "
                f"got {list(a.shape)}"
            )
        tasks, table = a.shape[0], "a"
    else:
        _require_tensor("mixing", mixing)
        _check_mixing(mixing, a)
        tasks, table = mixing.shape[0], "mixing"
    if base is not None:
        _require_tensor("base", base)
        _require_shape("base", base, "[B, ..., H]", (*x.shape[:-1], h))
        if weight is not None:
            raise ValueError("base must be None when weight is given: the linear takes its place")
    if weight is not None:
        check_linear(x, h, weight, bias)
    elif bias is not None:
        raise ValueError("bias must be None when weight is: it belongs to the linear")
    _check_device_and_dtype({"x": x, "mixing": mixing, "a": a, "b": b, "base": base}, x.device)
    if task_ids is None:
        _check_rows(table, tasks, x.shape[0])
    else:
        _check_task_ids(table, task_ids, x, tasks)


def _check_skills(a: Tensor, b: Tensor) -> tuple[int, int]:
    """D and H over all splits."""
    if a.dim() not in (3, 4):
        raise ValueError(f"a must be [K, R, D] or [P, K, R, D / P], got shape {list(a.shape)}")
    if min(a.shape[:-1]) < 1:
        letters = "K >= 1 and R >= 1" if a.dim() == 3 else "P >= 1, K >= 1 and R >= 1"
        raise ValueError(f"a needs {letters}, got {list(a.shape)}")
    letters = "[K, R, H]" if a.dim() == 3 else "[P, K, R, H / P]"
    if b.dim() != a.dim():
        raise ValueError(f"b must be {letters}, like a, got shape {list(b.shape)}")
    _require_shape("b", b, letters, (*a.shape[:-1], b.shape[-1]))
    splits = 1 if a.dim() == 3 else a.shape[0]
    return splits * a.shape[-1], splits * b.shape[-1]


def _check_mixing(mixing: Tensor, a: Tensor) -> None:
    splits, skills = (1 if a.dim() == 3 else a.shape[0]), a.shape[-3]
    if mixing.dim() == 3 and mixing.shape[1] == splits and mixing.shape[2] == skills:
        return
    if mixing.dim() == 2 and splits == 1 and mixing.shape[1] == skills:
        return
    plain = f"[tasks, K] = [tasks, {skills}] or " if splits == 1 else ""
    raise ValueError(
        f"mixing must be {plain}[tasks, P, K] = [tasks, {splits}, {skills}], "
        f"got {list(mixing.shape)}"
    )


def _check_rows(table: str, rows: int, sequences: int) -> None:
    """Without task ids there is one row for all sequences or one for each."""
    if rows != 1 and rows != sequences:
        raise ValueError(
            f"{table} must have 1 row or one for each of the {sequences} sequences of x when "
            f"task_ids is None, got {rows}"
        )


def _check_task_ids(table: str, task_ids: Tensor, x: Tensor, tasks: int) -> None:
    _require_tensor("task_ids", task_ids)
    if task_ids.dtype not in _ID_DTYPES:
        raise TypeError(f"task_ids must be int64 or int32, got {task_ids.dtype}")
    _require_shape("task_ids", task_ids, "[B]", (x.shape[0],))
    if task_ids.device != x.device:
        raise ValueError(f"task_ids must be on {x.device}, the device of x, got {task_ids.device}")
    # Elsewhere than on the CPU looking would wait for the device, while tracing there is no value.
    if task_ids.device.type != "cpu" or not nobody_watches(task_ids):
        return
    for task in task_ids.tolist():
        if not 0 <= task < tasks:
            raise IndexError(
                f"task_ids must be from 0 to {tasks - 1}, {table} has {tasks} tasks, got {task}"
            )
