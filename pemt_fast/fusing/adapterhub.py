# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters of AdapterHub's library `adapters` on T5: one, Stack, Average, Fuse.

A sub-layer hands its adapters `f`, what it computed, and `x`, its residual; the library runs
through the composition and through the adapters of each block in Python. Here a block is one call:

    single, and each member of a Stack     t ← t + s·A(t)
    Average of E, weights w                t ← mean of t and x + Σ_e (w_e·s_e / E)·A_e(t)
    Fuse                                   t ← t + V·Σ_e p_e·s_e·A_e(t), see `adapter_fusion.py`

with `t = f + x` at first and as the result for seq_bn; `t = f` at first and `t + x` as the result
for double_seq_bn; for par_bn what is read stays x, and of a Stack the last member alone counts.
The library multiplies the members of an Average by their weights and then takes their mean, which
divides by E once more, the residual `f` of each with them; so do we.

Source: github adapter-hub/adapters 1.3.0, methods/bottleneck.py, adapter_layer_base.py,
modeling.py.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from pemt_fast.fusing.adapter_fusion import attend
from pemt_fast.fusing.protocol import StackedCall, on_device
from pemt_fast.ops.autocast import autocast_dtype

# Class of the activation's module in torch or transformers -> name in `adapter_mixture`.
_ACTIVATIONS = {
    "ReLU": "relu", "GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh", "GELUTanh": "gelu_tanh", "SiLU": "silu",
    "SiLUActivation": "silu", "Identity": "identity", "LinearActivation": "identity",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One adapter, or the adapters of one Average or Fuse."""

    adapters: list[Any]
    weights: tuple[float, ...] = (1.0,)  # of an Average divided by E, else ones
    fusion: Any = None


class AdapterHub:
    """Layers of `adapters` 1.3; its bottleneck layers on T5 can be fused."""

    name = "adapters"
    method = "bottleneck_layer_forward"

    def matches(self, module: nn.Module) -> bool:
        """Any layer of the library that has adapters; it is not imported for that."""
        library = sys.modules.get("adapters.methods.adapter_layer_base")
        if library is None or not isinstance(module, library.AdapterLayerBase):
            return False
        layer: Any = module
        return len(getattr(layer, layer.adapter_modules_name, ())) > 0

    def why_not(self, module: Any) -> str | None:
        """Another method or model, or what is active now has no fused form."""
        from adapters.models.t5 import mixin_t5

        sublayers = (
            mixin_t5.T5SelfAttentionLayerAdaptersMixin,
            mixin_t5.T5CrossAttentionLayerAdaptersMixin,
            mixin_t5.T5FFLayerAdaptersMixin,
        )
        if not isinstance(module, sublayers):
            return f"there is no fused form of {type(module).__name__}"
        setup = module.get_active_setup()
        if setup is not None:
            steps = _steps(module, setup)
            return steps if isinstance(steps, str) else None
        # What will be active is not known: one that can be fused is enough.
        reasons = [_why_not_adapter(adapter) for adapter in module.adapters.values()]
        return reasons[0] if all(reasons) else None

    def call(
        self, module: Any, impl: str, hidden_states: Tensor, residual_input: Any, layer_norm: Any
    ) -> Tensor | None:
        """None where nothing is active, drops out, is to be reported, or has no fused form."""
        f, x = hidden_states, residual_input
        if layer_norm is not None or x is None or f.shape != x.shape or _reports():
            return None
        setup = module.get_active_setup()
        if setup is None:
            return None
        steps = _steps(module, setup)
        if isinstance(steps, str) or any(_drops(step) for step in steps):
            return None
        if autocast_dtype(x.device.type) is None and not _fits(steps, f, x):
            return None
        return _run(steps, f, x, impl)


def _reports() -> bool:
    """Whether the forward pass shall return gates or attentions of the adapters."""
    from adapters.context import ForwardContext

    context = ForwardContext.get_context()
    wanted = ("output_adapter_gating_scores", "output_adapter_fusion_attentions")
    return any(getattr(context, name, None) for name in wanted)


def _drops(step: Step) -> bool:
    modules = [adapter.dropout for adapter in step.adapters]
    modules += [] if step.fusion is None else [step.fusion.dropout]
    return any(module.training and module.p > 0 for module in modules)


def _fits(steps: tuple[Step, ...], f: Tensor, x: Tensor) -> bool:
    """Whether all has one dtype. An Average makes float32 of 16 bits, or raises."""
    dtypes = {f.dtype, x.dtype}
    for step in steps:
        for adapter in step.adapters:
            dtypes |= {adapter.adapter_down[0].weight.dtype, adapter.adapter_up.weight.dtype}
    is_average = any(len(step.adapters) > 1 and step.fusion is None for step in steps)
    return len(dtypes) == 1 and not (is_average and f.dtype.itemsize < 4)


# --- the composition -----------------------------------------------------------------------------


def _steps(module: Any, setup: Any) -> tuple[Step, ...] | str:
    """What is computed, or why there is no fused form of it."""
    from adapters.composition import Stack

    # Of a Stack the library passes over the adapters that this sub-layer has not.
    blocks = [
        block
        for block in (setup if type(setup) is Stack else [setup])
        if not isinstance(block, str) or block in module.adapters
    ]
    steps = []
    for block in blocks:
        step = _step(module, block)
        if isinstance(step, str):
            return step
        steps.append(step)
    used = [adapter for step in steps for adapter in step.adapters]
    for adapter in used:
        if reason := _why_not_adapter(adapter):
            return reason
    if len({(_form(adapter), _activation(adapter)) for adapter in used}) > 1:
        return f"{setup} has adapters of different kinds"
    before_ln = any(step.fusion is not None and step.fusion.config["query_before_ln"]
                    for step in steps)  # fmt: skip
    if before_ln and _form(used[0]) == "sequential":
        return "query_before_ln has no fused form"
    return tuple(steps)


def _step(module: Any, block: Any) -> Step | str:
    from adapters.composition import Average, Fuse, Parallel

    if isinstance(block, str):
        return Step([module.adapters[block]])
    name = type(block).__name__
    if type(block) is Parallel:
        return "Parallel repeats the batch for every adapter, there is no sum to fuse"
    if type(block) not in (Average, Fuse):
        return f"there is no fused form of {name}"
    if not all(isinstance(child, str) for child in block):
        return f"there is no fused form of compositions within {name}"
    if missing := [child for child in block if child not in module.adapters]:
        return f"{block} names adapters that are not here: {', '.join(missing)}"
    adapters = [module.adapters[child] for child in block]
    if type(block) is Average:
        weights = (_float32(weight) for weight in block.weights)
        return Step(adapters, tuple(weight / len(adapters) for weight in weights))
    if block.name not in module.adapter_fusion_layer:
        return f"there is no fusion layer {block.name}"
    return Step(adapters, (1.0,) * len(adapters), module.adapter_fusion_layer[block.name])


def _float32(value: float) -> float:
    """Rounded as the library rounds its weights, also in a float64 model."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, 24)), exponent - 24)


def _why_not_adapter(adapter: Any) -> str | None:
    """Options that change more than the sum."""
    named = f"the adapter {adapter.name} has"
    if len(adapter.adapter_down) != 2 or adapter.add_layer_norm_after:
        return f"{named} ln_before or ln_after"
    linears = (adapter.adapter_down[0], adapter.adapter_up)
    if any(type(linear) is not nn.Linear for linear in linears):
        return f"{named} a phm_layer"
    if adapter.use_gating or hasattr(adapter, "DropPath"):
        return f"{named} use_gating or stochastic_depth"
    if isinstance(adapter.scaling, Tensor) and adapter.scaling.numel() > 1:
        return f"{named} scaling='channel'"
    if _activation(adapter) is None:
        return f"{named} a non_linearity without counterpart"
    if _form(adapter) is None:
        return f"{named} residuals in an order that is none of seq_bn, double_seq_bn and par_bn"
    return None


def _activation(adapter: Any) -> str | None:
    return _ACTIVATIONS.get(type(adapter.non_linearity.f).__name__)


def _form(adapter: Any) -> str | None:
    """Which of the three presets the switches of the residuals make."""
    from adapters.methods.modeling import Adapter, ParallelAdapter

    if not adapter.original_ln_after:
        return None
    if type(adapter) is ParallelAdapter:
        return "parallel"
    if type(adapter) is not Adapter:
        return None
    if adapter.original_ln_before:
        return "sequential" if adapter.residual_before_ln is True else None
    return "double_sequential" if isinstance(adapter.residual_before_ln, bool) else None


# --- the arithmetic ------------------------------------------------------------------------------


def _run(steps: tuple[Step, ...], f: Tensor, x: Tensor, impl: str) -> Tensor:
    form = _form(steps[0].adapters[0])
    t = f if form == "double_sequential" else f + x
    if form == "parallel":
        steps = steps[-1:]  # each reads x and takes the place of the one before
    for i, step in enumerate(steps):
        read = x if form == "parallel" else t
        if step.fusion is not None:
            t = _fused(form, step, t, x, f if i == 0 else t - x)
            continue
        kept = 1.0 if form == "parallel" else sum(step.weights)
        base = t
        if kept != 1:
            base = kept * t if form == "double_sequential" else torch.lerp(x, t, kept)
        t = _mixture(step, read, base, impl)
    return t + x if form == "double_sequential" else t


def _mixture(step: Step, read: Tensor, base: Tensor, impl: str) -> Tensor:
    w_down, b_down, w_up, b_up, ranks = _stacked(step)
    activation = _activation(step.adapters[0])
    assert activation is not None
    call = StackedCall(
        read, _scales(step, read), w_down, w_up, ranks, activation, b_down, b_up, base
    )
    if autocast_dtype(read.device.type) is None:
        return call.run(impl)
    # The operator would return 16 bits, the residual stream is wider.
    call.base = None
    return base + call.run(impl)


def _fused(form: str | None, step: Step, t: Tensor, x: Tensor, own: Tensor) -> Tensor:
    """One Fuse; `own` is the residual that its members do not add themselves."""
    fusion = step.fusion
    if form != "sequential":
        own = x if form == "parallel" else t
    read = x if form == "parallel" else t
    w_down, b_down, w_up, b_up, ranks = _stacked(step)
    scales, activation = _scales(step, read), step.adapters[0].non_linearity
    mixed = attend(fusion, read, read, w_down, b_down, w_up, b_up, scales, ranks, activation)
    before = fusion.config["residual_before"]
    if before:
        mixed = mixed + own
    out = fusion.value(mixed) if fusion.config["value"] else mixed
    if form == "parallel":
        return out + (t if before else t + x)
    if before:
        return out + x if form == "sequential" else out
    return out + t


def _stacked(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """`w_down [N, D]`, `b_down [N]`, `w_up [N, H]`, `b_up [E, H]` and the ranks."""
    downs = [adapter.adapter_down[0] for adapter in step.adapters]
    ups = [adapter.adapter_up for adapter in step.adapters]
    ranks = [down.out_features for down in downs]
    if len(downs) == 1:
        down, up = downs[0], ups[0]
        return down.weight, down.bias, up.weight.t(), up.bias.unsqueeze(0), ranks
    return (
        torch.cat([down.weight for down in downs]),
        torch.cat([down.bias for down in downs]),
        torch.cat([up.weight.t() for up in ups]),
        torch.stack([up.bias for up in ups]),
        ranks,
    )


def _scales(step: Step, x: Tensor) -> Tensor:
    """The weight of each adapter times its scaling, which may be a parameter: `[E]`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scalings = [adapter.scaling for adapter in step.adapters]
    if not any(isinstance(scaling, Tensor) for scaling in scalings):
        products = tuple(w * s for w, s in zip(step.weights, scalings, strict=True))
        return on_device(products, x.device, dtype)
    parts = [
        scaling if isinstance(scaling, Tensor) else on_device((scaling,), x.device, dtype)
        for scaling in scalings
    ]
    return torch.cat(parts) * on_device(step.weights, x.device, dtype)
