# SPDX-License-Identifier: Apache-2.0
"""Text tasks made by the program, so that the whole method can be shown offline in minutes.

A text is eight letters with spaces between them; the target is the same letters rearranged,
shifted in the alphabet, or both. A backbone is trained on four tasks named by a tag word in front.
Source tasks carry no tag: only the adapter can know what to do. ``reverse_shift`` is the
composition of two sources, which is where a mixture of adapters should win.

Strings belong to train, validation or test by a checksum of their letters alone, so no string of a
test part is ever seen in training, in whatever task and with whatever seed.

Next: `tokenization.py` encodes the examples with `synthetic_tokenizer`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pemt_fast.data.template import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnop"
STRING_LENGTH = 8

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SyntheticTask:
    """A rule on strings: name, sentence for the task prompt, tag word in front (None: no tag)."""

    name: str
    description: str
    tag: str | None
    transform: Callable[[str], str]
    metrics: tuple[str, ...] = ("token_accuracy", "accuracy")


def _copy(letters: str) -> str:
    return letters


def _rotate(letters: str) -> str:
    return letters[1:] + letters[:1]


def _evenodd(letters: str) -> str:
    return letters[0::2] + letters[1::2]


def _shift(letters: str) -> str:
    return "".join(ALPHABET[(ALPHABET.index(c) + 1) % len(ALPHABET)] for c in letters)


def _reverse(letters: str) -> str:
    return letters[::-1]


def _reverse_shift(letters: str) -> str:
    return _shift(_reverse(letters))


def _sort(letters: str) -> str:
    return "".join(sorted(letters))


def _sort_descending(letters: str) -> str:
    return "".join(sorted(letters, reverse=True))


_EVENODD_SENTENCE = "write the letters in even places before the letters in odd places"
_SHIFT_SENTENCE = "move each letter to the next letter"
_REVERSE_SENTENCE = "write the letters in reverse order"

_ALL = (
    SyntheticTask("pretrain_copy", "write the letters as they are", "copy:", _copy),
    SyntheticTask("pretrain_rotate", "move the first letter to the end", "rotate:", _rotate),
    SyntheticTask("pretrain_evenodd", _EVENODD_SENTENCE, "evenodd:", _evenodd),
    SyntheticTask("pretrain_shift", _SHIFT_SENTENCE, "shift:", _shift),
    SyntheticTask("reverse", _REVERSE_SENTENCE, None, _reverse),
    SyntheticTask("sort", "write the letters in sorted order", None, _sort),
    SyntheticTask("shift", _SHIFT_SENTENCE, None, _shift),
    SyntheticTask("evenodd", _EVENODD_SENTENCE, None, _evenodd),
    SyntheticTask(
        "reverse_shift", f"{_REVERSE_SENTENCE} then {_SHIFT_SENTENCE}", None, _reverse_shift
    ),
    SyntheticTask(
        "sort_descending",
        "write the letters in sorted order from last to first",
        None,
        _sort_descending,
    ),
)

SYNTHETIC_TASKS: dict[str, SyntheticTask] = {task.name: task for task in _ALL}
BACKBONE_TASKS = ("pretrain_copy", "pretrain_rotate", "pretrain_evenodd", "pretrain_shift")
SYNTHETIC_SOURCES = ("reverse", "sort", "shift", "evenodd")
SYNTHETIC_TARGETS = ("reverse", "reverse_shift", "sort_descending")


def make_examples(
    task: str,
    count: int,
    seed: int = 0,
    *,
    split: Literal["train", "validation", "test"] = "train",
) -> list[Example]:
    """Draw distinct examples of a synthetic task; the same arguments give the same list.

    Args:
        task: a name in `SYNTHETIC_TASKS`.
        count: number of examples, at least 1.
        seed: seed of the draw; other tasks draw other strings with the same seed.
        split: "train", "validation" or "test"; their strings never meet.

    Raises:
        ValueError: unknown task or split, or a count below 1.
    """
    if task not in SYNTHETIC_TASKS:
        raise ValueError(
            f"unknown synthetic task {task!r}; known tasks: {', '.join(SYNTHETIC_TASKS)}"
        )
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
    rule = SYNTHETIC_TASKS[task]
    draw = random.Random(f"{task}/{split}/{seed}")
    strings: dict[str, None] = {}  # keeps the order of the draw
    while len(strings) < count:
        letters = "".join(draw.choices(ALPHABET, k=STRING_LENGTH))
        if split_of(letters) == split:
            strings[letters] = None
    return [_example(rule, letters) for letters in strings]


def split_of(letters: str) -> str:
    """Name the split a string belongs to: one tenth test, one tenth validation, the rest train."""
    bucket = zlib.crc32(letters.encode()) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _example(rule: SyntheticTask, letters: str) -> Example:
    source = " ".join(letters)
    target = " ".join(rule.transform(letters))
    if rule.tag is not None:
        source = f"{rule.tag} {source}"
    return Example(source, target, references=(target,), task=rule.name)


def synthetic_vocabulary() -> dict[str, int]:
    """Map every token to its id: specials as in T5, letters, tag words, words of descriptions."""
    tags = [task.tag for task in _ALL if task.tag is not None]
    words = sorted({word for task in _ALL for word in task.description.split()})
    tokens = ["<pad>", "</s>", "<unk>", *ALPHABET, *tags, *words]
    return {token: index for index, token in enumerate(tokens)}


def synthetic_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the synthetic tasks: one token per word, ``</s>`` at the end.

    Made in memory, but an ordinary tokenizer of `transformers`: it can be saved, loaded, padded
    and decoded.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = synthetic_vocabulary()
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B </s>",
        special_tokens=[("</s>", vocabulary["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
