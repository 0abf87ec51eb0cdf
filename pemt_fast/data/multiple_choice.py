# SPDX-License-Identifier: Apache-2.0
"""Tasks that choose one of several texts: WinoGrande, commonsense sets and MMLU.

WinoGrande is a target of the PEMT experiments: its options stand in the source under their columns'
names, and the target is the text of one, or with ``label_style="index"`` its number from zero.

The others, benchmarks of the multi-task methods whose published texts are not known, have letters:
``question: ... A: ... B: ...``. Their target is the text of the option, or with
``label_style="index"`` its letter. With BoolQ (`super_glue.py`) they are the eight sets that are
trained together under the name commonsense.

PIQA and Social IQa are under other hub ids than their authors', which hold loading scripts that
`datasets` refuses since its version 4: these are copies of the same rows without one.
"""

from __future__ import annotations

from pemt_fast.data.template import SplitRule, Task

_QUESTION = (("question", "question"),)
_ABCD = ("A", "B", "C", "D")


def _lettered(
    name: str,
    description: str,
    dataset: str,
    source_fields: tuple[tuple[str, str], ...],
    *,
    option_columns: tuple[str, ...],
    option_keys: tuple[str, ...],
    label_column: str,
    split_rule: SplitRule,
    config: str | None = None,
    train_split: str = "train",
    max_source_length: int = 256,
) -> Task:
    own = dataset.partition("/")[2]
    return Task(
        name,
        description,
        dataset=dataset,
        config=config,
        folder=f"{own}__{config}" if config else own,
        source_fields=source_fields,
        option_columns=option_columns,
        option_keys=option_keys,
        label_column=label_column,
        lettered=True,
        split_rule=split_rule,
        train_split=train_split,
        test_splits=("test",) if split_rule == "official" else ("validation",),
        max_source_length=max_source_length,
    )


MULTIPLE_CHOICE = (
    Task(
        "winogrande",
        "Fill the blank in the sentence with the option that common sense calls for.",
        dataset="allenai/winogrande",
        config="winogrande_xl",
        folder="winogrande__winogrande_xl",
        source_fields=(("sentence", "sentence"), ("option1", "option1"), ("option2", "option2")),
        label_column="answer",
        option_columns=("option1", "option2"),
        option_keys=("1", "2"),
        split_rule="large",
    ),
    _lettered(
        "piqa",
        "Pick the way of doing an everyday thing with one's hands that would really work.",
        "baber/piqa",
        (("question", "goal"),),
        option_columns=("sol1", "sol2"),
        option_keys=("0", "1"),
        label_column="label",
        split_rule="large",
    ),
    _lettered(
        "siqa",
        "Pick what people most likely feel, want or do in the social situation that is told.",
        "lighteval/siqa",
        (("context", "context"), ("question", "question")),
        option_columns=("answerA", "answerB", "answerC"),
        option_keys=("1", "2", "3"),
        label_column="label",
        split_rule="large",
    ),
    _lettered(
        "hellaswag",
        "Pick the ending that carries the beginning of a scene on in a sensible way.",
        "Rowan/hellaswag",
        (("context", "ctx"),),
        option_columns=("endings",),
        option_keys=("0", "1", "2", "3"),
        label_column="label",
        split_rule="large",
    ),
    _lettered(
        "arc_easy",
        "Pick the right answer to a question from a science test of the lower grades.",
        "allenai/ai2_arc",
        _QUESTION,
        config="ARC-Easy",
        option_columns=("choices",),
        option_keys=_ABCD,
        label_column="answerKey",
        split_rule="official",
    ),
    _lettered(
        "arc_challenge",
        "Pick the right answer to a question from a science test that takes some reasoning.",
        "allenai/ai2_arc",
        _QUESTION,
        config="ARC-Challenge",
        option_columns=("choices",),
        option_keys=_ABCD,
        label_column="answerKey",
        split_rule="official",
    ),
    _lettered(
        "openbookqa",
        "Pick the answer to which a basic fact of science and everyday knowledge lead together.",
        "allenai/openbookqa",
        (("question", "question_stem"),),
        config="main",
        option_columns=("choices",),
        option_keys=_ABCD,
        label_column="answerKey",
        split_rule="official",
    ),
    # Sources of its subjects on law and history are long, and cutting one loses its last options.
    _lettered(
        "mmlu",
        "Pick the right one of four answers to an exam question from one of many subjects.",
        "cais/mmlu",
        _QUESTION,
        config="all",
        option_columns=("choices",),
        option_keys=("0", "1", "2", "3"),
        label_column="answer",
        split_rule="official",
        train_split="auxiliary_train",
        max_source_length=512,
    ),
)
