# SPDX-License-Identifier: Apache-2.0
"""Makes the train, validation and test parts of a task from its original splits.

Benchmarks keep their test labels to themselves, so the published code makes its own test part. The
rule is in `Task.split_rule`; all cuts use a `torch.randperm` seeded with 42 unless told otherwise:

* small: the original validation part is cut in half, first half validation, second half test;
* large: 1000 training rows (at most a tenth of a small folder) become validation, the original
  validation part, or the official test part where `Task.test_splits` names one, becomes the test;
* mnli: mismatched is validation, matched is test; official: parts are taken as they come;
* single: of the only part a tenth becomes validation and a tenth test.

A local folder is treated exactly like the hub: a ``test.jsonl`` that the rule does not name is left
alone, so a score means the same wherever the rows came from.

Next: `rows.py` reads the rows, `template.py` writes the texts, `tokenization.py` makes the ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pemt_fast.data.rows import Source, available_splits, load_rows
from pemt_fast.data.style import LabelStyle, Prefix, require_style
from pemt_fast.data.tasks import get_task
from pemt_fast.data.template import Example, Row, Task

__all__ = ["Source", "Splits", "available_splits", "load_rows", "load_splits"]

logger = logging.getLogger("pemt_fast")

LARGE_VALIDATION_ROWS = 1000


@dataclass(frozen=True)
class Splits:
    """The three parts of a task, ready to be tokenized."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def digest(self) -> str:
        """A short hash of all texts in their order: another one means other data."""
        state = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            texts = [(e.source, e.target, e.references, e.group) for e in part]
            state.update(json.dumps(texts).encode())
        return state.hexdigest()[:16]


@dataclass(frozen=True)
class _Part:
    """Rows of one original split and the order in which some of them are used."""

    split: str
    rows: Sequence[Row]
    order: list[int]


def load_splits(
    task: str | Task,
    data_dir: Source = None,
    *,
    few_shot: int | None = None,
    seed: int = 42,
    limit_train: int | None = None,
    limit_eval: int | None = None,
    label_style: LabelStyle = "name",
    prefix: Prefix = "none",
) -> Splits:
    """Make the train, validation and test parts of a task by the published rules.

    Args:
        task: a task or its name.
        data_dir: as in `load_rows`.
        few_shot: train on this many rows per class, or in total where there are no classes. For
            sets whose training part is not cut, the drawn rows are the published ones; for the
            others they avoid the rows held out for validation.
        seed: seed of every cut, draw and limit.
        limit_train: at most this many training examples, drawn at random.
        limit_eval: at most this many examples each in validation and test, drawn at random.
            NOTE: MultiRC's exact match needs whole groups and is too high on a limited part.
        label_style: "name" or "index", see `style.py`.
        prefix: "none", "name" or "colon", see `style.py`.

    Returns:
        Lists of examples.

    Raises:
        ValueError: a style or prefix is unknown, a count is below 1, both `few_shot` and
            `limit_train` are given, a class has too few rows, a part comes out empty, or a row does
            not fit the task.
        FileNotFoundError, TypeError: as in `load_rows`.
    """
    task = get_task(task)
    require_style(label_style, prefix)
    counts = {"few_shot": few_shot, "limit_train": limit_train, "limit_eval": limit_eval}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {count}")
    if few_shot is not None and limit_train is not None:
        raise ValueError("pass few_shot or limit_train, not both")

    train, validation, test = _cut(task, data_dir, seed)
    if few_shot is not None:
        train = _draw_few_shot(task, train, few_shot, seed)
    style = (label_style, prefix)
    return Splits(
        train=_format(task, train, style, limit_train, seed, training=True),
        validation=_format(task, validation, style, limit_eval, seed),
        test=_format(task, test, style, limit_eval, seed),
    )


def _cut(task: Task, data_dir: Source, seed: int) -> tuple[_Part, _Part, _Part]:
    """Apply the split rule; train, validation, test."""
    train = _whole(task, data_dir, task.train_split)
    if task.split_rule == "single":
        return _cut_single(task, train, seed)
    if task.split_rule == "mnli":
        held_out = _whole(task, data_dir, "validation_mismatched")
        return train, held_out, _whole(task, data_dir, "validation_matched")
    if task.split_rule == "official":
        return train, _whole(task, data_dir, "validation"), _whole(task, data_dir, "test")
    if task.split_rule == "small":
        original = _whole(task, data_dir, "validation")
        _require_two(task, original)
        half = len(original.rows) // 2
        order = _permutation(len(original.rows), seed)
        return (
            train,
            _Part("validation", original.rows, order[:half]),
            _Part("validation", original.rows, order[half:]),
        )
    _require_two(task, train)
    held = max(1, min(LARGE_VALIDATION_ROWS, len(train.rows) // 10))
    order = _permutation(len(train.rows), seed)
    present = available_splits(task, data_dir)
    test_split = next((s for s in task.test_splits if s in present), task.test_splits[0])
    logger.info("task %s: test part is the original split %r", task.name, test_split)
    return (
        _Part(train.split, train.rows, order[held:][: task.train_cap]),
        _Part(train.split, train.rows, order[:held]),
        _whole(task, data_dir, test_split),
    )


def _cut_single(task: Task, train: _Part, seed: int) -> tuple[_Part, _Part, _Part]:
    """A tenth each for validation and test, at least one row."""
    if len(train.rows) < 3:
        raise ValueError(
            f"task {task.name!r}: split {train.split!r} must have at least 3 rows to be cut into "
            f"three parts, got {len(train.rows)}"
        )
    held = max(1, len(train.rows) // 10)
    order = _permutation(len(train.rows), seed)
    cuts = (order[2 * held :][: task.train_cap], order[:held], order[held : 2 * held])
    first, second, third = (_Part(train.split, train.rows, cut) for cut in cuts)
    return first, second, third


def _whole(task: Task, data_dir: Source, split: str) -> _Part:
    rows = load_rows(task, data_dir, split)
    if task.drop_unlabelled:
        labelled = [row for row in rows if not task.is_unlabelled(row)]
        if not labelled:
            raise ValueError(f"task {task.name!r}: no row of split {split!r} has a label")
        if len(labelled) < len(rows):
            logger.info(
                "task %s: left out %d rows of split %r without a label",
                *(task.name, len(rows) - len(labelled), split),
            )
        rows = labelled
    return _Part(split, rows, list(range(len(rows))))


def _require_two(task: Task, part: _Part) -> None:
    if len(part.rows) < 2:
        raise ValueError(
            f"task {task.name!r}: split {part.split!r} must have at least 2 rows to be cut into "
            f"two parts, got {len(part.rows)}"
        )


def _permutation(count: int, seed: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()


def _draw_few_shot(task: Task, part: _Part, count: int, seed: int) -> _Part:
    """Walk through the shuffled rows and keep the first `count` of every class."""
    order = list(part.order)
    # Python's generator, not torch's: the published draw uses it.
    random.Random(seed).shuffle(order)
    if task.kind != "classification":
        if len(order) < count:
            raise ValueError(
                f"task {task.name!r}: few_shot={count} but there are only {len(order)} rows to "
                "train on"
            )
        return _Part(part.split, part.rows, order[:count])

    chosen: dict[str, list[int]] = {label: [] for label in task.label_texts()}
    kept: list[int] = []
    for index in order:
        label = task.class_of(part.rows[index])
        if label is not None and len(chosen[label]) < count:
            chosen[label].append(index)
            kept.append(index)
        if len(kept) == count * len(chosen):
            break
    for label, rows in chosen.items():
        if len(rows) < count:
            raise ValueError(
                f"task {task.name!r}: few_shot={count} but class {label!r} has only {len(rows)} "
                "training rows"
            )
    return _Part(part.split, part.rows, kept)


def _format(
    task: Task,
    part: _Part,
    style: tuple[LabelStyle, Prefix],
    limit: int | None,
    seed: int,
    *,
    training: bool = False,
) -> list[Example]:
    order = part.order
    if limit is not None and limit < len(order):
        order = [order[i] for i in _permutation(len(order), seed)[:limit]]
    examples: list[Example] = []
    for index in order:
        row = part.rows[index]
        try:
            if training:
                examples.extend(task.format_for_training(row, *style))
            else:
                examples.append(task.format(row, *style))
        except ValueError as error:
            raise ValueError(f"split {part.split!r}, row {index} (from 0): {error}") from error
    return examples[:limit]
