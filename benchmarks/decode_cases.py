# SPDX-License-Identifier: Apache-2.0
"""What is measured of generation: calls of few tokens, alone and with PEMT's target adapter.

Letters and shapes as in `t5_cases.py`. Every contender takes the same weights; `published` is left
out, a known loser. Measured by `bench_decode.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from providers import compile_stacked, stacked
from torch import Tensor

from pemt_fast import adapter_mixture
from pemt_fast.ops.cuda_door import Target
from pemt_fast.ops.dispatch import unavailable_reasons
from pemt_fast.ops.target_mixture import mixture_with_target
from pemt_fast.testing import MixtureInputs, make_inputs

TOKENS = (1, 4, 16, 64)
STACKED, COMPILED = "stacked", "compiled"
IMPLS = ("torch", "triton", "cuda")


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call, one token per sequence; `target` units follow in PEMT's target adapter."""

    shape: str
    T: int
    D: int
    H: int
    E: int = 6
    R: int = 64
    target: int = 0

    @property
    def name(self) -> str:
        """`t5-base T4 + target`."""
        return f"{self.shape} T{self.T}" + (" + target" if self.target else "")

    def inputs(self, dtype: torch.dtype, device: str) -> MixtureInputs:
        """LoRA sources, as in PEMT: neither activation nor biases; a gate per sequence."""
        return make_inputs(
            self.T, 1, E=self.E, R=self.R, D=self.D, H=self.H, activation="identity", bias=False,
            dtype=dtype, device=device, requires_grad=False, gate="[B, E]",
        )  # fmt: skip

    def target_of(self, dtype: torch.dtype, device: str) -> Target:
        """The target adapter, with biases and the activation of the released code."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator) * self.H**-0.5
            return values.to(device, dtype)

        R, H = self.target, self.H
        return Target(draw(R, H), draw(H, R), draw(R), draw(H), "gelu_tanh", 1.0)


def select(*, quick: bool = False) -> list[DecodeCase]:
    """The cases, in the order of the tables."""
    if quick:
        return [
            DecodeCase("small", T, 64, 32, E=2, R=16, target=t) for T in (1, 16) for t in (0, 8)
        ]
    shapes = (("t5-base", 3072, 768), ("t5-large", 4096, 1024))
    return [
        DecodeCase(name, T, D, H, target=target)
        for name, D, H in shapes
        for target in (0, H // 16)
        for T in TOKENS
    ]


def contenders(
    inputs: MixtureInputs, target: Target | None, *, compiles: bool
) -> dict[str, Callable[[], Tensor]]:
    """Who can run on the device of the inputs, by name."""
    found = {STACKED: _torch_form(stacked, inputs, target)}
    if compiles:
        torch._dynamo.reset()
        found[COMPILED] = _torch_form(compile_stacked(), inputs, target)
    for impl in IMPLS:
        if not unavailable_reasons(impl, inputs.x.device, inputs.x.dtype):
            found[f"ours-{impl}"] = _ours(impl, inputs, target)
    return found


def _arguments(inputs: MixtureInputs) -> tuple[Tensor | None, ...]:
    return inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up


def _torch_form(
    mixture: Callable[..., Tensor], inputs: MixtureInputs, target: Target | None
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            y = mixture(*_arguments(inputs), activation="identity", base=inputs.base)
            if target is None:
                return y
            hidden = F.gelu(F.linear(y, target.down, target.b_down), approximate="tanh")
            return y + F.linear(hidden, target.up, target.b_up)

    return run


def _ours(impl: str, inputs: MixtureInputs, target: Target | None) -> Callable[[], Tensor]:
    ranks = (inputs.w_down.shape[1],) * inputs.w_down.shape[0]
    w_down, w_up = (w.flatten(0, 1) for w in (inputs.w_down, inputs.w_up))

    def run() -> Tensor:
        with torch.no_grad():
            if target is None:
                return adapter_mixture(
                    inputs.x, inputs.gate, w_down, w_up, activation="identity", base=inputs.base,
                    impl=impl, ranks=ranks,
                )  # fmt: skip
            return mixture_with_target(
                inputs.x, inputs.gate, w_down, w_up, None, None, activation="identity",
                base=inputs.base, target=target, impl=impl, ranks=ranks,
            )  # fmt: skip

    return run
