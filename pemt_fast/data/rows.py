# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of one original split: from a folder of JSON lines, from memory or from the hub.

A local folder mirrors the hub: ``<data set>__<configuration>/<split>.jsonl``, one JSON object per
line, columns and label numbers as the hub has them. Rows in memory are a mapping from split to
rows, such as a `datasets.DatasetDict`. The hub is asked only when neither is given.

Next: `load.py` makes train, validation and test of these rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pemt_fast.data.tasks import get_task
from pemt_fast.data.template import Row, Task

if TYPE_CHECKING:
    from datasets import DatasetDict

# A folder, the rows by split (a `DatasetDict` is one), or None for the hub.
Source = str | os.PathLike[str] | Mapping[str, Iterable[Row]] | None
# Where the rows of several tasks are: one place for all, or one for each by the task's name.
Sources = Source | Mapping[str, Source]


def source_of(data_dir: Sources, task: Task) -> Source:
    """Where the rows of one of several tasks are.

    Raises:
        ValueError: a mapping from names of tasks lacks this one.
    """
    if not isinstance(data_dir, Mapping):
        return data_dir
    if task.name not in data_dir:
        raise ValueError(
            f"data_dir has no entry for the task {task.name!r}; it has: {', '.join(data_dir)}"
        )
    return cast(Source, data_dir[task.name])


def available_splits(task: str | Task, data_dir: Source = None) -> tuple[str, ...]:
    """List the original splits of a task, in the local folder, in memory or on the hub."""
    task = get_task(task)
    if data_dir is None:
        return tuple(_load_from_hub(task))
    if isinstance(data_dir, Mapping):
        return tuple(data_dir)
    return tuple(sorted(path.stem for path in _find_folder(task, data_dir).glob("*.jsonl")))


def load_rows(task: str | Task, data_dir: Source = None, split: str = "train") -> list[Row]:
    """Read all rows of one original split.

    Args:
        task: a task or its name.
        data_dir: folder with a folder ``<task.folder>`` or ``<task.name>`` of ``<split>.jsonl``
            files, or with those files themselves; or a mapping from split to rows, a list of
            mappings or a `datasets.Dataset` each; None asks the hub through `datasets`.
        split: name of the original split, such as "train" or "validation_matched".

    Returns:
        One mapping per row, in the order of the source.

    Raises:
        FileNotFoundError: no such folder, file or data set, the message says what was found; or
            a task that is not on the hub, without a folder.
        TypeError: `data_dir` is none of these.
        ValueError: a line is not a JSON object (with its number), a row in memory is no mapping, or
            the split is empty.
    """
    task = get_task(task)
    if data_dir is None:
        return _rows_of(_load_from_hub(task), split, f"data set {task.dataset!r}")
    if isinstance(data_dir, Mapping):
        return _rows_of(data_dir, split, f"data_dir of task {task.name!r}")
    if not isinstance(data_dir, str | os.PathLike):
        raise TypeError(
            "data_dir must be a folder, a mapping from split to rows such as a "
            f"datasets.DatasetDict, or None, got {type(data_dir).__name__}"
        )
    return _read_jsonl(_find_folder(task, data_dir), split)


def _rows_of(parts: Mapping[str, Iterable[Row]], split: str, what: str) -> list[Row]:
    if split not in parts:
        raise FileNotFoundError(f"{what} has no split {split!r}; it has: {', '.join(parts)}")
    part = parts[split]
    rows: list[Row] = part.to_list() if hasattr(part, "to_list") else list(part)
    if not rows:
        raise ValueError(f"split {split!r} of {what} is empty")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"split {split!r} of {what}, row {number} (from 0): expected a mapping from column "
                f"to value, got {type(row).__name__}"
            )
    return rows


def _find_folder(task: Task, data_dir: str | os.PathLike[str]) -> Path:
    root = Path(data_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir must be an existing folder, got {str(root)!r}")
    for name in (task.folder, task.name):
        if (root / name).is_dir():
            return root / name
    if (root / f"{task.train_split}.jsonl").is_file():
        return root
    entries = sorted(path.name for path in root.iterdir())
    found = ", ".join(entries[:20]) + (", ..." if len(entries) > 20 else "")
    raise FileNotFoundError(
        f"no data of task {task.name!r} in {str(root)!r}: expected a folder {task.folder!r} or "
        f"{task.name!r}, or {task.train_split}.jsonl itself; found: {found or 'nothing'}"
    )


def _read_jsonl(folder: Path, split: str) -> list[Row]:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"no file {split}.jsonl in {str(folder)!r}; found: {found}")
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(path, number, line))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text ({error})") from error
    if not rows:
        raise ValueError(f"{path}: the file holds no rows")
    return rows


def _parse_line(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
    return row


def _load_from_hub(task: Task) -> DatasetDict:
    if task.dataset is None:
        raise FileNotFoundError(
            f"task {task.name!r} has no data set on the hub in the columns it needs; pass data_dir "
            f"with {task.folder}/{task.train_split}.jsonl"
        )
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "loading from the hub needs the package 'datasets'; install it or pass data_dir"
        ) from error
    try:
        return load_dataset(task.dataset, task.config)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"cannot load data set {task.dataset!r} (configuration {task.config!r}) from the hub: "
            f"{error}; for offline use pass data_dir with {task.folder}/{task.train_split}.jsonl"
        ) from error
