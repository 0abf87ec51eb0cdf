# SPDX-License-Identifier: Apache-2.0
"""What one forward pass of a wrapped model knows, for the modules deep inside it.

T5's layers pass hidden states only. Task ids, masks for the loss, the pooled encoder prompt for the
decoder's gates and the place where gates and losses are collected travel in a `RoutingState` that
the wrapped model sets on a shared `Routing` for the duration of a call. Gradient checkpointing runs
layers again during backward: `RoutedCheckpoint` gives each layer the state of its own forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from pemt_fast.nn.gates import pool_prompt

# The id of a task that was not trained, for methods that have an answer to it.
UNSEEN_TASK = -1

REENTRANT = (
    "gradient checkpointing with use_reentrant=True loses the gradient of the Task Sparsity Loss "
    'and of the decoder gates; use gradient_checkpointing_kwargs={"use_reentrant": False}'
)


@dataclass
class RoutingState:
    """State of one forward pass or one `generate` call.

    Attributes:
        wants_loss: Whether the layers compute the Task Sparsity Loss.
        encoder_mask: `[B, P + S]`, tokens that count in the encoder's loss; None for all.
        decoder_mask: `[B, S]`, the same for the decoder.
        task_ids: `[B]`, the task of each sequence; None where the model has only one.
        num_tasks: How many there are.
        may_be_unseen: Whether one of `task_ids` may be `UNSEEN_TASK`; False only if known.
        prompt_mask: `[B, P]`, prompt positions that count; None for all.
        generating: Whether this is a `generate` call: the decoder's gates are computed once.
        gate_threshold: Gate weights below it are dropped, outside of training.
        recording: Whether layers store gates and losses here. Off during recomputation.
        encoder_states: The encoder output whose pooled prompt is `encoder_query`.
        encoder_query: `[B, d_model]`, what the decoder's gates look at.
        gates: Gate weights `[B, E]` by layer name.
        decoder_gates: The decoder's gates for `encoder_states`, kept while generating.
        losses: Task Sparsity Loss by layer name.
        prepared: What layers have made of the task ids for all steps of a `generate` call, by name.
    """

    wants_loss: bool = False
    encoder_mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    task_ids: Tensor | None = None
    num_tasks: int = 1
    may_be_unseen: bool = True
    prompt_mask: Tensor | None = None
    generating: bool = False
    gate_threshold: float = 0.0
    recording: bool = True
    encoder_states: Tensor | None = None
    encoder_query: Tensor | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)
    decoder_gates: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)

    def see_encoder(self, states: Tensor, prompt_length: int) -> None:
        """Pool the prompt positions of the encoder output, once per output."""
        if self.encoder_states is not states:
            self.encoder_states = states
            mask = per_row(self.prompt_mask, states.shape[0])
            self.encoder_query = pool_prompt(states, prompt_length, mask)
            self.decoder_gates = {}

    def task_rows(self, rows: int) -> Tensor | None:
        """The task of each of `rows` rows of hidden states; None where there is only one task."""
        return per_row(self.task_ids, rows)

    def task_gate(self, rows: int) -> Tensor:
        """`[rows, num_tasks]`, float32: 1 for the row's task, 0 for the others."""
        task_ids = self.task_rows(rows)
        assert task_ids is not None  # the wrapped model asks for them
        tasks = torch.arange(self.num_tasks, device=task_ids.device)
        return (task_ids.unsqueeze(1) == tasks).float()


@overload
def per_row(tensor: Tensor, rows: int) -> Tensor: ...
@overload
def per_row(tensor: Tensor | None, rows: int) -> Tensor | None: ...
def per_row(tensor: Tensor | None, rows: int) -> Tensor | None:
    """`[B, …]` as `[rows, …]`: beams make several neighbouring rows of each sequence."""
    if tensor is None or tensor.shape[0] == rows:
        return tensor
    return tensor.repeat_interleave(rows // tensor.shape[0], 0)


class Routing:
    """The slot that one wrapped model and its layers share."""

    def __init__(self) -> None:
        self.state: RoutingState | None = None
        self.enabled = True

    def current(self) -> RoutingState:
        """The state of the call that is running.

        Raises:
            RuntimeError: the T5 was called without the model around it.
        """
        if self.state is None:
            raise RuntimeError(
                "this T5 carries pemt_fast adapters: call the model that get_model returned, "
                "not the T5 inside it, or unload() it first"
            )
        return self.state

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


def route_checkpoints(
    blocks: Iterable[Any], routing: Routing, *, takes_reentrant: bool = False
) -> None:
    """Let the recomputed ones of a model's `blocks` see the routing state of their forward pass.

    Raises:
        ValueError: they are checkpointed in the re-entrant form, and the caller does not take it.
    """
    for block in blocks:
        function = getattr(block, "_gradient_checkpointing_func", None)
        if function is None or isinstance(function, RoutedCheckpoint):
            continue
        if not takes_reentrant and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(REENTRANT)
        block._gradient_checkpointing_func = RoutedCheckpoint(function, routing)


def unroute_checkpoints(blocks: Iterable[Any]) -> None:
    """Undo `route_checkpoints`."""
    for block in blocks:
        function = getattr(block, "_gradient_checkpointing_func", None)
        if isinstance(function, RoutedCheckpoint):
            block._gradient_checkpointing_func = function.checkpoint
