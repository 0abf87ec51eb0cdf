# SPDX-License-Identifier: Apache-2.0
"""What the door needs of peft's insides, looked at before anything of peft is touched.

peft has no public way in for a method of another package. A release that moves one of these names
makes the import of the door fail, with the name in the message.
"""

from __future__ import annotations

import enum
import inspect
from typing import Any

KNOWN_VERSION = "0.21.2"

_TUNER = "tuners.tuners_utils.BaseTuner"
_LAYER = "tuners.tuners_utils.BaseTunerLayer"

# Callable -> parameters that it must have.
_CALLS: dict[str, tuple[str, ...]] = {
    "utils.peft_types.register_peft_method": ("name", "config_cls", "model_cls", "prefix"),
    "config.PeftConfig.__init__": (
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode",
    ),
    "config.PeftConfig.from_pretrained": ("pretrained_model_name_or_path",),
    "config.PeftConfig.to_dict": (),
    "peft_model.PeftModel.__init__": ("model", "peft_config", "adapter_name"),
    "peft_model.PeftModel.forward": ("args", "kwargs"),
    "peft_model.PeftModel.generate": ("args", "kwargs"),
    "peft_model.PeftModel.get_base_model": (),
    "peft_model.PeftModel._enable_peft_forward_hooks": ("args", "kwargs"),
    "peft_model.PeftModelForSeq2SeqLM.__init__": ("model", "peft_config", "adapter_name"),
    "peft_model.PeftModelForCausalLM.__init__": ("model", "peft_config", "adapter_name"),
    f"{_TUNER}.__init__": ("model", "peft_config", "adapter_name"),
    f"{_TUNER}.inject_adapter": ("model", "adapter_name", "low_cpu_mem_usage"),
    f"{_TUNER}._get_adapter_state_dict": ("model", "config", "adapter_name", "state_dict"),
    f"{_TUNER}._remove_adapter_name_from_key": ("key", "adapter_name"),
    f"{_TUNER}._remap_adapter_state_dict_for_load": (
        "model", "config", "adapter_name", "state_dict",
    ),
    f"{_TUNER}.disable_adapter_layers": (),
    f"{_TUNER}.enable_adapter_layers": (),
    f"{_TUNER}.set_adapter": ("adapter_name", "inference_mode"),
    f"{_TUNER}.set_requires_grad": ("adapter_names", "requires_grad"),
    f"{_TUNER}.delete_adapter": ("adapter_name",),
    f"{_TUNER}.merge_adapter": ("adapter_names", "safe_merge"),
    f"{_TUNER}.unmerge_adapter": (),
    f"{_TUNER}.merge_and_unload": ("progressbar", "safe_merge", "adapter_names"),
    f"{_TUNER}.unload": (),
    f"{_LAYER}._get_available_adapters": (),
}  # fmt: skip

# Name -> its type.
_VALUES: dict[str, type] = {
    "utils.peft_types.PeftType": enum.EnumMeta,
    "utils.peft_types.PeftType._member_map_": dict,
    "utils.peft_types.PeftType._member_names_": list,
    "utils.peft_types.PeftType._value2member_map_": dict,
    "mapping.PEFT_TYPE_TO_CONFIG_MAPPING": dict,
    "mapping.PEFT_TYPE_TO_TUNER_MAPPING": dict,
    "mapping.PEFT_TYPE_TO_PREFIX_MAPPING": dict,
    "auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING": dict,
    f"{_TUNER}.uses_shared_state": bool,
    f"{_LAYER}.disable_adapters": property,
    f"{_LAYER}.active_adapter": property,
    f"{_LAYER}.adapter_layer_names": tuple,
    f"{_LAYER}.merged_adapters": list,
}


def check_internals(peft: Any) -> None:
    """Raise an `ImportError` if the module `peft` is not built as the door knows it."""
    for path, parameters in _CALLS.items():
        found = _find(peft, path)
        have = inspect.signature(found).parameters
        if lacking := [name for name in parameters if name not in have]:
            raise moved(peft, f"{path} has no parameter {lacking[0]!r} any more")
    for path, kind in _VALUES.items():
        if not isinstance(found := _find(peft, path), kind):
            raise moved(peft, f"{path} is a {type(found).__name__}, not a {kind.__name__}")


def moved(peft: Any, what: str) -> ImportError:
    """The error that names what is different."""
    return ImportError(
        f"peft {peft.__version__} has moved what this door needs: {what}. It knows peft "
        f"{KNOWN_VERSION}: install that one, or attach the method with pemt_fast.get_model(model, "
        "config), which needs no peft"
    )


def _find(peft: Any, path: str) -> Any:
    found = peft
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise moved(peft, f"{path} is gone") from None
    return found
