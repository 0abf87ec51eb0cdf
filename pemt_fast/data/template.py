# SPDX-License-Identifier: Apache-2.0
"""How one row of a data set becomes a pair of texts for a text-to-text model.

A `Task` is a table entry: which columns are shown under which markers, what the target text is,
which metrics judge it and how its splits are made. `Task.format` turns a row of the hub's schema
into an `Example`: ``premise: ... hypothesis: ...`` as the source, a class name, a score or an
answer as the target.

Next: `style.py` has the choices there are, `tasks.py` the entries; `load.py` cuts the splits,
`tokenization.py` makes the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Literal, get_args

from pemt_fast.data.answers import (
    HIDDEN_LABEL,
    answers_of,
    label_index,
    lettered,
    options_of,
    score_of,
    text_of,
)
from pemt_fast.data.style import LabelStyle, Prefix, require_style, with_prefix

Row = Mapping[str, object]
Kind = Literal["classification", "regression", "qa"]
SplitRule = Literal["small", "large", "mnli", "official", "single"]

# Tokens of a source in the published scripts, but for MultiRC and question answering.
MAX_SOURCE_LENGTH = 256


@dataclass(frozen=True)
class Example:
    """One source and target text.

    Attributes:
        source: text given to the encoder.
        target: text the decoder is trained on.
        references: every text accepted as right at evaluation; holds `target`.
        group: rows with the same group are scored together (MultiRC: one question).
        task: name of the task, for messages and for mixing tasks in one batch.
        is_label: the target comes from a closed set of short texts and must never be cut.
    """

    source: str
    target: str
    references: tuple[str, ...]
    group: str | None = None
    task: str = ""
    is_label: bool = False


@dataclass(frozen=True)
class Task:
    """Everything the library knows about one data set.

    Attributes:
        name: short name, key of `TASKS`.
        description: one sentence; its tokens give the initial task prompt.
        dataset: hub id of the data set, in a form that needs no loading script; None where the hub
            has none in these columns: local files are needed.
        folder: name of the local folder with ``train.jsonl`` and so on.
        source_fields: (marker, column) pairs in the order they are written; an empty marker is
            left out with its colon.
        config: configuration on the hub, or None.
        metrics: names understood by `pemt_fast.training.metrics.compute`.
        labels: label texts in the hub's label order, None for scores and free text.
        label_column: column with the label, score, answers or option number.
        kind: "classification", "regression" or "qa".
        split_rule: how validation and test are made, see `load.py`.
        train_split: name of the original split that is trained on.
        test_splits: names of the original split used as test, the first that exists is taken.
        train_cap: upper limit of training rows, None for all.
        option_columns: the target is one of several options: one in each of these columns, or all
            in the only one, see `answers.options_of`.
        option_keys: what the label column calls the options, in their order; where a row says so
            itself, what it usually calls them.
        lettered: write the options behind the source as ``A: ... B: ...``, for the columns that
            are not among `source_fields`; "index" then writes the letter.
        extra_columns: columns that only `prepare` reads.
        group_keys: keys inside the ``idx`` column that identify a group of rows.
        drop_unlabelled: leave out rows with the hidden label instead of refusing them.
        one_example_per_answer: train on every answer of a row, not only on the first.
        prepare: rewrites the row before it is formatted.
        max_source_length: longest source in tokens where the user names none, as published where
            that is known; see `MAX_SOURCE_LENGTH`.
    """

    name: str
    description: str
    dataset: str | None
    folder: str
    source_fields: tuple[tuple[str, str], ...]
    config: str | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    labels: tuple[str, ...] | None = None
    label_column: str = "label"
    kind: Kind = "classification"
    split_rule: SplitRule = "small"
    train_split: str = "train"
    test_splits: tuple[str, ...] = ("validation",)
    train_cap: int | None = None
    option_columns: tuple[str, ...] = ()
    option_keys: tuple[str, ...] = ()
    lettered: bool = False
    extra_columns: tuple[str, ...] = ()
    group_keys: tuple[str, ...] = ()
    drop_unlabelled: bool = False
    one_example_per_answer: bool = False
    prepare: Callable[[Row], Row] | None = None
    max_source_length: int = MAX_SOURCE_LENGTH

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\"):
            raise ValueError(f"name of a task must be the name of a folder, got {self.name!r}")
        known = get_args(Kind), get_args(SplitRule)
        for value, field, values in zip(
            (self.kind, self.split_rule), ("kind", "split_rule"), known, strict=True
        ):
            if value not in values:
                raise ValueError(
                    f"task {self.name!r}: {field} must be one of {', '.join(values)}, got {value!r}"
                )
        if self.kind == "classification" and not (self.labels or self.option_columns):
            raise ValueError(f"task {self.name!r}: classification needs labels or option_columns")
        if len(set(self.labels or ())) != len(self.labels or ()):
            raise ValueError(f"task {self.name!r}: labels must all differ, got {self.labels}")
        columns, keys = len(self.option_columns), len(self.option_keys)
        if (columns > 1 and columns != keys) or (columns == 1 and not keys) or keys > 26:
            raise ValueError(
                f"task {self.name!r}: option_keys must name the options of "
                f"{self.option_columns}, at most 26, got {self.option_keys}"
            )

    def format(
        self, row: Row, label_style: LabelStyle = "name", prefix: Prefix = "none"
    ) -> Example:
        """Write one row as source and target text.

        Args:
            row: mapping from column to value, as the hub or a JSON line gives it.
            label_style: "name" writes class names and texts of options, "index" writes class
                numbers and letters of options. Scores and free answers are the same in both.
            prefix: puts the task's name in front of the source, see `style.py`.

        Returns:
            The example; for question answering its target is the first answer.

        Raises:
            ValueError: a column is missing or has the wrong type, the label is hidden or unknown,
                or `label_style` or `prefix` is none of its values.
        """
        require_style(label_style, prefix)
        self._require_columns(row)
        if self.prepare is not None:
            row = self.prepare(row)
        texts = ((marker, text_of(self, row, column)) for marker, column in self.source_fields)
        source = " ".join(f"{marker}: {text}" if marker else text for marker, text in texts)
        if self.lettered:
            source = f"{source} {lettered(options_of(self, row))}"
        references = self._references(row, label_style)
        return Example(
            source=with_prefix(source, self.name, prefix),
            target=references[0],
            references=references,
            group=self._group(row),
            task=self.name,
            is_label=self.labels is not None
            or self.kind == "regression"
            or (self.lettered and label_style == "index"),
        )

    def format_for_training(
        self, row: Row, label_style: LabelStyle = "name", prefix: Prefix = "none"
    ) -> list[Example]:
        """Write one training row; ReCoRD gives one example per distinct answer, others one."""
        example = self.format(row, label_style, prefix)
        if not self.one_example_per_answer:
            return [example]
        return [replace(example, target=answer) for answer in dict.fromkeys(example.references)]

    def class_of(self, row: Row) -> str | None:
        """Name the class of a row for drawing k rows per class; None where there are no classes.

        Of lettered options the letter is the class; a row with more of them than usual, whose
        answer is one of the surplus, has none.
        """
        if self.kind != "classification":
            return None
        self._require_columns(row)
        names, index = self.label_texts("name"), label_index(self, row)
        return names[index] if index < len(names) else None

    def label_texts(self, label_style: LabelStyle = "name") -> tuple[str, ...]:
        """Return the classes in label order, empty for scores and free answers.

        They are the target texts but for options: their names are those of the columns, or letters.
        """
        if self.lettered:
            return tuple(ascii_uppercase[: len(self.option_keys)])
        names = self.labels or self.option_columns
        return names if label_style == "name" else tuple(str(i) for i in range(len(names)))

    def is_unlabelled(self, row: Row) -> bool:
        """Say whether the row carries the hub's mark for a hidden or missing label."""
        return row.get(self.label_column) == HIDDEN_LABEL

    def _require_columns(self, row: Row) -> None:
        shown = tuple(column for _, column in self.source_fields)
        group = ("idx",) if self.group_keys else ()
        needed = (*shown, *self.option_columns, *self.extra_columns, *group, self.label_column)
        for column in needed:
            if column not in row:
                present = ", ".join(sorted(row)) or "none"
                raise ValueError(
                    f"task {self.name!r} needs the column {column!r}; columns present: {present}"
                )

    def _group(self, row: Row) -> str | None:
        if not self.group_keys:
            return None
        idx = row["idx"]
        if not isinstance(idx, Mapping) or any(key not in idx for key in self.group_keys):
            raise ValueError(
                f"task {self.name!r}: column 'idx' must hold {', '.join(self.group_keys)}, "
                f"got {idx!r}"
            )
        return "-".join(str(idx[key]) for key in self.group_keys)

    def _references(self, row: Row, label_style: LabelStyle) -> tuple[str, ...]:
        if self.kind == "qa":
            return answers_of(self, row)
        if self.kind == "regression":
            return (score_of(self, row),)
        index = label_index(self, row)
        if self.option_columns and label_style == "name":
            return (options_of(self, row)[index][1],)
        if self.lettered:
            return (ascii_uppercase[index],)
        return (self.label_texts(label_style)[index],)


def benchmark_task(
    benchmark: str,
    name: str,
    description: str,
    source_fields: tuple[tuple[str, str], ...],
    *,
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    split_rule: SplitRule = "small",
) -> Task:
    """Classification set of a benchmark whose configuration carries the task's own name."""
    return Task(
        name,
        description,
        dataset=benchmark,
        config=name,
        folder=f"{benchmark.partition('/')[2]}__{name}",
        source_fields=source_fields,
        labels=labels,
        metrics=metrics,
        split_rule=split_rule,
    )
