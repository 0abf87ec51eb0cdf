# SPDX-License-Identifier: Apache-2.0
"""`PemtFastConfig`: a method's config as a `peft.PeftConfig`, one subclass per method.

Ours are frozen dataclasses, and peft writes into a config (`base_model_name_or_path`,
`inference_mode`), so it gets a `PeftConfig` that holds ours: the same name, the same arguments,
defaults, checks and messages. In `adapter_config.json` ours is one entry, `pemt_fast`, beside
peft's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig, PeftType, TaskType

from pemt_fast.attach import MethodConfig, check_free
from pemt_fast.checkpoint import PEFT_TYPE, config_classes, config_from, config_values

if TYPE_CHECKING:
    from pemt_fast.attached import AttachedModel

TASK_TYPES = ("SEQ_2_SEQ_LM", "CAUSAL_LM")

_PEFT_FIELDS = tuple(field.name for field in fields(PeftConfig))
_FIRST = ("self", "pemt_fast", "tokenizer")
# What peft's users look for -> what it is called here.
_OUR_NAMES = {
    "lora_alpha": "alpha", "lora_dropout": "dropout", "n_tasks": "num_tasks",
    "n_skills": "num_skills", "n_splits": "num_splits", "num_virtual_tokens": "prompt_length",
}  # fmt: skip


def _signature(method_class: Any = None) -> inspect.Signature:
    """Of `__init__`; with a method's config, of the class that stands for it."""
    own = inspect.signature(PeftConfig).parameters.values()
    peft_fields = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    if method_class is not None:
        own = inspect.signature(method_class).parameters.values()
        return inspect.Signature([*own, *peft_fields])
    first = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in _FIRST]
    return inspect.Signature([*first, *peft_fields])


class PemtFastConfig(PeftConfig):
    """A method of pemt_fast for peft; its subclasses are named after the methods' configs.

    Args:
        *args: Of the method's config.
        pemt_fast: What a file says of the method's config, instead of its arguments.
        tokenizer: As in `pemt_fast.get_model`; not written to files.
        **kwargs: Of the method's config, and those of `peft.PeftConfig` (`task_type`, …).

    Attributes:
        method_class: The class of the method's config.
        method_config: The method's config. Its fields are readable here and cannot be set.
        weights_follow: Whether the config came from a file, and its weights will too.

    Raises:
        TypeError: an argument that neither has.
        ValueError: a `task_type` other than None, `SEQ_2_SEQ_LM` and `CAUSAL_LM`, or what the
            method's config raises.
    """

    method_class: ClassVar[Any] = None
    method_config: MethodConfig[Any]

    def __new__(
        cls, *args: Any, pemt_fast: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> PemtFastConfig:
        """The subclass of the method that the file names."""
        if cls.method_class is None and pemt_fast is not None:
            cls = config_class(type(config_from(pemt_fast, "adapter_config.json")))
        return super().__new__(cls)

    def __init__(
        self,
        *args: Any,
        pemt_fast: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.method_class is None:
            known = sorted(own.__name__ for own in CONFIGS.values())
            raise TypeError(f"PemtFastConfig stands for all of {known}: use one of those")
        own = {name: kwargs.pop(name) for name in _PEFT_FIELDS if name in kwargs}
        own["peft_type"] = PeftType(PEFT_TYPE)
        super().__init__(**own)
        if self.task_type is not None:
            if self.task_type not in TASK_TYPES:
                raise ValueError(
                    f"task_type must be None or one of {list(TASK_TYPES)}, got "
                    f"{str(own['task_type'])!r}; for other models use pemt_fast.get_model"
                )
            self.task_type = task_key(self.task_type)
        self.tokenizer = tokenizer
        self.weights_follow = pemt_fast is not None
        if pemt_fast is None:
            _check_names(self.method_class, kwargs)
            config = self.method_class(*args, **kwargs)
        elif args or kwargs:
            name = next(iter(kwargs), "")
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument '{name}'")
        else:
            config = config_from(pemt_fast, "adapter_config.json")
        self.__dict__["method_config"] = config

    # What peft leaves out of a file that a newer peft wrote is what this signature does not name.
    __init__.__signature__ = _signature()  # type: ignore[attr-defined]

    @classmethod
    def of(cls, config: MethodConfig[Any], **kwargs: Any) -> PemtFastConfig:
        """`config`, of `pemt_fast`, for peft; `kwargs` as in the constructor."""
        found = config_class(type(config))(pemt_fast=config_values(config), **kwargs)
        found.__dict__["method_config"] = config
        found.weights_follow = False
        return found

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("method_config")
        if config is not None and name in _field_names(config):
            return getattr(config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if name in _field_names(self.method_class):
            raise FrozenInstanceError(f"cannot assign to field {name!r}: make another config")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PemtFastConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={getattr(self, name)!r}" for name in _PEFT_FIELDS)
        return f"{self.method_config!r} for peft ({own})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: those of `peft.PeftConfig`, and the method's under `pemt_fast`."""
        values: dict[str, Any] = super().to_dict()
        values["task_type"] = task_of(self.task_type)
        return {**values, "pemt_fast": config_values(self.method_config)}

    def attach(self, model: Any) -> AttachedModel:
        """Attach the method to `model`; called by the tuner."""
        check_free(model)
        return self.method_config.attach(
            model, self.tokenizer, reads_sources=not self.weights_follow
        )


def task_key(task_type: str) -> str:
    """Under what `task_type` peft finds the door's model class: not its own."""
    return f"{PEFT_TYPE}_{TaskType(task_type).value}"


def task_of(key: str | None) -> str | None:
    """Inverse of `task_key`."""
    return None if key is None else key.removeprefix(f"{PEFT_TYPE}_")


def config_class(method_class: type) -> type[PemtFastConfig]:
    """The config for peft of a method's config.

    Raises:
        TypeError: it is not one of pemt_fast.
    """
    for own in CONFIGS.values():
        if own.method_class is method_class:
            return own
    known = sorted(own.__name__ for own in CONFIGS.values())
    raise TypeError(f"config must be one of pemt_fast's {known}, got {method_class.__name__}")


def _field_names(config: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(config)) if config is not None else ()


def _check_names(method_class: Any, given: Mapping[str, object]) -> None:
    if "modules_to_save" in given:
        raise TypeError(
            "modules_to_save has no counterpart: FullFineTuningConfig(target_modules=...) trains "
            "modules themselves, PemtConfig(train_layer_norms=True) the layer norms"
        )
    known = _field_names(method_class)
    for name in given:
        ours = _OUR_NAMES.get(name)
        if name not in known and ours in known:
            raise TypeError(f"{name} is called {ours} in {method_class.__name__}")


def _subclass(method_class: type) -> type[PemtFastConfig]:
    text = f"`pemt_fast.{method_class.__name__}` for peft; see `PemtFastConfig`."
    values = {
        "method_class": method_class, "__doc__": text, "__module__": __name__,
        "__signature__": _signature(method_class),
    }  # fmt: skip
    return type(method_class.__name__, (PemtFastConfig,), values)


CONFIGS = {method: _subclass(own) for method, own in config_classes().items()}
