# SPDX-License-Identifier: Apache-2.0
"""Polytropon and its relatives: tasks that choose from an inventory of low-rank skills.

Poly (Ponti et al., 2023), MHR (Caccia et al., 2023: Poly with splits) and C-Poly (Wang et al.,
"Customizable Combination of Parameter-Efficient Modules for Multi-Task Learning", ICLR 2024).
Formulas: `nn/skill_linear.py`, `nn/routers.py`. C-Poly has no published code; what its
description leaves open is chosen here, and said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from pemt_fast.methods.linear_config import LinearConfig
from pemt_fast.nn.adapted_linear import AdaptedLinear, MixtureLinear
from pemt_fast.nn.routers import CustomizedRouter, SkillRouter
from pemt_fast.nn.routing import Routing
from pemt_fast.nn.skill_linear import SkillLinear

COMBINATIONS = ("sum", "average")


@dataclass(frozen=True)
class PolyConfig(LinearConfig):
    """Poly; with `num_splits` above 1, MHR. Equal to peft's `PolyConfig` of the same sizes.

    Attributes:
        num_tasks: T.
        num_skills: K skills that all tasks choose from.
        num_splits: P parts of the widths, each with a choice of its own.
        noise: Train with the relaxed Bernoulli of the published code.
        router_learning_rate: Of the choice; two-speed learning. None: that of everything else.
        alpha: 1 as published: the scale is 1 / r.
    """

    method: ClassVar[str] = "poly"

    num_tasks: int
    num_skills: int = 4
    num_splits: int = 1
    noise: bool = True
    router_learning_rate: float | None = 0.1
    alpha: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("num_skills", 1)
        self.require_at_least("num_splits", 1)

    def wrap(self, layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """As in `LinearConfig`."""
        skills, splits = self.num_skills, self.num_splits
        router = SkillRouter(self.num_tasks, skills, splits, noise=self.noise)
        return SkillLinear(
            layer, routing, self.r, router, skills, splits,
            scale=self.scale, dropout=self.dropout, impl=self.impl,
        )  # fmt: skip


@dataclass(frozen=True)
class CPolyConfig(LinearConfig):
    """C-Poly: skills common to all tasks beside skills of each task's own.

    `y_t = W·x + α/r·(Σ_{i≤A} w_ti·φ_i(x) + Σ_{j≤B} w_tj·φ_tj(x))`, `φ(x) = B·A·x`. The common
    weights are Poly's, the specific ones a unit diagonal. Left open by the description and chosen
    here: the common weights are divided by their sum, as in Poly; the specific ones pass through
    no sigmoid; α = 1.

    Attributes:
        num_tasks: T.
        num_common: A, 0 for separate adapters per task.
        num_specific: B of each task, 0 for Poly.
        r: Rank of a skill.
        combine: `sum` of products, as the equation says, or `average` of the factors, as in Poly.
        trains_specific: Train all weights of the specific skills, also those that are 0 at first.
        noise, router_learning_rate, alpha: As in `PolyConfig`.
    """

    method: ClassVar[str] = "c_poly"

    num_tasks: int
    num_common: int = 3
    num_specific: int = 1
    r: int = field(default=2, kw_only=True)
    combine: str = "sum"
    trains_specific: bool = False
    noise: bool = True
    router_learning_rate: float | None = 0.1
    alpha: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("num_common", 0)
        self.require_at_least("num_specific", 0)
        if self.num_common + self.num_specific == 0:
            raise ValueError("num_common and num_specific must not both be 0")
        if self.combine not in COMBINATIONS:
            raise ValueError(f"combine must be one of {list(COMBINATIONS)}, got {self.combine!r}")

    @property
    def num_skills(self) -> int:
        """A + T·B."""
        return self.num_common + self.num_tasks * self.num_specific

    def wrap(self, layer: nn.Linear, routing: Routing) -> AdaptedLinear:
        """As in `LinearConfig`."""
        router = CustomizedRouter(
            self.num_tasks, self.num_common, self.num_specific,
            trains_specific=self.trains_specific, noise=self.noise,
        )  # fmt: skip
        if self.combine == "average":
            return SkillLinear(
                layer, routing, self.r, router, self.num_skills,
                scale=self.scale, dropout=self.dropout, impl=self.impl,
            )  # fmt: skip
        return MixtureLinear(
            layer, routing, (self.r,) * self.num_skills, router,
            scale=self.scale, dropout=self.dropout, impl=self.impl,
        )  # fmt: skip
