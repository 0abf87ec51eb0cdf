# SPDX-License-Identifier: Apache-2.0
"""Small rewrites of a row that a plain list of markers and columns cannot express.

Each function takes a row and returns a new one with the same columns. They restate what the
text-to-text versions of these data sets do before formatting: padded punctuation for extractive
question answering, markup removed from MultiRC, highlight marks folded into ReCoRD passages, and
the two spans of WSC marked in the text.

Next: `tasks.py` attaches them to tasks through `Task.prepare`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from pemt_fast.data.template import Row

_NOT_WORD = re.compile(r"[^\w\s]")
_LINE_BREAK_TAG = re.compile(r"<br>")
_BOLD_TAG = re.compile(r"</?b>")
_HIGHLIGHT_AFTER_STOP = re.compile(r"([.?!\"'])\n@highlight\n")
_HIGHLIGHT = "\n@highlight\n"


def pad_punctuation(text: str) -> str:
    """Set every punctuation mark or symbol apart with spaces and collapse white space.

    Letters, digits, underscores and combining accents stay joined to their neighbours.
    """

    def spaced(match: re.Match[str]) -> str:
        mark = match.group()
        return mark if unicodedata.category(mark).startswith("M") else f" {mark} "

    return " ".join(_NOT_WORD.sub(spaced, text).split())


def pad_question_answering(row: Row) -> Row:
    """Pad question, context and all answers, so that predictions and references agree in form."""
    answers = row["answers"]
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    padded = dict(row)
    if isinstance(answers, list | tuple):
        padded["answers"] = [pad_punctuation(a) if isinstance(a, str) else a for a in answers]
    for column in ("question", "context"):
        value = row[column]
        if isinstance(value, str):
            padded[column] = pad_punctuation(value)
    return padded


def strip_markup(row: Row) -> Row:
    """Remove line-break and bold tags from the three texts of a MultiRC row."""
    cleaned = dict(row)
    for column in ("question", "answer", "paragraph"):
        value = row[column]
        if isinstance(value, str):
            cleaned[column] = _BOLD_TAG.sub("", _LINE_BREAK_TAG.sub(" ", value))
    return cleaned


def flatten_record(row: Row) -> Row:
    """Join the entities with commas and turn highlight marks of the passage into sentence ends."""
    flat = dict(row)
    passage, entities = row["passage"], row["entities"]
    if isinstance(passage, str):
        flat["passage"] = _HIGHLIGHT_AFTER_STOP.sub(r"\1 ", passage).replace(_HIGHLIGHT, ". ")
    if isinstance(entities, list | tuple):
        flat["entities"] = ", ".join(str(entity) for entity in entities)
    return flat


def mark_wsc_spans(row: Row) -> Row:
    """Write ``* noun *`` and ``# pronoun #`` around the two spans of a WSC row.

    The indices count words. As in the published preparation a span that does not start at its
    index stays unmarked, and so does a pronoun that is part of the noun; each happens once.
    """
    text = row["text"]
    if not isinstance(text, str):
        return row
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    spans: list[tuple[int, int, str]] = []
    for number, mark in ((1, "*"), (2, "#")):
        span, index = row[f"span{number}_text"], row[f"span{number}_index"]
        if not isinstance(span, str) or not isinstance(index, int):
            raise ValueError(
                f"task 'wsc': span{number}_text must be text and span{number}_index an integer, "
                f"got {span!r} and {index!r}"
            )
        if 0 <= index < len(starts) and text.startswith(span, starts[index]):
            start, end = starts[index], starts[index] + len(span)
            if all(end <= other_start or other_end <= start for other_start, other_end, _ in spans):
                spans.append((start, end, mark))
    # From right to left, so that earlier offsets stay true.
    for start, end, mark in sorted(spans, reverse=True):
        text = f"{text[:start]}{mark} {text[start:end]} {mark}{text[end:]}"
    return {**row, "text": text}
