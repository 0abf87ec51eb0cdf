# SPDX-License-Identifier: Apache-2.0
"""peft's LoRA on linear layers: one active adapter, several, or one per sequence of a batch.

peft computes `result = base(x)`, then in a loop `result += B_e(A_e(dropout(x)))·scaling_e`, or with
`adapter_names` one pass per adapter over its rows. Here all adapters are one call: several active
ones of `adapter_mixture` with the scalings as gate, one per sequence of `skill_mixture` if their
ranks are equal, else with a gate that has one scaling in a row. The dtypes are peft's: the adapters
compute in theirs, the result has that of the base layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pemt_fast.fusing.protocol import StackedCall, on_device
from pemt_fast.nn.wrapped_linear import is_plain
from pemt_fast.ops.skill_mixture import IMPLS_WITHOUT_KERNELS, skill_mixture


class PeftLora:
    """`peft.tuners.lora.Linear`."""

    name = "peft LoRA"

    def matches(self, module: nn.Module) -> bool:
        """Exactly that class: its subclasses compute something else."""
        from peft.tuners import lora

        return type(module) is lora.Linear

    def why_not(self, module: Any) -> str | None:
        """DoRA and other variants change more than the sum."""
        if variants := sorted(module.lora_variant):
            return f"the adapters {', '.join(variants)} are variants of LoRA (DoRA or the like)"
        return None

    def call(
        self, module: Any, impl: str, x: Tensor, *args: Any,
        adapter_names: Sequence[str] | None = None, **kwargs: Any,
    ) -> Tensor | None:  # fmt: skip
        """One call of the operator; None where there is nothing to add or peft has its own way."""
        if args or kwargs or module.disable_adapters or module.merged:
            return None
        wanted = module.active_adapters if adapter_names is None else adapter_names
        names = [n for n in dict.fromkeys(wanted) if n in module.lora_A]
        if not names or self.why_not(module) or _drops(module, names):
            return None
        if adapter_names is None:
            gate = on_device(tuple(float(module.scaling[n]) for n in names), x.device)
            return _stacked(module, names, x, gate).run(impl)
        module._check_forward_args(x, adapter_names=adapter_names)
        ranks = {module.lora_A[n].out_features for n in names}
        is_simple = len(ranks) == 1 and all(module.lora_B[n].bias is None for n in names)
        if is_simple and impl not in IMPLS_WITHOUT_KERNELS:
            return _one_each(module, names, tuple(adapter_names), x, impl)
        rows = tuple(
            tuple(float(module.scaling[n]) if n == row else 0.0 for n in names)
            for row in adapter_names
        )
        return _stacked(module, names, x, on_device(rows, x.device)).run(impl)


def _drops(module: Any, names: Sequence[str]) -> bool:
    """Whether a dropout draws numbers, one set per adapter."""
    return module.training and any(
        isinstance(module.lora_dropout[n], nn.Dropout) and module.lora_dropout[n].p > 0
        for n in names
    )


def _one_each(
    module: Any, names: Sequence[str], rows: tuple[str, ...], x: Tensor, impl: str
) -> Tensor:
    """Adapters of equal rank, one for each sequence: no other one is multiplied.

    Where a row names none of them a pair of zeros stands for it.
    """
    a = [module.lora_A[n].weight for n in names]
    b = [module.lora_B[n].weight.t() * module.scaling[n] for n in names]
    if any(row not in names for row in rows):
        a, b = [*a, torch.zeros_like(a[0])], [*b, torch.zeros_like(b[0])]
    ids = tuple(names.index(row) if row in names else len(names) for row in rows)
    task_ids, dtype, base = on_device(ids, x.device, torch.long), a[0].dtype, module.base_layer
    factors = (None, torch.stack(a), torch.stack(b))
    if x.dtype == dtype and is_plain(base) and base.weight.dtype == dtype:
        options: dict[str, Any] = {"weight": base.weight, "bias": base.bias}
        return skill_mixture(x, *factors, task_ids=task_ids, impl=impl, **options)
    result = base(x)
    out = skill_mixture(x.to(dtype), *factors, task_ids=task_ids, base=result.to(dtype), impl=impl)
    return out.to(result.dtype)


def _stacked(module: Any, names: Sequence[str], x: Tensor, gate: Tensor) -> StackedCall:
    downs = [module.lora_A[n].weight for n in names]
    ups = [module.lora_B[n].weight for n in names]
    biases = [module.lora_B[n].bias for n in names]
    dtype, base = downs[0].dtype, module.base_layer
    # Stacked at every call: a few hundred kilobytes, and no change of a parameter can be missed.
    call = StackedCall(
        x.to(dtype),
        gate,
        torch.cat(downs) if downs[1:] else downs[0],
        torch.cat([up.t() for up in ups]) if ups[1:] else ups[0].t(),
        [down.shape[0] for down in downs],
    )
    if any(bias is not None for bias in biases):
        zeros = ups[0].new_zeros(ups[0].shape[0])
        call.b_up = torch.stack([zeros if bias is None else bias for bias in biases])
    if x.dtype == dtype and is_plain(base) and base.weight.dtype == dtype:
        call.linear = base
    else:
        call.base = base(x)
        call.dtype = call.base.dtype
    return call
