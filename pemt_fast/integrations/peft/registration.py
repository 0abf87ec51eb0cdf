# SPDX-License-Identifier: Apache-2.0
"""How peft comes to know the type `PEMT_FAST`: a member of its enum, and entries in its tables.

peft registers methods by name, and only names that its enum `PeftType` has. A member is added
there; everything else goes through `register_peft_method` and one table of model classes.
No function or class of peft is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType, register_peft_method

from pemt_fast.integrations.peft.guard import moved


def extend_enum(name: str) -> None:
    """Give `PeftType` the member `name`; one that is there stays.

    Raises:
        ImportError: the enum of this peft or Python does not take it.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    found = getattr(PeftType, name, None)
    if found is None or PeftType(name) is not found or found not in list(PeftType):
        raise moved(peft, f"the enum PeftType takes no new member {name}")


def register(
    name: str, config_class: type, tuner_class: Any, model_classes: Mapping[str, type]
) -> None:
    """Enter the type in peft's tables; a second time it replaces its own entries.

    Args:
        name: Of the type, in capitals.
        config_class: Its config.
        tuner_class: Its tuner, with `prefix`.
        model_classes: The peft model for each `task_type`.
    """
    member = PeftType(name)
    for table in (
        PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING,
    ):  # fmt: skip
        table.pop(member, None)  # type: ignore[attr-defined]
    register_peft_method(
        name=name.lower(), config_cls=config_class, model_cls=tuner_class,
        prefix=tuner_class.prefix,
    )  # fmt: skip
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING.update(model_classes)
