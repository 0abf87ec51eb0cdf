# SPDX-License-Identifier: Apache-2.0
"""What is measured: named cases as data, and what each of them costs at least.

Letters as everywhere: B sequences, S tokens per sequence, T = B·S, E adapters, D input width,
R bottleneck, H output width, N = E·R. A cell is one case in one dtype and one mode. Who computes
it: `providers.py`.
"""

from __future__ import annotations

import dataclasses

import torch

from pemt_fast.testing import MixtureInputs, make_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Mode -> which inputs require grad. The base passes its gradient through and costs nobody anything.
FORWARD, FROZEN, TRAINABLE = "fwd", "fwd+bwd frozen", "fwd+bwd trainable"
MODES: dict[str, tuple[str, ...]] = {
    FORWARD: (),
    FROZEN: ("x", "gate"),
    TRAINABLE: ("x", "gate", "w_down", "w_up", "b_down", "b_up"),
}
# Times the two matmuls of the forward pass: d_x and d_hidden cost as much again, weights once more.
_MATMUL_PASSES = {FORWARD: 1, FROZEN: 2, TRAINABLE: 3}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. `group` is `pemt`, `grid` (T × N), `host` (a call without work) or `targets`.

    The last are the cells of `grid.py`, a suite of their own.
    """

    name: str
    group: str
    B: int
    S: int
    E: int
    R: int
    D: int
    H: int
    gate: str
    activation: str
    bias: bool
    modes: tuple[str, ...]
    base: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False

    @property
    def T(self) -> int:
        """Tokens."""
        return self.B * self.S

    @property
    def N(self) -> int:
        """Total bottleneck."""
        return self.E * self.R

    def inputs(self, dtype: torch.dtype, device: str, *, seed: int = 0) -> MixtureInputs:
        """The same values for everybody; nothing requires grad yet."""
        return make_inputs(
            self.B, self.S, E=self.E, D=self.D, R=self.R, H=self.H, dtype=dtype, gate=self.gate,
            bias=self.bias, base=self.base, activation=self.activation, requires_grad=False,
            seed=seed, device=device,
        )  # fmt: skip

    def flop(self, mode: str) -> int:
        """Of the matmuls alone; a multiplication and an addition count as two."""
        return _MATMUL_PASSES[mode] * 2 * self.T * self.N * (self.D + self.H)

    def traffic_bytes(self, mode: str, dtype: torch.dtype) -> int:
        """Every input read once and every result written once, forward and backward each.

        What an implementation keeps in between, the hidden units for instance, is not counted: this
        is what nobody can avoid.
        """
        x, out = self.T * self.D, self.T * self.H
        weights = self.N * (self.D + self.H) + (self.N + self.E * self.H) * self.bias
        gate = self.E * {"[E]": 1, "[B, E]": self.B, "[B, S, E]": self.T}[self.gate]
        elements = x + gate + weights + out * (1 + self.base)
        if mode != FORWARD:
            elements += out + weights + gate + x + gate  # read d_out, w, gate; write d_x, d_gate
        if mode == TRAINABLE:
            elements += x + weights  # read x, write d_w
        return elements * dtype.itemsize


_INFERENCE = (FORWARD,)
_PEMT_MODES = (FORWARD, FROZEN)
_ALL = (FORWARD, FROZEN, TRAINABLE)

# PEMT's mixture beside `wo`: frozen sources, one row of the gate per sequence, `wo(x)` as base.
PEMT = (
    Case("t5-base encoder", "pemt", 8, 128, 6, 64, 3072, 768, "[B, E]", "identity", False,
         _PEMT_MODES),
    Case("t5-base decoder", "pemt", 8, 4, 6, 64, 3072, 768, "[B, E]", "identity", False,
         _PEMT_MODES),
    Case("t5-small encoder", "pemt", 8, 128, 6, 64, 2048, 512, "[B, E]", "identity", False,
         _PEMT_MODES, quick=True),
    Case("t5-base bottleneck", "pemt", 8, 128, 6, 64, 3072, 768, "[B, E]", "gelu_tanh", True, _ALL),
    # As many tokens as fill a large GPU.
    Case("t5-base encoder 16k", "pemt", 32, 512, 6, 64, 3072, 768, "[B, E]", "identity", False,
         _PEMT_MODES, devices=("cuda",)),
)  # fmt: skip

# N -> (E, R); a gate per token, biases and base: everything the operator can do at once.
_BOTTLENECKS = {64: (4, 16), 128: (2, 64), 384: (6, 64), 1024: (16, 64)}
# Device -> the grid. One token is decoding, which has no backward; 32 are the decoder in training.
_GRID = {
    "cpu": ((1, 32, 512, 2048), (64, 384, 1024)),
    "cuda": ((1, 64, 512, 2048, 16384), (64, 128, 384, 1024)),
}


def _grid_case(T: int, N: int, device: str) -> Case:
    E, R = _BOTTLENECKS[N]
    modes = _INFERENCE if T == 1 else _ALL if N == 384 and T >= 512 else _PEMT_MODES
    return Case(
        f"T{T} N{N}", "grid", 1, T, E, R, 768, 768, "[B, S, E]", "relu", True, modes,
        devices=(device,), quick=(T, N) == (32, 384),
    )  # fmt: skip


GRID = tuple(
    _grid_case(T, N, device)
    for device, (tokens, units) in _GRID.items()
    for N in units
    for T in tokens
)

# So little arithmetic that what remains is the price of a call.
HOST = (
    Case("host overhead", "host", 1, 1, 2, 8, 64, 64, "[B, S, E]", "relu", True,
         _PEMT_MODES, quick=True),
)  # fmt: skip

CASES = (*PEMT, *GRID, *HOST)


def select(
    device: str, *, quick: bool = False, only: str = "", among: tuple[Case, ...] = CASES
) -> list[tuple[Case, str, str]]:
    """The cells `(case, dtype, mode)` to measure, in the order of the tables.

    Args:
        device: `cpu` or `cuda`.
        quick: A few cases instead of all.
        only: Part of a case's name; with it `quick` no longer removes cases.
        among: The cases to choose from.
    """
    return [
        (case, dtype, mode)
        for case in among
        if device in case.devices and only in case.name and (only or case.quick or not quick)
        for dtype in DTYPES
        for mode in case.modes
    ]
