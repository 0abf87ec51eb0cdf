# SPDX-License-Identifier: Apache-2.0
"""The tasks of GLUE: sources and targets of the PEMT experiments, and WNLI.

Label texts are the hub's class names in the hub's order.
"""

from __future__ import annotations

from pemt_fast.data.template import Task, benchmark_task

_BENCHMARK = "nyu-mll/glue"
_SENTENCE = (("sentence", "sentence"),)
_SENTENCES = (("sentence1", "sentence1"), ("sentence2", "sentence2"))

GLUE = (
    benchmark_task(
        _BENCHMARK,
        "sst2",
        "Read a sentence from a film review and say if the feeling in it is positive or negative.",
        _SENTENCE,
        labels=("negative", "positive"),
        split_rule="large",
    ),
    benchmark_task(
        _BENCHMARK,
        "cola",
        "Tell if a row of English words makes a sentence that a native speaker would accept.",
        _SENTENCE,
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
    ),
    benchmark_task(
        _BENCHMARK,
        "mnli",
        "Compare a premise with a hypothesis: say if it supports it, denies it or leaves it open.",
        (("premise", "premise"), ("hypothesis", "hypothesis")),
        labels=("entailment", "neutral", "contradiction"),
        split_rule="mnli",
    ),
    benchmark_task(
        _BENCHMARK,
        "qnli",
        "Check if the sentence that comes with a question holds the information to answer it.",
        (("question", "question"), ("sentence", "sentence")),
        labels=("entailment", "not_entailment"),
        split_rule="large",
    ),
    benchmark_task(
        _BENCHMARK,
        "qqp",
        "Say if two questions from users ask for the same thing and could share one answer.",
        (("question1", "question1"), ("question2", "question2")),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        split_rule="large",
    ),
    benchmark_task(
        _BENCHMARK,
        "rte",
        "Say if a reader of the first sentence would take the second one to be most likely true.",
        _SENTENCES,
        labels=("entailment", "not_entailment"),
    ),
    benchmark_task(
        _BENCHMARK,
        "wnli",
        "Say if the second sentence, with a name put in for a pronoun, follows from the first.",
        _SENTENCES,
        labels=("not_entailment", "entailment"),
    ),
    benchmark_task(
        _BENCHMARK,
        "mrpc",
        "Judge if two sentences from news stories report the same facts in different words.",
        _SENTENCES,
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    Task(
        "stsb",
        "Rate on a scale from zero to five how close two sentences come in meaning.",
        dataset=_BENCHMARK,
        config="stsb",
        folder="glue__stsb",
        source_fields=_SENTENCES,
        kind="regression",
        metrics=("pearson", "spearman"),
    ),
)
