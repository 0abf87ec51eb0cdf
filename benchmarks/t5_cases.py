# SPDX-License-Identifier: Apache-2.0
"""Shapes of PEMT's second stage on T5, and the operations of their matmuls.

Letters as everywhere: B sequences, E sources, R their rank, N = E·R, D = d_ff, H = d_model. The
encoder has `prompt + source` positions per sequence, the decoder `target`. Who computes it:
`t5_models.py`.
"""

from __future__ import annotations

import dataclasses

FORWARD, STEP, GENERATE = "forward", "step", "generate"
MODES = (FORWARD, STEP, GENERATE)
# Contenders, beside those of `tail_forms.py`.
PLAIN, OURS = "plain", "ours"
CPU_LAYERS = 3  # of encoder and decoder each, so that T5-large fits a small machine
QUICK_LAYERS = 1
GENERATED = 32  # tokens


@dataclasses.dataclass(frozen=True)
class Shape:
    """A T5 v1.0 as published; `layers` of encoder and decoder each."""

    name: str
    H: int
    D: int
    heads: int
    d_kv: int
    layers: int
    vocabulary: int = 32128


SHAPES = (
    Shape("t5-small", H=512, D=2048, heads=8, d_kv=64, layers=6),
    Shape("t5-base", H=768, D=3072, heads=12, d_kv=64, layers=12),
    Shape("t5-large", H=1024, D=4096, heads=16, d_kv=64, layers=24),
)
LENGTHS = ((128, 16), (512, 64))  # tokens of source and target


@dataclasses.dataclass(frozen=True)
class T5Case:
    """One shape with one batch; `layers` may be fewer than published."""

    shape: Shape
    layers: int
    source: int
    target: int
    B: int = 8
    E: int = 6
    R: int = 64
    prompt: int = 20
    reduction: int = 16

    @property
    def name(self) -> str:
        """`t5-base 8 × 128 → 16`."""
        return f"{self.shape.name} {self.B} × {self.source} → {self.target}"

    @property
    def encoded(self) -> int:
        """Positions of the encoder per sequence."""
        return self.prompt + self.source

    @property
    def tail_tokens(self) -> int:
        """Tokens that pass a feed-forward tail, summed over the tails."""
        return self.layers * self.B * (self.encoded + self.target)

    def t5_flop(self, mode: str) -> int:
        """Of the matmuls of the frozen T5, with prompt and language head.

        Forward, per sequence and with A = heads·d_kv: a projection H → A costs 2·H·A per position
        and the feed-forward layer 4·H·D; each of the two products of an attention 2·A per pair of
        positions; the head 2·H·vocabulary per target position. In a step a frozen linear layer
        costs as much again for the gradient of its input, a product of an attention twice as much
        again for both of its factors. The first decoder layer has no backward through its
        self-attention and the queries after it: nothing before them needs a gradient.
        """
        shape, encoded, target = self.shape, self.encoded, self.target
        width = shape.heads * shape.d_kv
        projection = 2 * shape.H * width
        feed_forward = 4 * shape.H * shape.D
        linear = self.layers * (
            encoded * (4 * projection + feed_forward)
            + target * (4 * projection + feed_forward)
            + (2 * target + 2 * encoded) * projection  # across: q and o, k and v
        )
        linear += target * 2 * shape.H * shape.vocabulary
        products = self.layers * 4 * width * (encoded**2 + target**2 + target * encoded)
        if mode == FORWARD:
            return self.B * (linear + products)
        first = target * 5 * projection + 8 * width * target**2 + 2 * width * target * encoded
        return self.B * (2 * linear + 3 * products - first)

    def mixture_flop(self, mode: str) -> int:
        """Of the two matmuls of all mixtures, `2·N·(D + H)` per token; twice that in a step.

        The sources are frozen: backward has the gradients of x and of the hidden units.
        """
        once = 2 * self.tail_tokens * self.E * self.R * (self.shape.D + self.shape.H)
        return once if mode == FORWARD else 2 * once

    def adapters_flop(self, mode: str) -> int:
        """Of everything that PEMT multiplies in the tails: mixture, target adapter, loss.

        Target adapter of width H / reduction: `4·H²/reduction` per token, three times in a step.
        The loss, in a step only and in rank space: `2·N·H + 2·N·R` per token, with as much again
        backward, and the Gram matrices, `2·N·R·H` per tail. Gates and prompt are left out: a
        thousandth.
        """
        n, h = self.E * self.R, self.shape.H
        target = 4 * self.tail_tokens * h * (h // self.reduction)
        if mode == FORWARD:
            return self.mixture_flop(mode) + target
        loss = 2 * (2 * self.tail_tokens * n * (h + self.R)) + 2 * self.layers * 2 * n * self.R * h
        return self.mixture_flop(mode) + 3 * target + loss

    def share(self, mode: str, *, all_adapters: bool = False) -> float | None:
        """The mixture's operations (or those of all adapters) over those of T5; None to generate.

        Token by token the weights that are read decide, not the operations.
        """
        if mode == GENERATE:
            return None
        added = self.adapters_flop(mode) if all_adapters else self.mixture_flop(mode)
        return added / self.t5_flop(mode)


# The widths of T5-base, 8 × 128 tokens in the tail: the prompt is a part of them.
TAIL = T5Case(dataclasses.replace(SHAPES[1], vocabulary=64), layers=1, source=108, target=4)
TAIL_NAME = "tail of t5-base, 8 × 128 tokens"


def select(device: str, *, quick: bool = False, layers: int | None = None) -> list[T5Case]:
    """The cases in the order of the tables.

    Args:
        device: On the CPU the models are cut to `CPU_LAYERS`.
        quick: The smallest case with `QUICK_LAYERS` layers.
        layers: Cut to so many instead; must not exceed those of the shape.
    """
    if quick:
        return [T5Case(SHAPES[0], layers or QUICK_LAYERS, *LENGTHS[0])]
    default = CPU_LAYERS if device == "cpu" else None
    return [
        T5Case(shape, layers or default or shape.layers, *length)
        for shape in SHAPES
        for length in LENGTHS
    ]
