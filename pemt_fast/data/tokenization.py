# SPDX-License-Identifier: Apache-2.0
"""Turns examples into token ids, in the form `DataCollatorForSeq2Seq` pads into batches.

T5's convention is kept: one end-of-sequence token closes every source and every target, also one
that had to be cut. A source that is too long is cut and counted. A label text is never cut: half a
label would be trained and then never matched, so a limit that is too small is an error.

Next: `pemt_fast/training` builds batches of these rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pemt_fast.data.template import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("pemt_fast")

MAX_LABEL_LENGTH = 8
MAX_ANSWER_LENGTH = 128


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_length: int = 256,
    max_target_length: int | None = None,
) -> list[dict[str, list[int]]]:
    """Encode sources and targets; the number of cut texts goes to the log as one warning.

    Args:
        examples: what to encode.
        tokenizer: a tokenizer of `transformers` with an end-of-sequence token.
        max_source_length: longest source in tokens, the closing token included. A task prompt is
            put in front later and does not count.
        max_target_length: longest target in tokens, the closing token included. None means 8 for
            label and score tasks and 128 for free text.

    Returns:
        Per example ``input_ids``, ``attention_mask`` and ``labels`` as lists of ints, not padded.

    Raises:
        ValueError: a length is below 2, the tokenizer has no end-of-sequence token, or a label text
            does not fit `max_target_length`.
    """
    lengths = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    for name, length in lengths.items():
        if length is not None and length < 2:
            raise ValueError(f"{name} must be at least 2 (one token and its end), got {length}")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-sequence token, its eos_token_id is None")
    if not examples:
        return []

    sources, cut_sources = _encode_sources(examples, tokenizer, max_source_length)
    targets, cut_targets = _encode_targets(examples, tokenizer, max_target_length)
    if cut_sources or cut_targets:
        logger.warning(
            "cut %d of %d sources to %d tokens and %d targets",
            *(cut_sources, len(examples), max_source_length, cut_targets),
        )
    return [
        {"input_ids": source, "attention_mask": [1] * len(source), "labels": target}
        for source, target in zip(sources, targets, strict=True)
    ]


def _encode_sources(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[list[int]], int]:
    # One token more than needed tells which texts are too long without encoding all of them.
    encoded = tokenizer([e.source for e in examples], truncation=True, max_length=limit + 1)
    closed = [_close(ids, tokenizer.eos_token_id, limit) for ids in encoded["input_ids"]]
    return [ids for ids, _ in closed], sum(cut for _, cut in closed)


def _encode_targets(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[list[list[int]], int]:
    texts = list(dict.fromkeys(e.target for e in examples))
    encoded = dict(zip(texts, tokenizer(text_target=texts)["input_ids"], strict=True))
    targets: list[list[int]] = []
    cut_targets = 0
    for example in examples:
        allowed = limit or (MAX_LABEL_LENGTH if example.is_label else MAX_ANSWER_LENGTH)
        ids, cut = _close(encoded[example.target], tokenizer.eos_token_id, allowed)
        if cut and example.is_label:
            length = len(_open(encoded[example.target], tokenizer.eos_token_id)) + 1
            raise ValueError(
                f"task {example.task!r}: label text {example.target!r} takes {length} tokens, "
                f"but max_target_length is {allowed}; raise it to {length} or more"
            )
        targets.append(ids)
        cut_targets += cut
    return targets, cut_targets


def _open(ids: list[int], eos: int) -> list[int]:
    return ids[:-1] if ids and ids[-1] == eos else ids


def _close(ids: list[int], eos: int, limit: int) -> tuple[list[int], bool]:
    """End the ids with exactly one closing token within the limit; say whether any were cut."""
    body = _open(ids, eos)
    return [*body[: limit - 1], eos], len(body) > limit - 1
