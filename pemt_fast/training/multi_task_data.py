# SPDX-License-Identifier: Apache-2.0
"""The tasks of one model: their rows, what trainers need of them, and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from pemt_fast.data import (
    LabelStyle,
    Prefix,
    Task,
    get_task,
    load_splits,
    tokenize,
    with_prefix,
)
from pemt_fast.data.rows import Sources, source_of
from pemt_fast.data.template import MAX_SOURCE_LENGTH
from pemt_fast.training.fit import Rows, predict
from pemt_fast.training.metrics import compute
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.stages import TaskData

T = TypeVar("T")


def load_task(
    name: str | Task,
    data_dir: Sources,
    *,
    seed: int,
    few_shot: int | None = None,
    limit_train: int | None = None,
    limit_eval: int | None = None,
    label_style: LabelStyle = "name",
    prefix: Prefix = "none",
) -> TaskData:
    """A task's examples.

    `data_dir`: a folder of JSONL data sets; a mapping from the task's name to what `load_splits`
    takes; None: the hub.
    """
    task = get_task(name)
    splits = load_splits(
        task, source_of(data_dir, task), few_shot=few_shot, seed=seed, limit_train=limit_train,
        limit_eval=limit_eval, label_style=label_style, prefix=prefix,
    )  # fmt: skip
    return TaskData(
        task.name, task.description, splits, task, label_style=label_style, prefix=prefix
    )


def load_tasks(tasks: Sequence[str | Task], *where: Any, **options: Any) -> dict[str, TaskData]:
    """Several, by name; further arguments as in `load_task`."""
    return {get_task(task).name: load_task(task, *where, **options) for task in tasks}


def require_different(**lists: Sequence[Any]) -> None:
    """Raise unless each of the arguments holds a value and none twice."""
    for name, values in lists.items():
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must hold at least one value, all different, got {values}")


def common(values: Mapping[str, T]) -> T | dict[str, T]:
    """The value of all tasks, or that of each where they differ."""
    different = list(dict.fromkeys(values.values()))
    return different[0] if len(different) == 1 else dict(values)


def source_length(task: TaskData, options: TrainOptions) -> int:
    """Tokens of a source at most: those of the options or, where they name none, of the task."""
    own = task.metrics.max_source_length if isinstance(task.metrics, Task) else MAX_SOURCE_LENGTH
    return options.max_source_length or own


def encode_tasks(
    tasks: Mapping[str, TaskData],
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    part: str = "test",
    *,
    prefix: Prefix = "colon",
) -> tuple[list[dict[str, Any]], dict[str, Rows]]:
    """Training rows of all tasks with their `task_ids`, and the rows of another part of each.

    `prefix` puts the task's name in front of the sources, which have none yet: methods that take no
    notice of task ids see it too.
    """
    train: list[dict[str, Any]] = []
    others: dict[str, Rows] = {}
    for number, (name, task) in enumerate(tasks.items()):
        parts = {"train": task.splits.train, part: getattr(task.splits, part)}
        if empty := [own for own, examples in parts.items() if not examples]:
            raise ValueError(f"task {name!r}: the {empty[0]} part is empty")
        if task.prefix != "none":
            raise ValueError(f"task {name!r}: its sources must have no prefix yet")
        encoded = {
            own: tokenize(
                [replace(e, source=with_prefix(e.source, name, prefix)) for e in examples],
                tokenizer,
                max_source_length=source_length(task, options),
                max_target_length=options.max_target_length,
            )
            for own, examples in parts.items()
        }  # fmt: skip
        for rows in encoded.values():
            for row in rows:
                cast(dict[str, Any], row)["task_ids"] = number
        train += encoded["train"]
        others[name] = encoded[part]
    return train, others


def trainer_data(
    train: Sequence[Any], tokenizer: PreTrainedTokenizerBase, temperature: float
) -> dict[str, Any]:
    """What trainers take: the rows, the temperature of their sampling, the collator."""
    return {
        "train_dataset": train, "task_temperature": temperature,
        "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    }  # fmt: skip


def score_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskData],
    rows: Mapping[str, Rows],
    *,
    batch_size: int,
    max_length: int,
    part: str = "test",
) -> dict[str, dict[str, float]]:
    """Metrics in % of what the model writes, by task; `rows` are the encoded ones of `part`."""
    scores = {}
    for name, own in rows.items():
        texts = predict(model, tokenizer, own, batch_size=batch_size, max_length=max_length)
        scores[name] = compute(tasks[name].metrics, texts, list(getattr(tasks[name].splits, part)))
    return scores
