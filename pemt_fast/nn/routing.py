# SPDX-License-Identifier: Apache-2.0
"""What one forward pass of a wrapped model knows, for the modules deep inside it.

T5's layers pass hidden states only. Masks for the loss, the pooled encoder prompt for the decoder's
gates and the place where gates and losses are collected travel in a `RoutingState` that the wrapped
model sets on a shared `Routing` for the duration of a call. Gradient checkpointing runs layers
again during backward: `RoutedCheckpoint` gives each layer the state of its own forward pass back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from pemt_fast.nn.gates import pool_prompt


@dataclass
class RoutingState:
    """State of one forward pass or one `generate` call.

    Attributes:
        wants_loss: Whether the layers compute the Task Sparsity Loss.
        encoder_mask: `[B, P + S]`, tokens that count in the encoder's loss; None for all.
        decoder_mask: `[B, S]`, the same for the decoder.
        generating: Whether this is a `generate` call: the decoder's gates are computed once.
        gate_threshold: Gate weights below it are dropped, outside of training.
        recording: Whether layers store gates and losses here. Off during recomputation.
        encoder_states: The encoder output whose pooled prompt is `encoder_query`.
        encoder_query: `[B, d_model]`, what the decoder's gates look at.
        gates: Gate weights `[B, E]` by layer name.
        decoder_gates: The decoder's gates for `encoder_states`, kept while generating.
        losses: Task Sparsity Loss by layer name.
    """

    wants_loss: bool = False
    encoder_mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    generating: bool = False
    gate_threshold: float = 0.0
    recording: bool = True
    encoder_states: Tensor | None = None
    encoder_query: Tensor | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)
    decoder_gates: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def see_encoder(self, states: Tensor, prompt_length: int) -> None:
        """Pool the prompt positions of the encoder output, once per output."""
        if self.encoder_states is not states:
            self.encoder_states = states
            self.encoder_query = pool_prompt(states, prompt_length)
            self.decoder_gates = {}


class Routing:
    """The slot that one wrapped model and its layers share."""

    def __init__(self) -> None:
        self.state: RoutingState | None = None
        self.enabled = True

    @contextlib.contextmanager
    def use(self, state: RoutingState | None) -> Iterator[None]:
        """Make `state` the current one inside the block."""
        previous, self.state = self.state, state
        try:
            yield
        finally:
            self.state = previous


class RoutedCheckpoint:
    """A checkpoint function that recomputes a layer under the state of its forward pass."""

    def __init__(self, checkpoint: Callable[..., object], routing: Routing) -> None:
        self.checkpoint = checkpoint
        self.routing = routing

    def __call__(self, function: Callable[..., object], *args: object) -> object:
        """Checkpoint `function(*args)`."""
        state = self.routing.state

        def run(*inner: object) -> object:
            with self.routing.use(state):
                return function(*inner)

        return self.checkpoint(run, *args)
