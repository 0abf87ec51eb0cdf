# SPDX-License-Identifier: Apache-2.0
"""PEMT's modules in place of `wo`, the last linear of T5's feed-forward layer.

Stage 1 (`SourceTail`): `y = W_o·h + adapter(h)`, one trainable source adapter.
Stage 2 (`MixtureTail`): `y = W_o·h + Σ_k g_k·adapter_k(h)`, `z = y + target(y)`; `h` is the d_ff
activation after dropout. T5 adds dropout and the residual to what these modules return.

Bottleneck experts (not LoRA) also add the layer's input `r` to each expert's output. The gate sums
to 1, so the mixture adds `r` once; a hook on the feed-forward module hands `r` over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pemt_fast.nn.bottleneck import BottleneckAdapter
from pemt_fast.nn.gates import PooledGate, drop_below, pool_in_passing
from pemt_fast.nn.mixture import AdapterMixture
from pemt_fast.nn.routing import Routing, RoutingState
from pemt_fast.nn.stacking import stack_weights, unstack_weights
from pemt_fast.nn.targets import TargetGates
from pemt_fast.nn.wrapped_linear import WrappedLinear, at_least_float, check_merges_into, is_plain
from pemt_fast.ops.cuda_door import takes_target
from pemt_fast.ops.dispatch import means_torch
from pemt_fast.ops.sparsity_loss import task_sparsity_loss


class _Tail(WrappedLinear):
    """What both stages share: `wo`, and the residual of bottleneck experts."""

    def __init__(self, base: Any, routing: Routing, adds_residual: bool) -> None:
        super().__init__(base, routing)
        self.adds_residual = adds_residual
        self.residual: Tensor | None = None

    def keep_residual(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the feed-forward module: remember its input."""
        self.residual = args[0]

    def _take_residual(self) -> Tensor | None:
        residual, self.residual = self.residual, None
        return residual if self.adds_residual else None


class SourceTail(_Tail):
    """Stage 1: `wo` with one trainable source adapter in parallel."""

    def __init__(
        self, base: nn.Module, adapter: BottleneckAdapter, routing: Routing, adds_residual: bool
    ) -> None:
        super().__init__(base, routing, adds_residual)
        self.adapter = adapter

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states [B, S, d_ff]` to `[B, S, d_model]`."""
        residual = self._take_residual()
        out = self.base(hidden_states)
        if not self.routing.enabled:
            return out
        self.routing.current()
        if self._is_merged_now():
            return out
        out = self.adapter(hidden_states, out)
        return out if residual is None else out + residual

    def merged_delta(self, task: int | None = None) -> Tensor:
        """As in `WrappedLinear`: `up·down` of a LoRA source."""
        adapter = self.adapter
        if adapter.activation != "identity" or adapter.down.bias is not None:
            raise ValueError(
                "the source adapter has an activation and biases: only LoRA sources merge"
            )
        check_merges_into(self.base)
        return at_least_float(adapter.up.weight) @ at_least_float(adapter.down.weight)


class MixtureTail(_Tail):
    """Stage 2: `wo`, the gated mixture of frozen sources, the target adapter, the loss.

    Args:
        base: The original `wo`.
        mixture: The frozen source adapters.
        gate: The trained gate, None for a single source (its weight is always 1).
        target_adapter: The trained adapter of the target task, or the mixture of those of several
            targets, of which each sequence takes its own.
        name: `encoder.i` or `decoder.i`, the key of the recorded gate and loss.
        prompt_length: Positions the encoder's gate pools over.
        routing: Shared with the wrapped model.
        adds_residual: Whether every expert adds the layer's input (bottleneck experts).
        recompute: Compute target adapter and loss again in backward instead of keeping what they
            need: half of what the tail keeps.
    """

    def __init__(
        self,
        base: nn.Module,
        mixture: AdapterMixture,
        gate: PooledGate | TargetGates | None,
        target_adapter: BottleneckAdapter | AdapterMixture,
        *,
        name: str,
        prompt_length: int,
        routing: Routing,
        adds_residual: bool,
        recompute: bool = False,
    ) -> None:
        super().__init__(base, routing, adds_residual)
        self.recompute = recompute
        self.mixture = mixture
        self.gate = gate
        self.target_adapter = target_adapter
        self.name = name
        self.is_decoder = name.startswith("decoder")
        self.prompt_length = prompt_length

    def _gate_weights(self, hidden_states: Tensor, state: RoutingState) -> tuple[Tensor, Tensor]:
        """The hidden states for the matmuls, and the gate `[B, E]`."""
        rows = hidden_states.shape[0]
        if self.gate is None:
            return hidden_states, torch.ones(rows, 1, device=hidden_states.device)
        if not self.is_decoder:
            hidden_states, query = pool_in_passing(
                hidden_states, self.prompt_length, state.prompt_mask
            )
            return hidden_states, self._drop_below(self.gate(query, state.task_ids), state)
        if self.name in state.decoder_gates:
            return hidden_states, state.decoder_gates[self.name]
        if state.encoder_query is None:
            raise RuntimeError("the decoder ran without encoder_hidden_states: its gates need them")
        gate = self.gate(state.encoder_query, state.task_rows(rows))
        gate = self._drop_below(gate, state)
        if state.generating:
            state.decoder_gates[self.name] = gate
        return hidden_states, gate

    def _drop_below(self, gate: Tensor, state: RoutingState) -> Tensor:
        if self.training or state.gate_threshold == 0:
            return gate
        return drop_below(gate, state.gate_threshold)

    def merged_delta(self, task: int | None = None) -> Tensor:
        """As in `WrappedLinear`: of a single LoRA source, whose gate is always 1."""
        mixture = self.mixture
        if self.gate is not None:
            raise ValueError(
                f"the gates of {self.name} depend on the input: with more than one source the "
                "mixture does not merge"
            )
        if mixture.activation != "identity" or mixture.b_down is not None:
            raise ValueError("the sources have activations and biases: only LoRA sources merge")
        check_merges_into(self.base)
        return at_least_float(mixture.w_up).t() @ at_least_float(mixture.w_down)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states [B, S, d_ff]` to `[B, S, d_model]`."""
        residual = self._take_residual()
        if not self.routing.enabled:
            return self.base(hidden_states)
        state = self.routing.current()
        hidden_states, gate = self._gate_weights(hidden_states, state)
        if state.recording:
            state.gates[self.name] = gate
        # A single source leaves nothing to select: the published code has no loss there either.
        wants_loss = state.wants_loss and self.gate is not None
        if not wants_loss and self._decodes(hidden_states):
            return self._decode(hidden_states, gate, residual)
        y, hidden = self._mix(hidden_states, gate, wants_loss)
        y = y if residual is None else y + residual
        if hidden is None:
            return self._adapt_to_target(y, state)
        z, loss = self._finish(y, gate, hidden, residual, state)
        if state.recording:
            state.losses[self.name] = loss
        return z

    def _mix(
        self, hidden_states: Tensor, gate: Tensor, with_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`wo` and the mixture, with the hidden units if asked for."""
        base, mixture = self.base, self.mixture
        if self._is_merged_now():
            return base(hidden_states), None
        if is_plain(base):
            return mixture.beside(base, hidden_states, gate, with_hidden=with_hidden)
        out = base(hidden_states)
        if with_hidden:
            return mixture.forward_with_hidden(hidden_states, gate, out)
        return mixture(hidden_states, gate, out), None

    def _decodes(self, hidden_states: Tensor) -> bool:
        """Whether mixture and target adapter may be one launch."""
        if not isinstance(self.target_adapter, BottleneckAdapter) or self.merged:
            return False
        return takes_target(self.mixture.impl, hidden_states)

    def _decode(self, hidden_states: Tensor, gate: Tensor, residual: Tensor | None) -> Tensor:
        out = self.base(hidden_states)
        out = out if residual is None else out + residual
        assert isinstance(self.target_adapter, BottleneckAdapter)
        return self.mixture.then(self.target_adapter, hidden_states, gate, out)

    def stack(self) -> None:
        """Make one matrix of `wo` and the down-projections where that saves a matmul.

        Called again when the parameters have moved: nothing but speed depends on it.
        """
        weight = self.mixture.w_down
        if self.merged or weight.is_meta:
            return
        if means_torch(self.mixture.impl, weight.device, weight.dtype):
            stack_weights(self.base, self.mixture)

    def release(self) -> None:
        """As in `WrappedLinear`: `wo` gets memory of its own again."""
        super().release()
        unstack_weights(self.base, self.mixture)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MixtureTail:
        super()._apply(fn, recurse)
        self.stack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.stack()

    def _finish(
        self,
        y: Tensor,
        gate: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        state: RoutingState,
    ) -> tuple[Tensor, Tensor]:
        """The target adapter and the loss, from the output of the mixture and its hidden units."""

        def run(y: Tensor, gate: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            z = self._adapt_to_target(y, state)
            loss = task_sparsity_loss(
                z, gate, hidden, self.mixture.w_up, self.mixture.b_up,
                residual=residual,
                mask=state.decoder_mask if self.is_decoder else state.encoder_mask,
                ranks=self.mixture.ranks, impl=self.mixture.impl,
            )  # fmt: skip
            return z, loss

        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, y, gate, hidden, use_reentrant=False, preserve_rng_state=False)
        return run(y, gate, hidden)

    def _adapt_to_target(self, y: Tensor, state: RoutingState) -> Tensor:
        adapter = self.target_adapter
        if isinstance(adapter, BottleneckAdapter):
            return adapter(y, y)
        return adapter(y, state.task_gate(y.shape[0]), y)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"name={self.name}, prompt_length={self.prompt_length}"
