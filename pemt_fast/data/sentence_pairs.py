# SPDX-License-Identifier: Apache-2.0
"""Pairs of sentences outside GLUE: SciTail and PAWS, targets of the PEMT experiments, and SNLI.

Label texts are the hub's class names in the hub's order; PAWS keeps digits, as published.
"""

from __future__ import annotations

from pemt_fast.data.template import Task

SENTENCE_PAIRS = (
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
        source_fields=(("premise", "premise"), ("hypothesis", "hypothesis")),
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
        source_fields=(("sentence1", "sentence1"), ("sentence2", "sentence2")),
        labels=("0", "1"),
        split_rule="official",
        test_splits=("test",),
    ),
)
