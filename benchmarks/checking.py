# SPDX-License-Identifier: Apache-2.0
"""Time only what is right: each provider against the float64 oracle, before it is timed.

The bound is the one the tests use (`pemt_fast.testing.assert_within_budget`), for the output and
for every gradient of the mode, on the very shape that is measured.
"""

from __future__ import annotations

import math

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


def with_gradients(inputs: MixtureInputs, names: tuple[str, ...]) -> MixtureInputs:
    """The same tensors, as leaves of which those in `names` require grad."""
    return inputs.replace(
        **{
            name: tensor.detach().requires_grad_(name in names)
            for name, tensor in inputs.tensors().items()
        }
    )


class Oracle:
    """Inputs, exact and eager results of one case in one dtype; its modes share them."""

    def __init__(self, case: Case, dtype: str, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        first = case.inputs(DTYPES[dtype], device)
        smallest = min(t.numel() for t in first.tensors().values())
        draws = min(MOST_DRAWS, math.ceil(POOLED_ELEMENTS / smallest))
        self.draws = [
            first, *(case.inputs(DTYPES[dtype], device, seed=seed) for seed in range(1, draws))
        ]  # fmt: skip
        # What the case's most demanding mode asks for contains what its other modes ask for.
        names = MODES[max(case.modes, key=list(MODES).index)]
        leaves = [with_gradients(inputs, names) for inputs in self.draws]
        self._exact = [i.to(torch.float64).gradients(impl="reference") for i in leaves]
        self._eager = [i.gradients(adapter_mixture_loop) for i in leaves]

    def inputs(self, mode: str) -> MixtureInputs:
        """What is timed: the first draw, with the leaves of the mode."""
        return with_gradients(self.draws[0], MODES[mode])

    def check(self, function: Mixture, mode: str, *, exempt: bool = False) -> None:
        """Raise AssertionError if the output or a gradient of the mode leaves the error budget.

        An `exempt` function runs in float64 and must agree with the oracle there.
        """
        actual = []
        for inputs in self.draws:
            leaves = with_gradients(inputs, MODES[mode])
            with torch.set_grad_enabled(mode != FORWARD):
                actual.append((leaves.to(torch.float64) if exempt else leaves).gradients(function))
        for name in actual[0]:
            found, exact, eager = (
                torch.stack([draw[name] for draw in draws])
                for draws in (actual, self._exact, self._eager)
            )
            if exempt:
                _assert_same_formula(name, found, exact)
            else:
                assert_within_budget(name, found, exact, eager)


def _assert_same_formula(name: str, actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape, f"{name} has shape {list(actual.shape)}"
    error, largest = float((actual - exact).abs().max()), float(exact.abs().max())
    assert error <= SAME_FORMULA * largest, f"{name}: off by {error:.3e} in float64"
