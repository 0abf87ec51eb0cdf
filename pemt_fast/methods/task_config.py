# SPDX-License-Identifier: Apache-2.0
"""What every config but PEMT's shares: the tasks that `task_ids` number, and the way to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pemt_fast.attached import AttachedModel

ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A method, and the tasks it is trained for.

    Attributes:
        num_tasks: How many tasks `task_ids` number.
        task_names: Their names; by default their numbers.
    """

    method: ClassVar[str]

    num_tasks: int
    task_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        self.require_at_least("num_tasks", 1)
        names = self.task_names
        if names is not None and (len(names) != self.num_tasks or len(set(names)) != len(names)):
            raise ValueError(
                f"task_names must hold one name per task ({self.num_tasks}), all different, "
                f"got {list(names)}"
            )

    def attach(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> AttachedModel:
        """Build the method on `model`; called by `get_model` and `load`.

        Without `reads_sources` the values come from a file afterwards.
        """
        raise NotImplementedError

    def require_at_least(self, name: str, least: int) -> None:
        """Raise unless the field `name` is an integer of at least `least`."""
        value = getattr(self, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def require_one_of(self, name: str, allowed: Sequence[object]) -> None:
        """Raise unless the field `name` has one of the values `allowed`."""
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")

    def require_probability(self, name: str) -> None:
        """Raise unless the field `name` is a probability below 1."""
        value = getattr(self, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")

    @property
    def uses_tasks(self) -> bool:
        """Whether `task_ids` make a difference; methods without tasks take and ignore them."""
        return True

    @property
    def aux_weight(self) -> float:
        """Weight of the method's auxiliary loss; 0 where it has none."""
        return 0.0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their numbers."""
        return tuple(self.task_names or map(str, range(self.num_tasks)))

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values with the method's name."""
        return {"method": self.method, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Inverse of `to_dict` without the method's name; unknown keys are an error."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown {cls.__name__} keys {unknown}; expected {sorted(known)}")
        return cls(**values)  # type: ignore[arg-type]
