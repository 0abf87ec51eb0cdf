# SPDX-License-Identifier: Apache-2.0
"""The data sets of the PEMT experiments as table entries: 6 source tasks and 17 targets, and more.

`SOURCE_TASKS` and `TARGET_TASKS` list the two roles, `COMMONSENSE_TASKS` the eight sets that
multi-task methods train together, `TASKS` holds every entry and `get_task` finds one by its name or
by the name the authors' scripts use (``superglue-cb``). Label texts are the hub's class names in
the hub's order (CB's order is not MNLI's); Yelp and PAWS keep digits.

Metrics follow the benchmarks' own habit: MRPC and QQP report accuracy and F1, CB accuracy and macro
F1. The published runs computed accuracy alone for these three; ask `compute` for that by name.

The entries are in `glue.py`, `super_glue.py`, `question_answering.py`, `sentence_pairs.py`,
`text_classification.py` and `multiple_choice.py`.

Next: `template.py` explains the fields, `load.py` the split rules.
"""

from __future__ import annotations

import difflib

from pemt_fast.data.glue import GLUE
from pemt_fast.data.multiple_choice import MULTIPLE_CHOICE
from pemt_fast.data.question_answering import QUESTION_ANSWERING
from pemt_fast.data.sentence_pairs import SENTENCE_PAIRS
from pemt_fast.data.super_glue import SUPER_GLUE
from pemt_fast.data.template import Example, Task
from pemt_fast.data.text_classification import TEXT_CLASSIFICATION

__all__ = [
    "ALIASES",
    "COMMONSENSE_TASKS",
    "SOURCE_TASKS",
    "TARGET_TASKS",
    "TASKS",
    "Example",
    "Task",
    "get_task",
]

SOURCE_TASKS = ("mnli", "qnli", "qqp", "sst2", "squad", "record")
TARGET_TASKS = (
    *("cola", "rte", "mrpc", "stsb"),
    *("cb", "wsc", "wic", "boolq", "multirc"),
    *("nq", "hotpotqa", "newsqa", "searchqa"),
    *("paws", "scitail", "winogrande", "yelp_polarity"),
)
COMMONSENSE_TASKS = (
    *("boolq", "piqa", "siqa", "hellaswag"),
    *("winogrande", "arc_easy", "arc_challenge", "openbookqa"),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *GLUE,
        *SUPER_GLUE,
        *QUESTION_ANSWERING,
        *SENTENCE_PAIRS,
        *TEXT_CLASSIFICATION,
        *MULTIPLE_CHOICE,
    )
}

ALIASES: dict[str, str] = {
    "superglue-boolq": "boolq",
    "superglue-cb": "cb",
    "superglue-copa": "copa",
    "superglue-multirc": "multirc",
    "superglue-record": "record",
    "superglue-wic": "wic",
    "superglue-wsc-fixed": "wsc",
    "wsc.fixed": "wsc",
    "multi_nli": "mnli",
    "sst-2": "sst2",
    "sts-b": "stsb",
    "natural_questions": "nq",
    "yelp": "yelp_polarity",
    "social_i_qa": "siqa",
    "social_iqa": "siqa",
    "arc-easy": "arc_easy",
    "arc-challenge": "arc_challenge",
    "mr": "rotten_tomatoes",
}


def get_task(name: str | Task) -> Task:
    """Find a task by its name or by the name the authors' scripts use; case does not matter.

    A task is returned as it is, so that one of your own goes wherever a name does.

    Raises:
        ValueError: no such task; the message lists the closest names.
    """
    if isinstance(name, Task):
        return name
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in TASKS:
        return TASKS[key]
    close = difflib.get_close_matches(key, [*TASKS, *ALIASES], n=3, cutoff=0.5)
    hint = f"close matches: {', '.join(close)}" if close else f"known tasks: {', '.join(TASKS)}"
    raise ValueError(f"unknown task {name!r}; {hint}")
