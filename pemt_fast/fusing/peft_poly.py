# SPDX-License-Identifier: Apache-2.0
"""peft's Poly and MHR: the skills of each task averaged once, by `skill_mixture`.

The router stays peft's, with its draws in training. Its factors are `A [P, K, D / P, R]` and
`B [P, K, R, H / P]`; peft mixes them for every sequence with einsums of the whole inventory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pemt_fast.nn.wrapped_linear import is_plain
from pemt_fast.ops.skill_mixture import skill_mixture


class PeftPoly:
    """`peft.tuners.poly.Linear`."""

    name = "peft Poly"

    def matches(self, module: nn.Module) -> bool:
        """Exactly that class."""
        from peft.tuners import poly

        return type(module) is poly.Linear

    def why_not(self, module: Any) -> str | None:
        """Every Poly layer can be fused."""
        return None

    def call(
        self, module: Any, impl: str, x: Tensor, *args: Any,
        task_ids: Tensor | None = None, **kwargs: Any,
    ) -> Tensor | None:  # fmt: skip
        """With one active adapter; peft adds several up."""
        names = [n for n in module.active_adapters if n in module.poly_lora_A]
        if args or kwargs or module.disable_adapters or len(names) != 1:
            return None
        name, base = names[0], module.base_layer
        mixing = module.poly_router[name](task_ids=task_ids, input_ids=x)
        a, b = module.poly_lora_A[name].transpose(-1, -2), module.poly_lora_B[name]
        if mixing.shape[1] == 1:
            mixing, a, b = mixing.squeeze(1), a.squeeze(0), b.squeeze(0)
        options: dict[str, Any] = {"scale": 1 / module.r[name], "impl": impl}
        if x.dtype == a.dtype and is_plain(base) and base.weight.dtype == a.dtype:
            return skill_mixture(x, mixing, a, b, weight=base.weight, bias=base.bias, **options)
        result = base(x)
        out = skill_mixture(x.to(a.dtype), mixing, a, b, base=result.to(a.dtype), **options)
        return out.to(x.dtype)
