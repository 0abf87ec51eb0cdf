# SPDX-License-Identifier: Apache-2.0
"""What a row of a data set says is right: a class, an option, a score or answers.

Each function takes a task and a row of its schema and raises `ValueError`, with the name of the
task, where the row does not fit. Rows whose answer the hub withholds are refused by name.

Next: `template.py` calls these and explains the fields of a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pemt_fast.data.template import Row, Task

# The hub marks rows whose label is withheld, or where annotators did not agree, with this number.
HIDDEN_LABEL = -1
_HIDDEN_MESSAGE = (
    "task {!r}: this row has {}, as in the test parts whose answers the hub withholds; "
    "use a split with labels"
)


def text_of(task: Task, row: Row, column: str) -> str:
    """The text in a column, without white space around it."""
    return _stripped(task, column, row[column])


def _stripped(task: Task, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"task {task.name!r}: column {column!r} must be text, "
            f"got {type(value).__name__} {value!r}"
        )
    return value.strip()


def options_of(task: Task, row: Row) -> list[tuple[str, str]]:
    """The options of a row, each with what the label column calls it.

    Several `Task.option_columns` hold an option each. A single one holds all: a list of texts, or a
    mapping with the texts under ``text`` and what they are called under ``label``.
    """
    columns = task.option_columns
    if len(columns) > 1:
        texts = [text_of(task, row, column) for column in columns]
        return list(zip(task.option_keys, texts, strict=True))
    (column,) = columns
    cell = row[column]
    value: object = cell
    keys: object = task.option_keys
    if own := isinstance(cell, Mapping):
        value = cell.get("text")
        keys = cell.get("label")
    if not isinstance(value, list | tuple) or not isinstance(keys, list | tuple):
        raise ValueError(
            f"task {task.name!r}: column {column!r} must be a list of texts or a mapping with "
            f"lists under 'text' and 'label', got {cell!r}"
        )
    if len(value) > len(keys) or (own and len(value) != len(keys)):
        raise ValueError(
            f"task {task.name!r}: column {column!r} has {len(value)} options for "
            f"{len(keys)} labels: {cell!r}"
        )
    texts = [_stripped(task, column, text) for text in value]
    return list(zip((str(key) for key in keys), texts, strict=False))


def lettered(options: list[tuple[str, str]]) -> str:
    """Options as they stand in a source: ``A: first B: second``."""
    return " ".join(
        f"{letter}: {text}" for letter, (_, text) in zip(ascii_uppercase, options, strict=False)
    )


def label_index(task: Task, row: Row) -> int:
    """The number of the class or option, from zero."""
    value = row[task.label_column]
    if value == HIDDEN_LABEL or value == str(HIDDEN_LABEL) or value == "":
        raise ValueError(_HIDDEN_MESSAGE.format(task.name, f"a hidden label ({value!r})"))
    if task.option_columns:
        known = tuple(key for key, _ in options_of(task, row))
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
    else:
        known = task.labels or ()
    if isinstance(value, bool) and known == ("False", "True"):
        value = str(value)
    if isinstance(value, str) and value in known:
        return known.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(known):
        return value
    listed = ", ".join(f"{i} {text}" for i, text in enumerate(known))
    raise ValueError(
        f"task {task.name!r}: unknown label {value!r} in column {task.label_column!r}; "
        f"known labels: {listed}"
    )


def score_of(task: Task, row: Row) -> str:
    """A score from 0 to 5 to the nearest tenth."""
    value = row[task.label_column]
    if value == HIDDEN_LABEL:
        raise ValueError(_HIDDEN_MESSAGE.format(task.name, f"a hidden label ({value!r})"))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 5:
        raise ValueError(
            f"task {task.name!r}: column {task.label_column!r} must be a score from 0 to 5, "
            f"got {value!r}"
        )
    # Scaling first rounds ties the way numpy does, hence as in the published targets.
    return str(round(value * 10) / 10)


def answers_of(task: Task, row: Row) -> tuple[str, ...]:
    """All accepted answers, in the order of the row."""
    answers = row[task.label_column]
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if not isinstance(answers, list | tuple) or not all(isinstance(a, str) for a in answers):
        raise ValueError(
            f"task {task.name!r}: column {task.label_column!r} must be a list of texts or a "
            f"mapping with the list under 'text', got {row[task.label_column]!r}"
        )
    texts = tuple(answer.strip() for answer in answers if answer.strip())
    if not texts:
        nothing = f"no answer in column {task.label_column!r}"
        raise ValueError(_HIDDEN_MESSAGE.format(task.name, nothing))
    return texts
