# SPDX-License-Identifier: Apache-2.0
"""Extractive question answering: SQuAD, and the four sets of MRQA 2019 among PEMT's targets.

The MRQA sets are taken from copies on the hub that need no loading script. Their 512 tokens are
published; those of SQuAD, and of ReCoRD, are inferred from the authors' earlier scripts.
"""

from __future__ import annotations

from pemt_fast.data import rewrite
from pemt_fast.data.template import Task


def _reading(name: str, dataset: str) -> Task:
    """Extractive question answering; the MRQA sets share SQuAD's sentence and template."""
    return Task(
        name,
        "Find the short stretch of the passage that answers the question and write it down.",
        dataset=dataset,
        folder=name,
        source_fields=(("question", "question"), ("context", "context")),
        label_column="answers",
        kind="qa",
        metrics=("squad_em", "squad_f1"),
        split_rule="large",
        prepare=rewrite.pad_question_answering,
        max_source_length=512,
    )


QUESTION_ANSWERING = (
    _reading("squad", "rajpurkar/squad"),
    _reading("nq", "lucadiliello/naturalquestionsshortqa"),
    _reading("hotpotqa", "lucadiliello/hotpotqa"),
    _reading("newsqa", "lucadiliello/newsqa"),
    _reading("searchqa", "lucadiliello/searchqa"),
)
