# SPDX-License-Identifier: Apache-2.0
"""`HyperSpace`: which values of PEML's hyper-parameters a search tries, as data.

`hyper_search.py` searches it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from pemt_fast.methods.peml import SHARING, PemlConfig

if TYPE_CHECKING:
    from optuna import Trial

# Also the order of sampling: changing it changes every study.
CHOICES = ("prefix_length", "prefix_depth", "prefix_width", "sharing", "r", "operator_rank")
RANGES = ("learning_rate", "architecture_learning_rate")


@dataclass(frozen=True, kw_only=True)
class HyperSpace:
    """Choices of sizes and ranges of learning rates; a single value is fixed.

    Attributes:
        prefix_length, prefix_depth, prefix_width, sharing, r, operator_rank: Values of these fields
            of `PemlConfig`, each once.
        learning_rate: Of everything but the architecture: the lowest and the highest, between them
            log-uniform, or one value.
        architecture_learning_rate: The same of this field of `PemlConfig`.
    """

    prefix_length: Sequence[int] = (8, 16, 32)
    prefix_depth: Sequence[int] = (1, 2, 3)
    prefix_width: Sequence[int] = (16, 32, 64)
    sharing: Sequence[str] = SHARING
    r: Sequence[int] = (4, 8, 16)
    operator_rank: Sequence[int] = (2, 4, 8)
    learning_rate: Sequence[float] = (1e-4, 1e-2)
    architecture_learning_rate: Sequence[float] = (0.01, 0.2)

    def __post_init__(self) -> None:
        for name in (*CHOICES, *RANGES):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise ValueError(f"{name} must be a list of values, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        for name in CHOICES:
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(
                    f"{name} must hold at least one value, all different, got {list(values)}"
                )
            for value in values:
                PemlConfig(**{name: value})
        for name in RANGES:
            _require_range(name, getattr(self, name))
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    def to_dict(self) -> dict[str, list]:
        """JSON-ready values."""
        return {f.name: list(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; unknown keys are an error."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown {cls.__name__} keys {unknown}; expected {sorted(known)}")
        return cls(**values)


def _require_range(name: str, values: Sequence[float]) -> None:
    positive = all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values)
    rises = len(values) == 1 or len(values) == 2 and values[0] < values[1]
    if not positive or not rises:
        raise ValueError(
            f"{name} must be one positive number, or two with the lower first, got {list(values)}"
        )


def suggest(trial: Trial, space: HyperSpace) -> dict[str, Any]:
    """A value for every field of `space`, those with a single value included."""
    values: dict[str, Any] = {
        name: trial.suggest_categorical(name, getattr(space, name)) for name in CHOICES
    }
    for name in RANGES:
        bounds = getattr(space, name)
        values[name] = trial.suggest_float(name, bounds[0], bounds[-1], log=True)
    return values
