# SPDX-License-Identifier: Apache-2.0
"""ROUGE-1 and ROUGE-L of a text against one reference, as F-measures from 0 to 1.

With P words of the prediction, R of the reference and M matched, F = 2 M / (P + R). ROUGE-1 matches
words as often as they occur in both; ROUGE-L takes the longest common subsequence. Words are runs
of ASCII letters and digits in lower case, as in the `rouge_score` package without its stemmer:
texts of other scripts have none and score 0.

Next: `metrics.py` takes the best of several references and the mean over texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[a-z0-9]+")


def rouge_1(prediction: str, reference: str) -> float:
    """Words in common, whatever their order."""
    ours, theirs = _words(prediction), _words(reference)
    return _measure(sum((Counter(ours) & Counter(theirs)).values()), ours, theirs)


def rouge_l(prediction: str, reference: str) -> float:
    """The longest sequence of words that both hold in this order, with gaps."""
    ours, theirs = _words(prediction), _words(reference)
    return _measure(_longest_common(ours, theirs), ours, theirs)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _measure(matched: int, ours: Sequence[str], theirs: Sequence[str]) -> float:
    return 2 * matched / (len(ours) + len(theirs)) if matched else 0.0


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by a row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]
