# SPDX-License-Identifier: Apache-2.0
"""Single texts to be put into classes: Yelp, a target of the PEMT experiments, and further ones.

Label texts are the hub's class names in the hub's order; Yelp keeps digits, as published.
"""

from __future__ import annotations

from pemt_fast.data.template import Task

_TEXT = (("text", "text"),)
_TEST = ("test", "validation")

TEXT_CLASSIFICATION = (
    Task(
        "yelp_polarity",
        "Say if the customer who wrote this review of a business was pleased or not.",
        dataset="fancyzhx/yelp_polarity",
        folder="yelp_polarity",
        source_fields=(("sentence", "text"),),
        labels=("0", "1"),
        split_rule="large",
        test_splits=_TEST,
        train_cap=100_000,
    ),
    Task(
        "ag_news",
        "Sort a short news item by the part of the paper that it belongs to.",
        dataset="fancyzhx/ag_news",
        folder="ag_news",
        source_fields=_TEXT,
        labels=("World", "Sports", "Business", "Sci/Tech"),
        split_rule="large",
        test_splits=_TEST,
    ),
    Task(
        "trec",
        "Say what kind of thing a question asks for: a person, a place, a number or another.",
        dataset="CogComp/trec",
        folder="trec",
        source_fields=_TEXT,
        label_column="coarse_label",
        labels=("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
        split_rule="large",
        test_splits=_TEST,
    ),
    Task(
        "subj",
        "Tell if a sentence about a film states a fact of the plot or somebody's opinion.",
        dataset="SetFit/subj",
        folder="subj",
        source_fields=_TEXT,
        labels=("objective", "subjective"),
        split_rule="large",
        test_splits=_TEST,
    ),
    Task(
        "imdb",
        "Say if a long review on a film site recommends the film or warns of it.",
        dataset="stanfordnlp/imdb",
        folder="imdb",
        source_fields=_TEXT,
        labels=("neg", "pos"),
        split_rule="large",
        test_splits=_TEST,
    ),
    Task(
        "rotten_tomatoes",
        "Say if a critic's one-line verdict on a film is for it or against it.",
        dataset="cornell-movie-review-data/rotten_tomatoes",
        folder="rotten_tomatoes",
        source_fields=_TEXT,
        labels=("neg", "pos"),
        split_rule="large",
        test_splits=_TEST,
    ),
    Task(
        "sst5",
        "Grade the feeling in a sentence about a film on five steps from very negative upwards.",
        dataset="SetFit/sst5",
        folder="sst5",
        source_fields=_TEXT,
        labels=("very negative", "negative", "neutral", "positive", "very positive"),
        split_rule="official",
        test_splits=("test",),
    ),
    Task(
        "cr",
        "Say if a sentence from a customer's review praises the product or finds fault with it.",
        dataset="SetFit/CR",
        folder="cr",
        source_fields=_TEXT,
        labels=("negative", "positive"),
        split_rule="large",
        test_splits=_TEST,
    ),
    Task(
        "mpqa",
        "Say if a short phrase from a news text carries a good or a bad opinion.",
        dataset=None,
        folder="mpqa",
        source_fields=_TEXT,
        labels=("negative", "positive"),
        split_rule="large",
        test_splits=_TEST,
    ),
)
