# SPDX-License-Identifier: Apache-2.0
"""One bottleneck or low-rank adapter: `y = base + scale·up(act(down(x)))`.

A LoRA pair is the case without activation and biases. Parameters sit in two `nn.Linear` modules, so
their names and shapes are the usual ones; the arithmetic is `adapter_mixture` with one adapter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pemt_fast.ops.adapter_mixture import adapter_mixture
from pemt_fast.ops.cuda_door import Target


class BottleneckAdapter(nn.Module):
    """`base + scale·(act(x·downᵀ + b_down)·upᵀ + b_up)` with `down [R, D]` and `up [H, R]`.

    Args:
        in_features: D.
        bottleneck: R.
        out_features: H.
        activation: A name of `adapter_mixture`; `identity` makes a LoRA pair.
        bias: Whether both projections have a bias.
        scale: Factor of what the adapter adds; it travels as the operator's gate.
        impl: Implementation of the operator.
    """

    def __init__(
        self,
        in_features: int,
        bottleneck: int,
        out_features: int,
        *,
        activation: str,
        bias: bool,
        scale: float = 1.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, bottleneck, bias=bias)
        self.up = nn.Linear(bottleneck, out_features, bias=bias)
        self.activation = activation
        self.scale = scale
        self.impl = impl

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        """Initialise in place.

        Args:
            init: `lora` (down Kaiming-uniform, up zero: the model starts unchanged), `kaiming`
                (both Kaiming-uniform, as released for PEMT's sources), `normal` (both
                N(0, 0.01), as released for the target adapter), `houlsby` (the same cut at
                ±0.02) or `bert` (both N(0, 0.02)).
                Biases become zero.
        """
        for layer in (self.down, self.up):
            if init in ("normal", "bert"):
                nn.init.normal_(layer.weight, std=0.01 if init == "normal" else 0.02)
            elif init == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            elif init == "lora" and layer is self.up:
                nn.init.zeros_(layer.weight)
            elif init in ("lora", "kaiming"):
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            else:
                known = "lora, kaiming, normal, houlsby or bert"
                raise ValueError(f"init must be {known}, got {init!r}")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, base: Tensor | None) -> Tensor:
        """`x [..., D]`, `base [..., H]` or None; returns `[..., H]` in the dtype of `x`."""
        b_down, b_up = self.down.bias, self.up.bias
        gate_dtype = torch.promote_types(x.dtype, torch.float32)
        return adapter_mixture(
            x,
            torch.full((1,), self.scale, dtype=gate_dtype, device=x.device),
            self.down.weight.unsqueeze(0),
            self.up.weight.t().unsqueeze(0),
            None if b_down is None else b_down.unsqueeze(0),
            None if b_up is None else b_up.unsqueeze(0),
            activation=self.activation,
            base=base,
            impl=self.impl,
        )

    def as_target(self) -> Target:
        """Its parameters, for `ops/target_mixture.py`."""
        return Target(
            self.down.weight, self.up.weight, self.down.bias, self.up.bias,
            self.activation, self.scale,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"activation={self.activation}, scale={self.scale}"
