# SPDX-License-Identifier: Apache-2.0
"""Time only what is right: each provider against the float64 oracle, before it is timed.

The bound is the one the tests use (`pemt_fast.testing.assert_within_budget`), for the output and
for every gradient of the mode, on the very shape that is measured. Where that shape is too large to
be computed in float64, the provider computes all of it and some of its tokens are compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from cases import DTYPES, FORWARD, MODES, Case
from providers import Mixture
from torch import Tensor

from pemt_fast.testing import MixtureInputs, adapter_mixture_loop, assert_within_budget

# Results with few elements are pooled over several draws: the maximum of the eager loop's error
# over a handful of elements can be small by luck.
POOLED_ELEMENTS = 64
MOST_DRAWS = 8
# Between two float64 evaluations of one formula, of the largest exact value; a wrong formula is off
# by far more.
SAME_FORMULA = 1e-11
# Times the budget, for baselines of the grid. Plain torch leaves the budget by up to 4 in float32
# (mat-vecs, sums over tokens); to refuse it there would leave our kernels without a rival.
BASELINE_SLACK = 8


def with_gradients(inputs: MixtureInputs, names: tuple[str, ...]) -> MixtureInputs:
    """The same tensors, as leaves of which those in `names` require grad."""
    return inputs.replace(
        **{
            name: tensor.detach().requires_grad_(name in names)
            for name, tensor in inputs.tensors().items()
        }
    )


@dataclasses.dataclass(frozen=True)
class Compared:
    """The tokens that are compared: the same positions of every sequence, or all of them (None)."""

    positions: Tensor | None
    per_token: frozenset[str]  # what has a row for each token, [B, S, …]

    @staticmethod
    def of(case: Case, device: str, most_tokens: int | None) -> Compared:
        """About `most_tokens` of the case's tokens, evenly spread; None for all."""
        names = {"x", "base", "grad_out", "out", "d_x"}
        names |= {"gate", "d_gate"} if case.gate == "[B, S, E]" else set()
        if most_tokens is None or case.T <= most_tokens:
            return Compared(None, frozenset(names))
        count = max(1, most_tokens // case.B)
        positions = torch.linspace(0, case.S - 1, count, device=device).round().long()
        return Compared(positions, frozenset(names))

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What is compared of an input, the output or a gradient."""
        if self.positions is None or name not in self.per_token:
            return tensor
        return tensor.index_select(1, self.positions)

    def inputs(self, inputs: MixtureInputs) -> MixtureInputs:
        """The problem that consists of the compared tokens only."""
        named = {**inputs.tensors(), "grad_out": inputs.grad_out}
        return inputs.replace(**{name: self.part(name, t) for name, t in named.items()})

    def masked(self, inputs: MixtureInputs) -> MixtureInputs:
        """The whole problem; tokens that are not compared receive a gradient of zero.

        So the gradients of gate and weights are sums over the compared tokens alone.
        """
        if self.positions is None:
            return inputs
        kept = self.part("grad_out", inputs.grad_out)
        whole = torch.zeros_like(inputs.grad_out).index_copy_(1, self.positions, kept)
        return inputs.replace(grad_out=whole)

    def assert_nothing_elsewhere(self, name: str, tensor: Tensor) -> None:
        """What is not compared must be finite in the output, and zero in a gradient."""
        if self.positions is None or name not in self.per_token:
            return
        if name == "out":
            assert bool(tensor.isfinite().all()), f"{name} is not finite"
            return
        inside = self.part(name, tensor).count_nonzero()
        assert int(tensor.count_nonzero()) == int(inside), (
            f"{name} is not zero for tokens whose output receives no gradient"
        )


class Oracle:
    """Inputs, exact and eager results of one case in one dtype; its modes share them.

    Args:
        case: The shape.
        dtype: A name of `DTYPES`.
        device: Where it is computed.
        most_tokens: So many tokens are compared at most; None for all.
        prepare: Applied to whatever inputs a provider gets.
    """

    def __init__(
        self,
        case: Case,
        dtype: str,
        device: str,
        *,
        most_tokens: int | None = None,
        prepare: Callable[[MixtureInputs], MixtureInputs] = lambda inputs: inputs,
    ) -> None:
        self.case, self.dtype, self.device, self._prepare = case, dtype, device, prepare
        self._compared = Compared.of(case, device, most_tokens)
        first = case.inputs(DTYPES[dtype], device)
        smallest = min(t.numel() for t in first.tensors().values())
        draws = min(MOST_DRAWS, math.ceil(POOLED_ELEMENTS / smallest))
        self.draws = [
            first, *(case.inputs(DTYPES[dtype], device, seed=seed) for seed in range(1, draws))
        ]  # fmt: skip
        # What the case's most demanding mode asks for contains what its other modes ask for.
        names = MODES[max(case.modes, key=list(MODES).index)]
        leaves = [with_gradients(self._compared.inputs(inputs), names) for inputs in self.draws]
        self._exact = [i.to(torch.float64).gradients(impl="reference") for i in leaves]
        self._eager = [i.gradients(adapter_mixture_loop) for i in leaves]

    def inputs(self, mode: str) -> MixtureInputs:
        """What is timed: the first draw, with the leaves of the mode."""
        return self._prepare(with_gradients(self.draws[0], MODES[mode]))

    def check(
        self, function: Mixture, mode: str, *, exempt: bool = False, slack: float = 1
    ) -> None:
        """Raise AssertionError if the output or a gradient leaves `slack` times the error budget.

        An `exempt` function runs in float64 and must agree with the oracle there.
        """
        actual = []
        for inputs in self.draws:
            leaves = with_gradients(self._compared.masked(inputs), MODES[mode])
            leaves = self._prepare(leaves.to(torch.float64) if exempt else leaves)
            with torch.set_grad_enabled(mode != FORWARD):
                results = leaves.gradients(function)
            for name, tensor in results.items():
                self._compared.assert_nothing_elsewhere(name, tensor)
            actual.append({name: self._compared.part(name, t) for name, t in results.items()})
        for name in actual[0]:
            found, exact, eager = (
                torch.stack([draw[name] for draw in draws])
                for draws in (actual, self._exact, self._eager)
            )
            if exempt:
                _assert_same_formula(name, found, exact)
            elif slack != 1:
                _assert_near(name, found, exact, eager, slack)
            else:
                assert_within_budget(name, found, exact, eager)


def _assert_same_formula(name: str, actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape, f"{name} has shape {list(actual.shape)}"
    error, largest = float((actual - exact).abs().max()), float(exact.abs().max())
    assert error <= SAME_FORMULA * largest, f"{name}: off by {error:.3e} in float64"


def _assert_near(name: str, actual: Tensor, exact: Tensor, eager: Tensor, slack: float) -> None:
    """`assert_within_budget` with a budget that is `slack` times as large."""
    assert actual.shape == exact.shape, f"{name} has shape {list(actual.shape)}"
    assert actual.dtype == eager.dtype, f"{name} is {actual.dtype} instead of {eager.dtype}"
    error, of_eager = (float((t.double() - exact).abs().max()) for t in (actual, eager))
    budget = 2 * (of_eager + torch.finfo(actual.dtype).eps * float(exact.abs().max()))
    assert error <= slack * budget, f"{name}: error {error:.3e}, {slack} times {budget:.3e} allowed"
