# SPDX-License-Identifier: Apache-2.0
"""MixLoRA (Li et al., 2024): feed-forward layers as experts chosen per token: `nn/mix_lora.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from pemt_fast.methods.lora import LoraConfig
from pemt_fast.nn.mix_lora import ExpertLinear, MixLoraFeedForward, Slot
from pemt_fast.nn.routing import Routing

# Last part of the name of the feed-forward layers of T5 and of decoder-only models.
_FEED_FORWARD = ("DenseReluDense", "mlp")


@dataclass(frozen=True, kw_only=True)
class MixLoraConfig(LoraConfig):
    """LoRA beside `target_modules`, and experts in every feed-forward layer.

    Attributes:
        num_experts: E.
        top_k: Experts per token.
        balance_weight: Of the load-balancing loss.
    """

    method: ClassVar[str] = "mix_lora"

    num_experts: int = 8
    top_k: int = 2
    balance_weight: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("num_experts", 1)
        self.require_at_least("top_k", 1)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}"
            )
        if self.balance_weight < 0:
            raise ValueError(f"balance_weight must not be negative, got {self.balance_weight}")

    @property
    def aux_weight(self) -> float:
        """Weight of the auxiliary loss."""
        return self.balance_weight

    def replacements(self, model: Any, routing: Routing) -> list[tuple[str, nn.Module]]:
        """As in `LinearConfig`, and the feed-forward layers from the inside out."""
        found = super().replacements(model, routing)
        layers = [
            (name, module)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in _FEED_FORWARD
        ]
        if not layers:
            raise ValueError(f"the model has no feed-forward layer named {list(_FEED_FORWARD)}")
        for name, layer in layers:
            slot = Slot()
            linears = [(n, m) for n, m in layer.named_children() if isinstance(m, nn.Linear)]
            for inner, linear in linears:
                expert = ExpertLinear(
                    linear, routing, (self.r,) * self.num_experts, slot,
                    scale=self.scale, dropout=self.dropout, impl=self.impl,
                )  # fmt: skip
                found.append((f"{name}.{inner}", expert))
            width = linears[0][1].in_features
            found.append((
                name,
                MixLoraFeedForward(
                    layer, width, self.num_experts, self.top_k, slot, routing, name
                ),
            ))  # fmt: skip
        return found
