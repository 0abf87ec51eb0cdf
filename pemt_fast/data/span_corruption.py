"""T5's pretraining objective: text in, batches of corrupted token ids out.

A block of tokens loses short random spans. In the input each span becomes one sentinel,
``<extra_id_0>`` the first, and the target repeats the sentinels, each followed by what it hides::

    ids     Thank you for inviting me to your party last week
    input   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    target  <extra_id_0> for inviting <extra_id_1> last </s>

How many tokens and spans a block loses depends on its length alone, so blocks of one length give
batches without padding. Batch number n is a function of the seed and n: nothing has to be stored
to continue an interrupted run.

Next: `pemt_fast/training/pretrain.py` trains on these batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(100))
# Every byte has a token, so no text is unknown; one merge is the least that can be learnt.
MIN_VOCAB_SIZE = 3 + 256 + 1 + len(SENTINELS)
IGNORED_LABEL = -100

_HELD_OUT_BLOCKS = 64
# Streams of random numbers that must not meet.
_ORDER, _SPANS, _HELD_OUT, _TASKS = range(4)

Batch = dict[str, np.ndarray]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, progress: bool = False
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary with T5's conventions.

    ``<pad>`` is 0, ``</s>`` 1, ``<unk>`` 2, and the sentinels are the last hundred ids,
    ``<extra_id_0>`` the very last, as in the published vocabularies. ``</s>`` closes every text.
    A text begins as if a space stood in front, so a word has the same id there as elsewhere.

    Args:
        texts: what to learn from.
        vocab_size: number of ids, sentinels included. A short text gives fewer.
        progress: show the trainer's progress bars.

    Returns:
        An ordinary tokenizer of `transformers`; it can be saved and loaded without network.

    Raises:
        ValueError: `vocab_size` has no room for the special tokens and all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, got {vocab_size}")
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SENTINELS),
        special_tokens=["<pad>", "</s>", "<unk>"],  # ids 0, 1, 2
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(list(reversed(SENTINELS)))
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(SENTINELS),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def span_corruption(
    ids: Sequence[int],
    rng: np.random.Generator,
    *,
    density: float = 0.15,
    mean_span: float = 3.0,
    sentinels: Sequence[int],
    eos_id: int = EOS_ID,
) -> tuple[list[int], list[int]]:
    """Hide random spans of `ids`; see the example at the top of the file.

    As in T5, kept and hidden stretches alternate, a kept one first and a hidden one last, and all
    divisions into stretches are equally likely.

    Args:
        ids: at least two tokens, without a closing ``</s>``.
        rng: source of the draws.
        density: share of the tokens to hide, in (0, 1); rounded to whole tokens, at least one.
        mean_span: mean length of a hidden span, at least 1; rounded to whole spans.
        sentinels: ids of the sentinels in the order of their use.
        eos_id: id that closes input and target.

    Returns:
        Input and target ids, of the lengths that `corrupted_lengths` tells.

    Raises:
        ValueError: `ids` is too short, there are more spans than sentinels, or a number is out of
            its range.
    """
    hidden, spans = _counts(len(ids), density, mean_span)
    if spans > len(sentinels):
        raise ValueError(
            f"sentinels must hold one id per span: {len(ids)} tokens give {spans} spans, "
            f"got {len(sentinels)} sentinels"
        )
    kept_lengths = _divide(len(ids) - hidden, spans, rng)
    hidden_lengths = _divide(hidden, spans, rng)
    inputs: list[int] = []
    targets: list[int] = []
    start = 0
    for sentinel, keep, hide in zip(sentinels[:spans], kept_lengths, hidden_lengths, strict=True):
        inputs += [*ids[start : start + keep], sentinel]
        targets += [sentinel, *ids[start + keep : start + keep + hide]]
        start += keep + hide
    return [*inputs, eos_id], [*targets, eos_id]


def corrupted_lengths(
    length: int, *, density: float = 0.15, mean_span: float = 3.0
) -> tuple[int, int]:
    """Lengths of input and target that `span_corruption` makes of `length` tokens."""
    hidden, spans = _counts(length, density, mean_span)
    return length - hidden + spans + 1, hidden + spans + 1


def block_length(sequence_length: int, *, density: float = 0.15, mean_span: float = 3.0) -> int:
    """Return how many tokens to corrupt so that the input fills at most `sequence_length`."""
    length = 2
    while corrupted_lengths(length + 1, density=density, mean_span=mean_span)[0] <= sequence_length:
        length += 1
    return length


def _counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Numbers of hidden tokens and of spans."""
    if length < 2:
        raise ValueError(f"ids must hold at least 2 tokens, got {length}")
    if not 0 < density < 1:
        raise ValueError(f"density must be between 0 and 1, both excluded, got {density}")
    if mean_span < 1:
        raise ValueError(f"mean_span must be at least 1, got {mean_span}")
    hidden = min(max(round(length * density), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), hidden, length - hidden)


def _divide(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Divide `total` into `parts` lengths of at least one."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total).tolist()


class TextBatches:
    """Corrupted blocks of a text, every block once before any comes again, corrupted anew.

    Args:
        ids: the text's tokens, one after another.
        sentinels: ids of the sentinels in the order of their use.
        batch_size: blocks per batch.
        sequence_length: input length of a batch.
        seed: seed of order and spans.
        density: as in `span_corruption`.
        mean_span: as in `span_corruption`.

    Raises:
        ValueError: the text is shorter than two blocks (one is held out).
    """

    def __init__(
        self,
        ids: np.ndarray,
        sentinels: Sequence[int],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        density: float = 0.15,
        mean_span: float = 3.0,
    ) -> None:
        length = block_length(sequence_length, density=density, mean_span=mean_span)
        count = len(ids) // length
        if count < 2:
            raise ValueError(
                f"the text must have at least {2 * length} tokens for a sequence_length of "
                f"{sequence_length}, got {len(ids)}"
            )
        blocks = ids[: count * length].reshape(count, length)
        blocks = blocks[np.random.default_rng((seed, _HELD_OUT)).permutation(count)]
        held_out = min(_HELD_OUT_BLOCKS, max(1, count // 50))
        self._held_out, self._blocks = blocks[:held_out], blocks[held_out:]
        self._batch_size, self._seed = batch_size, seed
        self._sentinels, self._density, self._mean_span = sentinels, density, mean_span

    def batch(self, number: int) -> Batch:
        """Make batch `number` of the endless sequence."""
        count = len(self._blocks)
        first = number * self._batch_size
        epochs = range(first // count, (first + self._batch_size - 1) // count + 1)
        order = np.concatenate(
            [np.random.default_rng((self._seed, _ORDER, e)).permutation(count) for e in epochs]
        )
        rows = order[first - epochs[0] * count :][: self._batch_size]
        return self._corrupt(self._blocks[rows], (self._seed, _SPANS, number))

    def held_out(self) -> list[Batch]:
        """Make the batches of blocks that are never trained on, always the same."""
        return [
            self._corrupt(self._held_out[i : i + self._batch_size], (self._seed, _HELD_OUT, i))
            for i in range(0, len(self._held_out), self._batch_size)
        ]

    def _corrupt(self, blocks: np.ndarray, seed: tuple[int, ...]) -> Batch:
        rng = np.random.default_rng(seed)
        pairs = [
            span_corruption(
                block,
                rng,
                density=self._density,
                mean_span=self._mean_span,
                sentinels=self._sentinels,
            )
            for block in blocks.tolist()
        ]
        inputs = np.array([pair[0] for pair in pairs], dtype=np.int64)
        labels = np.array([pair[1] for pair in pairs], dtype=np.int64)
        return {"input_ids": inputs, "attention_mask": np.ones_like(inputs), "labels": labels}


class TaskBatches:
    """Random rows of tokenized tasks, in batches of similar length to save padding.

    Args:
        rows: what `tokenize` returns.
        batch_size: rows per batch.
        seed: seed of the draws.
    """

    _POOL = 8  # batches drawn at once, sorted by length, of which one is used

    def __init__(
        self, rows: Sequence[Mapping[str, list[int]]], *, batch_size: int, seed: int
    ) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed

    def batch(self, number: int) -> Batch:
        """Make batch `number` of the endless sequence."""
        rng = np.random.default_rng((self._seed, _TASKS, number))
        drawn = rng.integers(len(self._rows), size=self._POOL * self._batch_size).tolist()
        drawn.sort(key=lambda index: len(self._rows[index]["input_ids"]))
        start = int(rng.integers(self._POOL)) * self._batch_size
        rows = [self._rows[index] for index in drawn[start : start + self._batch_size]]
        fill = {"input_ids": PAD_ID, "attention_mask": 0, "labels": IGNORED_LABEL}
        return {name: _pad([row[name] for row in rows], value) for name, value in fill.items()}


def encode_stream(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, progress: bool = False
) -> np.ndarray:
    """Encode texts one after another, nothing between them."""
    from tqdm.auto import tqdm

    core = tokenizer.backend_tokenizer
    pieces = []
    for start in tqdm(range(0, len(texts), 1000), desc="encode", disable=not progress):
        for encoded in core.encode_batch(texts[start : start + 1000], add_special_tokens=False):
            pieces.append(np.array(encoded.ids, dtype=np.int32))
    return np.concatenate(pieces)


def _pad(rows: Sequence[list[int]], value: int) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
