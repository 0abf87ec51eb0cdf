# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast tasks`, and what the other commands say about data: the options they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pemt_fast.console import print_table
from pemt_fast.data import LabelStyle, Prefix, Task, get_task, load_natural_instructions
from pemt_fast.data.rows import Sources

LabelStyleOption = Annotated[LabelStyle, typer.Option(help="Targets: class names or numbers.")]
PrefixOption = Annotated[
    Prefix, typer.Option(help="In front of a text: nothing, 'cola ' (name) or 'cola: ' (colon).")
]
RecordedLabelStyle = Annotated[
    LabelStyle | None, typer.Option(help="Default: that of the adapters' run.")
]
RecordedPrefix = Annotated[Prefix | None, typer.Option(help="Default: that of the adapters' run.")]
MaxSourceLength = Annotated[
    int | None, typer.Option(help="Tokens of a text; default: the task's own, see 'tasks'.")
]
NaturalInstructions = Annotated[
    Path | None,
    typer.Option(help="Folder of JSON files, <task>.json, for tasks in that form."),
]
PositiveExamples = Annotated[
    int, typer.Option(min=0, help="Of each task of --natural-instructions, in every text.")
]


def with_natural_instructions(
    names: Sequence[str], data: Path | None, folder: Path | None, positive_examples: int
) -> tuple[list[str | Task], Sources]:
    """Tasks and their rows: those with a file in `folder` from there, the others from `data`."""
    if folder is None:
        return list(names), data
    own = [name for name in names if (folder / f"{name}.json").is_file()]
    tasks, rows = load_natural_instructions(folder, own, positive_examples=positive_examples)
    found = {task.name: task for task in tasks}
    chosen: list[str | Task] = [found.get(name, name) for name in names]
    return chosen, {get_task(task).name: data for task in chosen} | rows


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tasks)


def tasks(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/data.md has it.")] = False,
) -> None:
    """List the known tasks; with --markdown also data sets, texts, splits and published sizes."""
    from pemt_fast.training.task_table import COLUMNS, markdown_table, task_rows

    if markdown:
        typer.echo(markdown_table(), nl=False)
    else:
        # A terminal has no room for the others.
        shown = [COLUMNS.index(name) for name in ("task", "role", "targets", "metrics", "tokens")]
        rows = [[row[i] for i in shown] for row in task_rows()]
        print_table("tasks", [COLUMNS[i] for i in shown], rows)
