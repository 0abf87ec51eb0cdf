# SPDX-License-Identifier: Apache-2.0
"""LoRA and the mixtures of it that C-Poly and PEML are compared with.

Formulas and sources are in `nn/adapted_linear.py`, `nn/skill_linear.py` and `nn/routers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pemt_fast.methods.linear_config import LinearConfig
from pemt_fast.nn.adapted_linear import AdaptedLinear, MixtureLinear, MultiLoraLinear
from pemt_fast.nn.routers import TaskEmbeddingRouter
from pemt_fast.nn.routing import Routing
from pemt_fast.nn.skill_linear import MtlLoraLinear


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LinearConfig):
    """LoRA (Hu et al., 2021): one low-rank pair for all tasks; `task_ids` make no difference."""

    method: ClassVar[str] = "lora"
    uses_tasks: ClassVar[bool] = False

    num_tasks: int = 1

    def wrap(self, layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """As in `LinearConfig`."""
        return MixtureLinear(
            layer, routing, (self.r,), scale=self.scale, dropout=self.dropout, impl=self.impl
        )


@dataclass(frozen=True, kw_only=True)
class MultiLoraConfig(LinearConfig):
    """MultiLoRA (Wang et al., 2023): parallel pairs with trained scaling, for all tasks together.

    Attributes:
        num_adapters: How many pairs of rank r.
    """

    method: ClassVar[str] = "multi_lora"
    uses_tasks: ClassVar[bool] = False

    num_tasks: int = 1
    num_adapters: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("num_adapters", 1)

    def wrap(self, layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """As in `LinearConfig`."""
        return MultiLoraLinear(
            layer, routing, (self.r,) * self.num_adapters,
            scale=self.scale, dropout=self.dropout, impl=self.impl,
        )  # fmt: skip


@dataclass(frozen=True)
class MoeLoraConfig(LinearConfig):
    """MoE-LoRA (MOELoRA, Liu et al., 2023): experts weighted by a gate on the task's embedding.

    Attributes:
        num_tasks: T.
        num_experts: E; the rank r is split over them.
        embedding_width: Of a task.
    """

    method: ClassVar[str] = "moe_lora"

    num_tasks: int
    num_experts: int = 8
    embedding_width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("num_experts", 1)
        self.require_at_least("embedding_width", 1)
        if self.r % self.num_experts:
            raise ValueError(
                f"r must be a multiple of num_experts = {self.num_experts}, got {self.r}"
            )

    def wrap(self, layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """As in `LinearConfig`."""
        experts = self.num_experts
        return MixtureLinear(
            layer, routing, (self.r // experts,) * experts,
            TaskEmbeddingRouter(self.num_tasks, experts, self.embedding_width),
            scale=self.scale, dropout=self.dropout, impl=self.impl,
        )  # fmt: skip


@dataclass(frozen=True)
class MtlLoraConfig(LinearConfig):
    """MTL-LoRA (Yang et al., 2024): a transformation per task between shared projections.

    Attributes:
        num_tasks: T.
        num_up: n, the number of up-projections.
        temperature: τ of the softmax over them.
        diagonal: The transformation of a task is diagonal.
    """

    method: ClassVar[str] = "mtl_lora"

    num_tasks: int
    num_up: int = 3
    temperature: float = 0.1
    diagonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("num_up", 1)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def wrap(self, layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """As in `LinearConfig`."""
        return MtlLoraLinear(
            layer, routing, self.r, self.num_tasks, self.num_up, self.temperature,
            diagonal=self.diagonal, scale=self.scale, dropout=self.dropout, impl=self.impl,
        )  # fmt: skip
