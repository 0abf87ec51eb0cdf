# SPDX-License-Identifier: Apache-2.0
"""MixLoRA: a feed-forward layer as experts that share its frozen weights.

`FFN'(x) = Σ_{e ∈ top-k} p̃_e·FFN_e(x)`, where expert e has a LoRA of its own beside every linear of
the layer, `p = softmax(W_g·x)` per token and `p̃` the k largest, divided by their sum. The layer
runs once per rank of the choice, each time with every token's expert of that rank; its own forward
is not copied. Load balancing: `E·Σ_e f_e·P_e` with the share f of the tokens that expert e gets and
the mean P of its probability.
Source: github TUDB-Labs/MoE-PEFT, moe_peft/adapters/mixlora.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pemt_fast.nn.adapted_linear import MixtureLinear
from pemt_fast.nn.routing import Routing, RoutingState


class Slot:
    """Which expert each token has at the moment: `[B, S, E]`, 1 for it and 0 for the others."""

    def __init__(self) -> None:
        self.gate: Tensor | None = None


class ExpertLinear(MixtureLinear):
    """A linear of the layer with one LoRA per expert, of which each token takes its own.

    Args:
        base, routing: As in `MixtureLinear`.
        ranks: One per expert.
        slot: Shared with the other linears of the layer and with the layer.
        **options: As in `MixtureLinear`.
    """

    def __init__(
        self, base: Any, routing: Routing, ranks: tuple[int, ...], slot: Slot, **options: Any
    ) -> None:
        super().__init__(base, routing, ranks, None, **options)
        self.slot = slot

    def prepare(self, state: RoutingState, rows: int) -> None:
        """Nothing: the gate is another one for every token."""

    def _gate(self, x: Tensor, state: RoutingState) -> Tensor:
        assert self.slot.gate is not None  # the layer around it sets it
        return self.scale * self.slot.gate

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """There are none: which expert a token takes depends on the token."""
        raise ValueError("the experts of MixLoRA depend on the token and do not merge")


class MixLoraFeedForward(nn.Module):
    """The feed-forward layer with a router in front.

    Args:
        base: The layer, whose linears are `ExpertLinear`.
        in_features: D.
        num_experts: E.
        top_k: Experts per token.
        slot: Shared with the linears.
        routing: Shared with the wrapped model.
        name: Key of the recorded loss.
    """

    def __init__(
        self,
        base: nn.Module,
        in_features: int,
        num_experts: int,
        top_k: int,
        slot: Slot,
        routing: Routing,
        name: str,
    ) -> None:
        super().__init__()
        self.base = base
        self.w_gate = nn.Parameter(0.02 * torch.randn(num_experts, in_features))
        self.top_k = top_k
        self.slot = slot
        self.routing = routing
        self.name = name

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D]` to what the layer makes of it."""
        if not self.routing.enabled:
            return self.base(hidden_states)
        state = self.routing.current()
        # In float32, as published: the choice must not depend on the rounding of 16 bits.
        wide = self.w_gate.dtype if self.w_gate.dtype == torch.float64 else torch.float32
        probability = torch.softmax(hidden_states.to(wide) @ self.w_gate.to(wide).t(), -1)
        chosen, experts = probability.topk(self.top_k, -1)  # [B, S, k]
        chosen = chosen / chosen.sum(-1, keepdim=True)
        choices = torch.arange(probability.shape[-1], device=experts.device)
        taken = (experts.unsqueeze(-1) == choices).to(wide)  # [B, S, k, E]
        out: Tensor | None = None
        for rank in range(self.top_k):
            self.slot.gate = taken[:, :, rank]
            part = self.base(hidden_states)
            part = part * chosen[..., rank : rank + 1].to(part.dtype)
            out = part if out is None else out + part
        self.slot.gate = None
        if state.wants_loss:
            loss = self._imbalance(taken.sum(2), probability, state)
            if state.recording:
                state.losses[self.name] = loss
        assert out is not None
        return out

    def _imbalance(self, taken: Tensor, probability: Tensor, state: RoutingState) -> Tensor:
        """`E·Σ_e f_e·P_e` over the tokens that are not padding."""
        mask = state.decoder_mask if self.name.startswith("decoder") else state.encoder_mask
        if mask is None or mask.shape != taken.shape[:2]:
            share, mean = taken.mean((0, 1)), probability.mean((0, 1))
        else:
            weight = (mask / mask.sum().clamp_min(1)).to(taken.dtype).unsqueeze(-1)
            share, mean = (taken * weight).sum((0, 1)), (probability * weight).sum((0, 1))
        return probability.shape[-1] * (share * mean).sum()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"experts={self.w_gate.shape[0]}, top_k={self.top_k}"
