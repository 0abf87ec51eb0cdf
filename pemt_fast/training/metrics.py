# SPDX-License-Identifier: Apache-2.0
"""Scores of generated texts against references, in percent from 0 to 100.

A prediction counts as a label only if it is exactly the label's text; no likelihoods are ranked.
`compute` takes the name of a task or of metrics and adds ``average``, the mean of the scores, which
selects checkpoints. Texts that are no label or no number lower the score and never raise:

* accuracy, macro_f1 and matthews treat such a prediction as a class of its own, hence wrong;
* f1 counts it as the opposite of the reference;
* pearson and spearman read it as 0.0 and report how many there were under ``unparsable``.

Correlations and Matthews of constant predictions are undefined and reported as 0.0.

Next: `pemt_fast/data/tasks.py` says which metrics belong to which task.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pemt_fast.data.synthetic import SYNTHETIC_TASKS, SyntheticTask
from pemt_fast.data.tasks import get_task
from pemt_fast.data.template import Example, Task
from pemt_fast.training.rouge import rouge_1, rouge_l

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class _Scored:
    """Predictions beside what they are judged by; `labels` is in label order, maybe empty."""

    predictions: list[str]
    references: list[tuple[str, ...]]
    groups: list[str | None]
    labels: tuple[str, ...]

    @property
    def first(self) -> list[str]:
        return [accepted[0] for accepted in self.references]


def compute(
    task: str | Task | SyntheticTask | Sequence[str],
    predictions: Sequence[str],
    examples: Sequence[Example] | Sequence[str] | Sequence[Sequence[str]],
    *,
    labels: Sequence[str] | None = None,
) -> dict[str, float]:
    """Score predictions with the metrics of a task, or with metrics given by name.

    Args:
        task: a task, its name, or a sequence of metric names (keys of `METRICS`).
        predictions: decoded texts; white space around them is ignored.
        examples: one per prediction: an `Example`, its reference text, or several accepted texts.
        labels: label texts in label order, for f1 (the second is the positive class) and macro_f1;
            taken from the task where one is given.

    Returns:
        Every metric in percent, their mean as ``average``, and for correlations the number of
        predictions that are no number as ``unparsable``.

    Raises:
        ValueError: unknown task or metric, no predictions, unequal lengths, references that are not
            among the labels or no numbers, or examples without groups for group_em.
    """
    names, task_labels = _resolve(task)
    if not predictions:
        raise ValueError("predictions must hold at least one text, got none")
    if len(predictions) != len(examples):
        raise ValueError(
            "predictions and examples must have the same length, "
            f"got {len(predictions)} and {len(examples)}"
        )
    references = [_accepted(example) for example in examples]
    chosen = tuple(labels) if labels is not None else _label_style(task_labels, references)
    scored = _Scored(
        predictions=[prediction.strip() for prediction in predictions],
        references=references,
        groups=[e.group if isinstance(e, Example) else None for e in examples],
        labels=chosen,
    )
    scores = {name: 100.0 * METRICS[name](scored) for name in names}
    scores["average"] = sum(scores.values()) / len(names)
    if "pearson" in names or "spearman" in names:
        scores["unparsable"] = float(sum(_number(p) is None for p in scored.predictions))
    return scores


def _resolve(
    task: str | Task | SyntheticTask | Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the metrics and, for a task, its label texts."""
    if isinstance(task, str):
        task = SYNTHETIC_TASKS[task] if task in SYNTHETIC_TASKS else get_task(task)
    if isinstance(task, SyntheticTask):
        return task.metrics, ()
    if isinstance(task, Task):
        return task.metrics, task.labels or ()
    unknown = [name for name in task if name not in METRICS]
    if unknown or not task:
        raise ValueError(
            f"metric names must be among {', '.join(METRICS)}; got {', '.join(unknown) or 'none'}"
        )
    return tuple(task), ()


def _accepted(example: Example | str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(example, Example):
        return example.references
    texts = (example,) if isinstance(example, str) else tuple(example)
    if not texts:
        raise ValueError("every example needs at least one reference text, got an empty one")
    return texts


def _label_style(names: tuple[str, ...], references: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Find out whether the references are class names or class numbers."""
    seen = {text for accepted in references for text in accepted}
    numbers = tuple(str(i) for i in range(len(names)))
    if seen <= set(names) or not names:
        return names
    if seen <= set(numbers):
        return numbers
    odd = sorted(seen - set(names) - set(numbers))
    raise ValueError(
        f"references must be label texts ({', '.join(names)}) or their numbers, got {odd[:3]}"
    )


def _accuracy(scored: _Scored) -> float:
    pairs = zip(scored.predictions, scored.references, strict=True)
    return _mean([float(prediction in accepted) for prediction, accepted in pairs])


def _token_accuracy(scored: _Scored) -> float:
    """Share of positions with the right word; missing and surplus words are wrong."""
    right = total = 0
    for prediction, reference in zip(scored.predictions, scored.first, strict=True):
        ours, theirs = prediction.split(), reference.split()
        right += sum(a == b for a, b in zip(ours, theirs, strict=False))
        total += max(len(ours), len(theirs))
    return right / total if total else 1.0


def _matthews(scored: _Scored) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len(set(scored.first)) < 2 or len(set(scored.predictions)) < 2:
        return 0.0
    return float(matthews_corrcoef(scored.first, scored.predictions))


def _f1(scored: _Scored) -> float:
    from sklearn.metrics import f1_score

    if len(scored.labels) != 2:
        raise ValueError(f"metric 'f1' needs exactly two labels, got {scored.labels!r}")
    positive = scored.labels[1]
    truth = [reference == positive for reference in scored.first]
    guess = [
        prediction == positive if prediction in scored.labels else not true
        for prediction, true in zip(scored.predictions, truth, strict=True)
    ]
    return float(f1_score(truth, guess, zero_division=0.0))


def _macro_f1(scored: _Scored) -> float:
    from sklearn.metrics import f1_score

    if len(scored.labels) < 2:
        raise ValueError(f"metric 'macro_f1' needs at least two labels, got {scored.labels!r}")
    value = f1_score(
        scored.first,
        scored.predictions,
        labels=list(scored.labels),
        average="macro",
        zero_division=0.0,
    )
    return float(value)


def _pearson(scored: _Scored) -> float:
    from scipy.stats import pearsonr

    return _correlation(scored, lambda x, y: float(pearsonr(x, y).statistic))


def _spearman(scored: _Scored) -> float:
    from scipy.stats import spearmanr

    return _correlation(scored, lambda x, y: float(spearmanr(x, y).statistic))


def _correlation(scored: _Scored, measure: Callable[[list[float], list[float]], float]) -> float:
    truth: list[float] = []
    for reference in scored.first:
        number = _number(reference)
        if number is None:
            raise ValueError(f"references of a correlation must be numbers, got {reference!r}")
        truth.append(number)
    guess = [_number(prediction) or 0.0 for prediction in scored.predictions]
    if len(set(truth)) < 2 or len(set(guess)) < 2:
        return 0.0
    value = measure(truth, guess)
    return value if math.isfinite(value) else 0.0


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _group_em(scored: _Scored) -> float:
    """Share of groups (MultiRC: questions) with every answer judged right."""
    right: dict[str, bool] = defaultdict(lambda: True)
    for i, group in enumerate(scored.groups):
        if group is None:
            raise ValueError("metric 'group_em' needs Example objects with a group, got none")
        right[group] &= scored.predictions[i] in scored.references[i]
    return _mean([float(value) for value in right.values()])


def normalize_answer(text: str) -> str:
    """Lower-case an answer, drop punctuation, articles and surplus spaces, as SQuAD does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _squad_em(scored: _Scored) -> float:
    return _best_over_references(scored, lambda guess, answer: float(guess == answer))


def _squad_f1(scored: _Scored) -> float:
    return _best_over_references(scored, _word_overlap)


def _rouge_1(scored: _Scored) -> float:
    return _best_over_references(scored, rouge_1, normalize=str)


def _rouge_l(scored: _Scored) -> float:
    return _best_over_references(scored, rouge_l, normalize=str)


def _word_overlap(guess: str, answer: str) -> float:
    ours, theirs = guess.split(), answer.split()
    if not ours or not theirs:
        # An answer that is only an article normalises to nothing; exact match agrees.
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _best_over_references(
    scored: _Scored,
    score: Callable[[str, str], float],
    *,
    normalize: Callable[[str], str] = normalize_answer,
) -> float:
    values = [
        max(score(normalize(prediction), normalize(text)) for text in accepted)
        for prediction, accepted in zip(scored.predictions, scored.references, strict=True)
    ]
    return _mean(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


METRICS: dict[str, Callable[[_Scored], float]] = {
    "accuracy": _accuracy,
    "token_accuracy": _token_accuracy,
    "matthews": _matthews,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "pearson": _pearson,
    "spearman": _spearman,
    "group_em": _group_em,
    "squad_em": _squad_em,
    "squad_f1": _squad_f1,
    "rouge1": _rouge_1,
    "rougeL": _rouge_l,
}
