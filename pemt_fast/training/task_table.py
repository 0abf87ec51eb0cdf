# SPDX-License-Identifier: Apache-2.0
"""What is known about every task, as a table: `pemt-fast tasks` and docs/data.md show it."""

from __future__ import annotations

from pemt_fast.data import COMMONSENSE_TASKS, SOURCE_TASKS, TARGET_TASKS, TASKS, Task
from pemt_fast.data.tokenization import MAX_ANSWER_LENGTH, MAX_LABEL_LENGTH
from pemt_fast.training.options import published_batch_size, published_epochs

COLUMNS = (
    *("task", "role", "hub id", "source", "targets", "metrics", "validation / test"),
    *("tokens", "batch", "epochs"),
)


def task_rows() -> list[tuple[str, ...]]:
    """One row per entry of `TASKS`, in its order; the cells of `COLUMNS`."""
    return [_row(task) for task in TASKS.values()]


def markdown_table() -> str:
    """The table as Markdown, with a closing line break."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in task_rows()]
    return "\n".join(lines) + "\n"


def _row(task: Task) -> tuple[str, ...]:
    target = MAX_LABEL_LENGTH if task.labels or task.kind == "regression" else MAX_ANSWER_LENGTH
    stage = 1 if task.name in SOURCE_TASKS else 2
    return (
        task.name,
        _role(task.name),
        _hub(task),
        _source(task),
        _targets(task),
        ", ".join(task.metrics),
        _splits(task),
        f"{task.max_source_length} / {target}",
        str(published_batch_size(task.name, stage)),
        f"{published_epochs(task.name, stage):g}",
    )


def _role(name: str) -> str:
    roles = {"source": SOURCE_TASKS, "target": TARGET_TASKS, "commonsense": COMMONSENSE_TASKS}
    return ", ".join(role for role, names in roles.items() if name in names) or "–"


def _hub(task: Task) -> str:
    if task.dataset is None:
        return "– (local files)"
    return f"{task.dataset}, {task.config}" if task.config else task.dataset


def _source(task: Task) -> str:
    shown = " ".join(f"{marker}:" for marker, _ in task.source_fields)
    return f"{shown} A: B: …" if task.lettered else shown


def _targets(task: Task) -> str:
    if task.labels:
        return ", ".join(task.labels)
    if task.kind == "regression":
        return "0.0 to 5.0"
    if task.option_columns:
        return "text of the option; index: " + ("its letter" if task.lettered else "0, 1")
    return "every answer" if task.one_example_per_answer else "first answer"


def _splits(task: Task) -> str:
    train = "" if task.train_split == "train" else f", train {task.train_split}"
    cap = f", {task.train_cap} of train" if task.train_cap else ""
    named = " or ".join(task.test_splits)
    return (
        {
            "small": "halves of validation",
            "large": f"1000 of train / {named}",
            "mnli": "validation_mismatched / validation_matched",
            "official": "validation / test",
            "single": "a tenth of train / a tenth of train",
        }[task.split_rule]
        + train
        + cap
    )
