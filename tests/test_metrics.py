"""Every metric against values worked out by hand, and what becomes of texts that are no answer."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pemt_fast.data import SYNTHETIC_TASKS, TASKS, Example
from pemt_fast.training.metrics import METRICS, compute, normalize_answer


def score(metric: str, predictions, references, **keywords) -> float:
    return compute([metric], predictions, references, **keywords)[metric]


def test_accuracy_is_the_share_of_exact_texts_in_percent():
    assert score("accuracy", [" a\n", "b", "A", "d"], ["a", "b", "a", "c"]) == 50.0


def test_accuracy_takes_any_accepted_text():
    assert score("accuracy", ["b"], [("a", "b")]) == 100.0
    assert score("accuracy", ["b"], [Example("x", "a", ("a", "b"))]) == 100.0


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("a b c d", "a b c d", 100.0),
        ("a b d c", "a b c d", 50.0),
        ("a b", "a b c d", 50.0),
        ("a b c d e", "a b c d", 80.0),
        ("", "a b", 0.0),
    ],
)
def test_token_accuracy_compares_positions(prediction, reference, value):
    assert score("token_accuracy", [prediction], [reference]) == value


def test_matthews_by_hand():
    # Three true positives, one false positive, two true negatives, none missed.
    truth = ["yes"] * 3 + ["no"] * 3
    guess = ["yes"] * 4 + ["no"] * 2
    expected = 100 * (3 * 2 - 1 * 0) / math.sqrt(4 * 3 * 3 * 2)
    assert score("matthews", guess, truth) == pytest.approx(expected)


def test_f1_by_hand_counts_other_texts_as_the_wrong_class():
    truth = ["no", "no", "yes", "yes", "yes"]
    # The first stray text becomes a false positive, the second a missed positive: tp 2, fp 1, fn 1.
    guess = ["maybe", "no", "yes", "yes", "perhaps"]
    assert score("f1", guess, truth, labels=("no", "yes")) == pytest.approx(100 * 4 / 6)


def test_f1_without_any_positive_is_zero():
    assert score("f1", ["no"], ["no"], labels=("no", "yes")) == 0.0


def test_macro_f1_by_hand():
    truth = ["a", "a", "b", "c"]
    guess = ["a", "b", "b", "other"]
    # a: precision 1, recall 1/2; b: precision 1/2, recall 1; c: never predicted.
    expected = 100 * (2 / 3 + 2 / 3 + 0) / 3
    assert score("macro_f1", guess, truth, labels=("a", "b", "c")) == pytest.approx(expected)


def test_correlations_by_hand():
    guess, truth = ["1.0", "2.0", "4.0"], ["1.0", "2.0", "3.0"]
    scores = compute("stsb", guess, truth)
    # Means 7/3 and 2: covariance 3, variances 14/3 and 2.
    assert scores["pearson"] == pytest.approx(100 * 3 / math.sqrt(14 / 3 * 2))
    assert scores["spearman"] == pytest.approx(100.0)
    assert scores["average"] == pytest.approx((scores["pearson"] + scores["spearman"]) / 2)
    assert scores["unparsable"] == 0


def test_scores_that_are_no_number_count_as_zero_and_are_reported():
    guess, truth = ["five", "nan", "inf", "2.0", "4.0"], ["0.0", "0.0", "0.0", "2.0", "4.0"]
    scores = compute("stsb", guess, truth)
    assert scores["unparsable"] == 3
    assert scores["pearson"] == pytest.approx(100.0)


@pytest.mark.parametrize("metric", ["pearson", "spearman", "matthews"])
def test_constant_predictions_score_zero_without_a_warning(metric):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(metric, ["1", "1", "1"], ["1", "2", "3"]) == 0.0
        assert score(metric, ["1", "2", "3"], ["1", "1", "1"]) == 0.0
        assert score(metric, ["2"], ["2"]) == 0.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat!", "cat"),
        ("an apple, a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre and another", "theatre and another"),
        ("a", ""),
    ],
)
def test_answers_are_normalised_like_squad(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "accepted", "em", "f1"),
    [
        ("the Blue car", ("blue car",), 100.0, 100.0),
        ("a blue old car", ("blue car",), 0.0, 80.0),
        ("red", ("blue car",), 0.0, 0.0),
        ("red red", ("red blue",), 0.0, 50.0),
        ("in 1990", ("1990", "the year 1990"), 0.0, 200 / 3),
        ("the", ("a",), 100.0, 100.0),
        ("", ("blue",), 0.0, 0.0),
    ],
)
def test_squad_scores_take_the_best_reference(prediction, accepted, em, f1):
    scores = compute("squad", [prediction], [accepted])
    assert scores["squad_em"] == em
    assert scores["squad_f1"] == pytest.approx(f1)
    assert scores["average"] == pytest.approx((em + f1) / 2)


@given(st.lists(st.sampled_from("abc"), min_size=1), st.lists(st.sampled_from("abc"), min_size=1))
def test_squad_f1_is_symmetric_and_full_for_equal_words(left, right):
    left_text, right_text = "b " + " ".join(left), "b " + " ".join(right)
    forth = score("squad_f1", [left_text], [right_text])
    assert forth == pytest.approx(score("squad_f1", [right_text], [left_text]))
    assert 0 < forth <= 100 + 1e-9
    assert score("squad_f1", [left_text], [" ".join(reversed(left_text.split()))]) == 100.0


def multirc(label: str, group: str) -> Example:
    return Example("q", label, (label,), group=group, task="multirc", is_label=True)


def test_multirc_by_hand():
    examples = [
        multirc("True", "p-1"),
        multirc("False", "p-1"),
        multirc("False", "p-2"),
        multirc("True", "p-2"),
        multirc("False", "p-3"),
    ]
    scores = compute("multirc", ["True", "False", "True", "True", "False"], examples)
    assert scores["group_em"] == pytest.approx(200 / 3)  # the second question has one wrong answer
    assert scores["f1"] == pytest.approx(100 * 4 / 5)  # tp 2, fp 1, fn 0
    assert scores["average"] == pytest.approx((200 / 3 + 80) / 2)


def test_a_task_knows_its_labels_as_names_and_as_numbers():
    names = compute("mrpc", ["equivalent", "equivalent"], ["equivalent", "not_equivalent"])
    numbers = compute("mrpc", ["1", "1"], ["1", "0"])
    assert names == numbers
    assert names["f1"] == pytest.approx(200 / 3)
    assert names["accuracy"] == 50.0


def test_cb_averages_over_all_three_classes():
    scores = compute(TASKS["cb"], ["neutral", "neutral"], ["neutral", "entailment"])
    assert scores["macro_f1"] == pytest.approx(100 * (2 / 3) / 3)


@pytest.mark.parametrize("name", [*TASKS, *SYNTHETIC_TASKS])
def test_every_task_scores_full_on_its_own_references(name):
    task = TASKS.get(name)
    if task is None:
        texts = ["a b", "c d"]
    elif task.kind == "regression":
        texts = ["1.0", "2.0"]
    else:
        texts = list(task.labels or ("Ann", "Bo"))
    examples = [Example("s", text, (text,), group=text) for text in texts]
    scores = compute(name, texts, examples)
    metrics = (task or SYNTHETIC_TASKS[name]).metrics
    assert {metric: scores[metric] for metric in metrics} == pytest.approx(
        dict.fromkeys(metrics, 100.0)
    )
    assert scores["average"] == pytest.approx(100.0)
    assert set(metrics) <= set(METRICS)


@pytest.mark.parametrize(
    ("task", "predictions", "references", "message"),
    [
        ("sst2", [], [], "predictions must hold at least one text"),
        ("sst2", ["positive"], [], "same length, got 1 and 0"),
        ("sst2", ["positive"], ["good"], r"label texts \(negative, positive\) .* got \['good'\]"),
        ("sst3", ["a"], ["a"], "unknown task 'sst3'; close matches: sst5, sst2"),
        (["accuracy", "bleu"], ["a"], ["a"], "among accuracy, .*; got bleu"),
        ([], ["a"], ["a"], "got none"),
        (["f1"], ["a"], ["a"], "'f1' needs exactly two labels"),
        (["macro_f1"], ["a"], ["a"], "'macro_f1' needs at least two labels"),
        (["pearson"], ["1"], ["high"], "must be numbers, got 'high'"),
        (["group_em"], ["a"], ["a"], "needs Example objects with a group"),
        (["accuracy"], ["a"], [()], "at least one reference text"),
    ],
)
def test_impossible_requests_are_refused(task, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        compute(task, predictions, references)
