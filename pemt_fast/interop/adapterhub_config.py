# SPDX-License-Identifier: Apache-2.0
"""AdapterHub's bottleneck options (`BnConfig`) as a `BottleneckConfig`, and the way back.

A T5 sub-layer hands its adapter `f`, what it computed, and `x`, its residual. Three switches of
theirs decide what the adapter reads and what is added to its output; of their combinations those
that keep both residuals are the three forms here.

Source: github adapter-hub/adapters 1.3.0, configuration/adapter_config.py, methods/modeling.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pemt_fast.methods.bottleneck import BottleneckConfig

# (original_ln_before, residual_before_ln, original_ln_after) of a sequential adapter -> form. T5
# has no layer norm there: "before" adds x to what is read, "after" adds it to the output.
_FORMS = {
    (True, True, True): "sequential",
    (True, False, False): "sequential",  # x is in the adapter's own residual already
    (False, True, True): "double_sequential",
    (False, False, True): "double_sequential",
}

# Form -> the switches that are written for it.
_SWITCHES = {
    "sequential": {"is_parallel": False, "original_ln_before": True},
    "double_sequential": {"is_parallel": False, "original_ln_before": False},
    "parallel": {"is_parallel": True, "original_ln_before": False},
}

_ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu", "silu": "silu", "linear": "identity",
}  # fmt: skip
_ACTIVATION_NAMES = {
    "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "swish", "identity": "linear"
}  # fmt: skip
# Files without a version have older names.
_OLDER_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}

# Options without counterpart, and their only value that is read.
_FIXED: dict[str, Any] = {
    "ln_before": False, "ln_after": False, "use_gating": False, "inv_adapter": None,
    "phm_layer": False, "stochastic_depth": 0.0,
}  # fmt: skip

_NEEDED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")

# What `BnConfig` puts in the place of an option that a file does not have.
_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False, "original_ln_after": True, "init_weights": "bert",
    "init_weights_seed": None, "is_parallel": False, "scaling": 1.0, "residual_before_ln": True,
    "cross_adapter": False, "leave_out": [], "dropout": 0.0, **_FIXED,
    # Without effect, as the options that would use them are off.
    "adapter_residual_before_ln": False, "inv_adapter_reduction_factor": None, "phm_dim": 4,
    "factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True,
    "factorized_phm_rule": False, "phm_c_init": "normal", "phm_init_range": 0.0001,
    "learn_phm": True, "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1,
    "phm_bias": True,
}  # fmt: skip


def config_from_options(
    options: Mapping[str, Any], *, d_model: int, blocks: int, has_version: bool
) -> BottleneckConfig:
    """The config of a `BnConfig` in its JSON form.

    Args:
        options: The entry `config` of an `adapter_config.json`.
        d_model: Width of the model.
        blocks: Blocks of encoder and decoder together.
        has_version: Whether the file names the library's version; names of activations differ.

    Raises:
        ValueError: an option is missing, unknown, or has a value without counterpart; the message
            names it, its value and what is read.
    """
    if (kind := options.get("architecture")) is not None:
        _refuse("architecture", kind, "bottleneck adapters, which have none")
    if missing := [name for name in _NEEDED if name not in options]:
        raise ValueError(f"the option {missing[0]} of a bottleneck adapter is missing")
    given = {name: value for name, value in options.items() if name != "architecture"}
    if unknown := sorted(given.keys() - {*_NEEDED, *_DEFAULTS}):
        _refuse(unknown[0], given[unknown[0]], "the options of BnConfig in adapters 1.3.0")
    given = {**_DEFAULTS, **given}
    for name, value in _FIXED.items():
        if given[name] != value:
            _refuse(name, given[name], repr(value))
    for name in ("mh_adapter", "output_adapter", "cross_adapter"):
        if not isinstance(given[name], bool):
            _refuse(name, given[name], "true or false")
    if not _is_number(given["scaling"]):
        _refuse("scaling", given["scaling"], "a number")
    if not _is_number(given["dropout"]):
        _refuse("dropout", given["dropout"], "a number")
    if not isinstance(given["leave_out"], list):
        _refuse("leave_out", given["leave_out"], "a list of numbers of blocks")
    factor = _reduction_factor(given["reduction_factor"], d_model, blocks, given["leave_out"])
    return BottleneckConfig(
        form=_form(given),
        reduction_factor=min(factor, d_model),  # theirs is never narrower than 1
        activation=_activation(given["non_linearity"], has_version),
        scale=float(given["scaling"]), dropout=float(given["dropout"]),
        feed_forward=given["output_adapter"], attention=given["mh_adapter"],
        cross_attention=given["cross_adapter"], leave_out=given["leave_out"],
        init_weights=given["init_weights"],
    )  # fmt: skip


def options_from_config(config: BottleneckConfig, d_model: int) -> dict[str, Any]:
    """The options of a complete config, all of those that adapters 1.3.0 writes."""
    assert config.bottleneck is not None and config.activation is not None
    assert config.scale is not None
    return {
        **_DEFAULTS, **_SWITCHES[config.form],
        "mh_adapter": bool(config.attention), "output_adapter": config.feed_forward,
        "cross_adapter": config.cross_attention, "leave_out": list(config.leave_out),
        "reduction_factor": _factor_of(config.bottleneck, config.reduction_factor, d_model),
        "non_linearity": _ACTIVATION_NAMES[config.activation],
        # A whole number is refused there.
        "scaling": float(config.scale), "dropout": config.dropout,
        "init_weights": config.init_weights,
    }  # fmt: skip


def _refuse(name: str, value: object, supported: str) -> None:
    raise ValueError(f"the option {name} = {value!r} has no counterpart here; read is {supported}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _form(given: Mapping[str, Any]) -> str:
    switches = {
        name: given[name]
        for name in ("original_ln_before", "residual_before_ln", "original_ln_after")
    }
    if given["is_parallel"]:
        if not given["original_ln_after"]:
            _refuse("original_ln_after", given["original_ln_after"], "true, for parallel adapters")
        return "parallel"
    values = tuple(switches.values())
    if not all(isinstance(value, bool) for value in values) or values not in _FORMS:
        raise ValueError(
            f"the options {switches} have no counterpart here; read are the orders of the "
            "residuals of seq_bn and double_seq_bn"
        )
    return _FORMS[values]


def _activation(value: object, has_version: bool) -> str:
    name = str(value).lower()
    if not has_version:
        name = _OLDER_ACTIVATIONS.get(name, name)
    if name not in _ACTIVATIONS:
        _refuse("non_linearity", value, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _reduction_factor(value: Any, d_model: int, blocks: int, leave_out: list[int]) -> float:
    if isinstance(value, Mapping):
        numbers = [str(i) for i in range(blocks) if i not in leave_out]
        factors = [value.get(number, value.get("default")) for number in numbers]
        if not factors or any(factor != factors[0] for factor in factors):
            _refuse("reduction_factor", value, "one factor for all blocks")
        value = factors[0]
    if not _is_number(value) or value <= 0 or not math.isfinite(d_model / value):
        _refuse("reduction_factor", value, "a positive number")
    return value


def _factor_of(bottleneck: int, factor: float | None, d_model: int) -> float:
    """A factor whose quotient, rounded down, is the bottleneck; the one of the config if it is."""
    candidates = [factor, d_model // bottleneck, d_model / bottleneck]
    for candidate in candidates:
        if candidate and int(d_model // candidate) == bottleneck:
            return candidate
    # In the middle between two widths, where rounding decides nothing.
    return d_model / (bottleneck + 0.5)
