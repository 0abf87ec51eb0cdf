# SPDX-License-Identifier: Apache-2.0
"""The data sets of the PEMT experiments as table entries: 6 source tasks and 17 targets, and more.

`SOURCE_TASKS` and `TARGET_TASKS` list the two roles, `TASKS` holds every entry and `get_task`
finds one by its name or by the name the authors' scripts use (``superglue-cb``). Label texts are
the hub's class names in the hub's order (CB's order is not MNLI's); Yelp and PAWS keep digits.

Metrics follow the benchmarks' own habit: MRPC and QQP report accuracy and F1, CB accuracy and macro
F1. The published runs computed accuracy alone for these three; ask `compute` for that by name.

Next: `template.py` explains the fields, `load.py` the split rules; `text_classification.py` holds
three more entries.
"""

from __future__ import annotations

import difflib

from pemt_fast.data import rewrite
from pemt_fast.data.template import Example, SplitRule, Task
from pemt_fast.data.text_classification import TEXT_CLASSIFICATION

__all__ = ["ALIASES", "SOURCE_TASKS", "TARGET_TASKS", "TASKS", "Example", "Task", "get_task"]

SOURCE_TASKS = ("mnli", "qnli", "qqp", "sst2", "squad", "record")
TARGET_TASKS = (
    *("cola", "rte", "mrpc", "stsb"),
    *("cb", "wsc", "wic", "boolq", "multirc"),
    *("nq", "hotpotqa", "newsqa", "searchqa"),
    *("paws", "scitail", "winogrande", "yelp_polarity"),
)

_GLUE = "nyu-mll/glue"
_SUPERGLUE = "aps/super_glue"
_SENTENCE = (("sentence", "sentence"),)
_SENTENCES = (("sentence1", "sentence1"), ("sentence2", "sentence2"))
_PREMISE = (("premise", "premise"), ("hypothesis", "hypothesis"))
_QA = (("question", "question"), ("context", "context"))
_FALSE_TRUE = ("False", "True")


def _reading(name: str, dataset: str) -> Task:
    """Extractive question answering; the MRQA sets share SQuAD's sentence and template."""
    return Task(
        name,
        "Find the short stretch of the passage that answers the question and write it down.",
        dataset=dataset,
        folder=name,
        source_fields=_QA,
        label_column="answers",
        kind="qa",
        metrics=("squad_em", "squad_f1"),
        split_rule="large",
        prepare=rewrite.pad_question_answering,
    )


def _classes(
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


_ALL = (
    _classes(
        _GLUE,
        "sst2",
        "Read a sentence from a film review and say if the feeling in it is positive or negative.",
        _SENTENCE,
        labels=("negative", "positive"),
        split_rule="large",
    ),
    _classes(
        _GLUE,
        "cola",
        "Tell if a row of English words makes a sentence that a native speaker would accept.",
        _SENTENCE,
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
    ),
    _classes(
        _GLUE,
        "mnli",
        "Compare a premise with a hypothesis: say if it supports it, denies it or leaves it open.",
        _PREMISE,
        labels=("entailment", "neutral", "contradiction"),
        split_rule="mnli",
    ),
    _classes(
        _GLUE,
        "qnli",
        "Check if the sentence that comes with a question holds the information to answer it.",
        (("question", "question"), ("sentence", "sentence")),
        labels=("entailment", "not_entailment"),
        split_rule="large",
    ),
    _classes(
        _GLUE,
        "qqp",
        "Say if two questions from users ask for the same thing and could share one answer.",
        (("question1", "question1"), ("question2", "question2")),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        split_rule="large",
    ),
    _classes(
        _GLUE,
        "rte",
        "Say if a reader of the first sentence would take the second one to be most likely true.",
        _SENTENCES,
        labels=("entailment", "not_entailment"),
    ),
    _classes(
        _GLUE,
        "wnli",
        "Say if the second sentence, with a name put in for a pronoun, follows from the first.",
        _SENTENCES,
        labels=("not_entailment", "entailment"),
    ),
    _classes(
        _GLUE,
        "mrpc",
        "Judge if two sentences from news stories report the same facts in different words.",
        _SENTENCES,
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    Task(
        "stsb",
        "Rate on a scale from zero to five how close two sentences come in meaning.",
        dataset=_GLUE,
        config="stsb",
        folder="glue__stsb",
        source_fields=_SENTENCES,
        kind="regression",
        metrics=("pearson", "spearman"),
    ),
    _classes(
        _SUPERGLUE,
        "cb",
        "Work out if the speaker of a text takes the hypothesis for true, for false or for open.",
        _PREMISE,
        labels=("entailment", "contradiction", "neutral"),
        metrics=("accuracy", "macro_f1"),
    ),
    _classes(
        _SUPERGLUE,
        "copa",
        "Pick the one of two choices that is more plausible as cause or effect of the premise.",
        (("premise", "premise"), ("choice1", "choice1"), ("choice2", "choice2")),
        labels=("choice1", "choice2"),
    ),
    _classes(
        _SUPERGLUE,
        "boolq",
        "Answer a yes or no question by reading the passage that comes with it.",
        (("question", "question"), ("passage", "passage")),
        labels=_FALSE_TRUE,
    ),
    Task(
        "multirc",
        "Say if a candidate answer is right, given what several sentences of the paragraph tell.",
        dataset=_SUPERGLUE,
        config="multirc",
        folder="super_glue__multirc",
        source_fields=(("question", "question"), ("answer", "answer"), ("paragraph", "paragraph")),
        labels=_FALSE_TRUE,
        group_keys=("paragraph", "question"),
        metrics=("f1", "group_em"),
        prepare=rewrite.strip_markup,
    ),
    _classes(
        _SUPERGLUE,
        "wic",
        "Say if a word carries the same sense in both of the sentences where it is used.",
        (*_SENTENCES, ("word", "word")),
        labels=_FALSE_TRUE,
    ),
    Task(
        "wsc",
        "Say if the pronoun marked in the text stands for the noun marked in the text.",
        dataset=_SUPERGLUE,
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
        dataset=_SUPERGLUE,
        config="record",
        folder="super_glue__record",
        source_fields=(("record query", "query"), ("entities", "entities"), ("passage", "passage")),
        label_column="answers",
        kind="qa",
        metrics=("squad_em", "squad_f1"),
        split_rule="large",
        one_example_per_answer=True,
        prepare=rewrite.flatten_record,
    ),
    _reading("squad", "rajpurkar/squad"),
    _reading("nq", "lucadiliello/naturalquestionsshortqa"),
    _reading("hotpotqa", "lucadiliello/hotpotqa"),
    _reading("newsqa", "lucadiliello/newsqa"),
    _reading("searchqa", "lucadiliello/searchqa"),
    Task(
        "scitail",
        "Say if a fact from a science text is enough to support a claim made from a quiz question.",
        dataset="allenai/scitail",
        config="snli_format",
        folder="scitail__snli_format",
        source_fields=(("premise", "sentence1"), ("hypothesis", "sentence2")),
        labels=("entailment", "neutral"),
        label_column="gold_label",
    ),
    Task(
        "snli",
        "Say if a picture caption makes a claim about the same scene certain, possible or false.",
        dataset="stanfordnlp/snli",
        folder="snli",
        source_fields=_PREMISE,
        labels=("entailment", "neutral", "contradiction"),
        split_rule="large",
        test_splits=("test", "validation"),
        drop_unlabelled=True,
    ),
    Task(
        "paws",
        "Tell if two sentences made of nearly the same words also mean the same.",
        dataset="google-research-datasets/paws",
        config="labeled_final",
        folder="paws__labeled_final",
        source_fields=_SENTENCES,
        labels=("0", "1"),
        split_rule="official",
        test_splits=("test",),
    ),
    Task(
        "yelp_polarity",
        "Say if the customer who wrote this review of a business was pleased or not.",
        dataset="fancyzhx/yelp_polarity",
        folder="yelp_polarity",
        source_fields=(("sentence", "text"),),
        labels=("0", "1"),
        split_rule="large",
        test_splits=("test", "validation"),
        train_cap=100_000,
    ),
    Task(
        "winogrande",
        "Fill the blank in the sentence with the option that common sense calls for.",
        dataset="allenai/winogrande",
        config="winogrande_xl",
        folder="winogrande__winogrande_xl",
        source_fields=(("sentence", "sentence"), ("option1", "option1"), ("option2", "option2")),
        label_column="answer",
        option_columns=("option1", "option2"),
        split_rule="large",
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in (*_ALL, *TEXT_CLASSIFICATION)}

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
}


def get_task(name: str) -> Task:
    """Find a task by its name or by the name the authors' scripts use; case does not matter.

    Raises:
        ValueError: no such task; the message lists the closest names.
    """
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in TASKS:
        return TASKS[key]
    close = difflib.get_close_matches(key, [*TASKS, *ALIASES], n=3, cutoff=0.5)
    hint = f"close matches: {', '.join(close)}" if close else f"known tasks: {', '.join(TASKS)}"
    raise ValueError(f"unknown task {name!r}; {hint}")
