# SPDX-License-Identifier: Apache-2.0
"""The tasks of SuperGLUE: ReCoRD is a source of the PEMT experiments, five are targets, and COPA.

Label texts are the hub's class names in the hub's order: CB's order is not MNLI's.
"""

from __future__ import annotations

from pemt_fast.data import rewrite
from pemt_fast.data.template import Task, benchmark_task

_BENCHMARK = "aps/super_glue"
_SENTENCES = (("sentence1", "sentence1"), ("sentence2", "sentence2"))
_FALSE_TRUE = ("False", "True")

SUPER_GLUE = (
    benchmark_task(
        _BENCHMARK,
        "cb",
        "Work out if the speaker of a text takes the hypothesis for true, for false or for open.",
        (("premise", "premise"), ("hypothesis", "hypothesis")),
        labels=("entailment", "contradiction", "neutral"),
        metrics=("accuracy", "macro_f1"),
    ),
    benchmark_task(
        _BENCHMARK,
        "copa",
        "Pick the one of two choices that is more plausible as cause or effect of the premise.",
        (("premise", "premise"), ("choice1", "choice1"), ("choice2", "choice2")),
        labels=("choice1", "choice2"),
    ),
    benchmark_task(
        _BENCHMARK,
        "boolq",
        "Answer a yes or no question by reading the passage that comes with it.",
        (("question", "question"), ("passage", "passage")),
        labels=_FALSE_TRUE,
    ),
    Task(
        "multirc",
        "Say if a candidate answer is right, given what several sentences of the paragraph tell.",
        dataset=_BENCHMARK,
        config="multirc",
        folder="super_glue__multirc",
        source_fields=(("question", "question"), ("answer", "answer"), ("paragraph", "paragraph")),
        labels=_FALSE_TRUE,
        group_keys=("paragraph", "question"),
        metrics=("f1", "group_em"),
        prepare=rewrite.strip_markup,
        max_source_length=348,
    ),
    benchmark_task(
        _BENCHMARK,
        "wic",
        "Say if a word carries the same sense in both of the sentences where it is used.",
        (*_SENTENCES, ("word", "word")),
        labels=_FALSE_TRUE,
    ),
    Task(
        "wsc",
        "Say if the pronoun marked in the text stands for the noun marked in the text.",
        dataset=_BENCHMARK,
        config="wsc.fixed",
        folder="super_glue__wsc.fixed",
        source_fields=(("text", "text"),),
        extra_columns=("span1_text", "span1_index", "span2_text", "span2_index"),
        labels=_FALSE_TRUE,
        prepare=rewrite.mark_wsc_spans,
    ),
    Task(
        "record",
        "Fill the gap in the query with the entity from the list that fits the news passage.",
        dataset=_BENCHMARK,
        config="record",
        folder="super_glue__record",
        source_fields=(("record query", "query"), ("entities", "entities"), ("passage", "passage")),
        label_column="answers",
        kind="qa",
        metrics=("squad_em", "squad_f1"),
        split_rule="large",
        one_example_per_answer=True,
        prepare=rewrite.flatten_record,
        max_source_length=512,
    ),
)
