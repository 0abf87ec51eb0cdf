# SPDX-License-Identifier: Apache-2.0
"""Tasks in the form of (Super-)NaturalInstructions: one JSON file each, with its definition.

A file holds ``Definition``, ``Positive Examples`` and ``Instances``, of which each has an ``input``
and its accepted ``output`` texts. The source is written as Tk-Instruct's published encoding does:
the definition, then the wanted number of positive examples, then the input; a text that ends in no
punctuation gets a full stop. The target is the first output, all of them are references.

A file has a single part: of each task a tenth becomes validation and a tenth test. How C-Poly
sampled and cut its hundred tasks is not known; 1024 tokens are those of its parents, Poly and MHR.

Next: the tasks and rows go into `load_splits` or, whole, into a `MultiTaskRequest`.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pemt_fast.data.template import Row, Task

MAX_SOURCE_LENGTH = 1024


def load_natural_instructions(
    folder: str | os.PathLike[str],
    names: Iterable[str] | None = None,
    *,
    definition: bool = True,
    positive_examples: int = 0,
    metrics: Sequence[str] = ("rouge1", "rougeL"),
    max_source_length: int = MAX_SOURCE_LENGTH,
) -> tuple[list[Task], dict[str, dict[str, list[Row]]]]:
    """Read tasks from a folder of JSON files.

    Args:
        folder: folder with a file ``<name>.json`` per task.
        names: tasks to read, in this order; None reads every file, by name.
        definition: begin the source with the task's definition.
        positive_examples: so many of the task's positive examples follow, all where it has fewer.
        metrics: names understood by `pemt_fast.training.metrics.compute`.
        max_source_length: see `Task`; examples make sources long.

    Returns:
        The tasks and, by their names, the rows by split: what the requests of `pemt_fast.training`
        take as tasks and as ``data_dir``.

    Raises:
        FileNotFoundError: no such folder, or no file of a name.
        ValueError: `positive_examples` is negative, the folder is empty, or a file is not of this
            form; the message names the file and what is missing.
    """
    root = Path(folder)
    if positive_examples < 0:
        raise ValueError(f"positive_examples must not be negative, got {positive_examples}")
    if not root.is_dir():
        raise FileNotFoundError(f"folder must be an existing folder, got {str(root)!r}")
    present = sorted(path.stem for path in root.glob("*.json"))
    if not present:
        raise ValueError(f"{root}: holds no JSON files")
    wanted = present if names is None else list(names)
    if missing := [name for name in wanted if name not in present]:
        raise FileNotFoundError(f"no file {missing[0]}.json in {str(root)!r}")
    tasks: list[Task] = []
    rows: dict[str, dict[str, list[Row]]] = {}
    for name in wanted:
        content = _read(root / f"{name}.json")
        described = _definition(root / f"{name}.json", content)
        shown = _examples(root / f"{name}.json", content)[:positive_examples]
        begin = _begin(described if definition else None, shown)
        tasks.append(
            Task(
                name,
                described,
                dataset=None,
                folder=name,
                source_fields=(("", "prompt"),),
                label_column="output",
                kind="qa",
                metrics=tuple(metrics),
                split_rule="single",
                max_source_length=max_source_length,
            )
        )
        rows[name] = {"train": _rows(root / f"{name}.json", content, begin)}
    return tasks, rows


def _read(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON in UTF-8 ({error})") from error
    keys = ("Definition", "Positive Examples", "Instances")
    if not isinstance(content, dict) or (missing := [key for key in keys if key not in content]):
        lacks = repr(missing[0]) if isinstance(content, dict) else "a JSON object"
        raise ValueError(f"{path}: expected {', '.join(keys)}; it lacks {lacks}")
    return content


def _definition(path: Path, content: Mapping[str, object]) -> str:
    """The only or the first definition, on one line."""
    value = content["Definition"]
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str) or not first.strip():
        raise ValueError(f"{path}: 'Definition' must be text or a list of it, got {value!r}")
    return " ".join(first.split())


def _examples(path: Path, content: Mapping[str, object]) -> list[tuple[str, str]]:
    value = content["Positive Examples"]
    found = []
    for number, pair in enumerate(value if isinstance(value, list) else [value]):
        texts = []
        for key in ("input", "output"):
            text = pair.get(key) if isinstance(pair, dict) else None
            # Some files give a list of outputs here too.
            text = text[0] if isinstance(text, list) and text else text
            if not isinstance(text, str):
                raise ValueError(
                    f"{path}: positive example {number} (from 0) needs texts under 'input' and "
                    f"'output', got {pair!r}"
                )
            texts.append(text)
        found.append((texts[0], texts[1]))
    return found


def _rows(path: Path, content: Mapping[str, object], begin: str) -> list[Row]:
    instances = content["Instances"]
    if not isinstance(instances, list) or not instances:
        raise ValueError(f"{path}: 'Instances' must be a list that is not empty")
    rows: list[Row] = []
    for number, instance in enumerate(instances):
        text = instance.get("input") if isinstance(instance, dict) else None
        if not isinstance(text, str) or "output" not in instance:
            raise ValueError(
                f"{path}: instance {number} (from 0) needs text under 'input' and 'output', "
                f"got {instance!r}"
            )
        output = instance["output"]
        outputs = [output] if isinstance(output, str) else output
        prompt = f"{begin}Now complete the following example -\nInput: {_stopped(text)}\nOutput:"
        rows.append({"id": instance.get("id"), "prompt": prompt, "output": outputs})
    return rows


def _begin(definition: str | None, examples: Sequence[tuple[str, str]]) -> str:
    """What stands in front of every input of a task."""
    text = "" if definition is None else f"Definition: {_stopped(definition)}\n\n"
    for number, (source, target) in enumerate(examples, start=1):
        text += f" Positive Example {number} -\nInput: {_stopped(source)}\n"
        text += f" Output: {_stopped(target)}\n\n"
    return text


def _stopped(text: str) -> str:
    text = text.strip()
    return text if text[-1:] in string.punctuation and text else f"{text}."
