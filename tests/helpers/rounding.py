"""An implementation against the reference in its widest dtype: what rounding alone can explain.

Unlike the error budget of `pemt_fast.testing` this bound holds for each element by itself, however
small the tensors, and needs no eager twin. A wrong index is some 10^4 times larger in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops import adapter_mixture_with_hidden
from pemt_fast.testing import MixtureInputs

# Named results of a call: `run(inputs, impl=…)`. Whatever else goes in must come from `inputs`.
Run = Callable[..., Mapping[str, Tensor]]


def rounding_bounds(inputs: MixtureInputs, run: Run = MixtureInputs.gradients) -> dict[str, Tensor]:
    """`2·n·ε·(1 + max|z|)·magnitude` for each result of `run` in the dtype of `inputs.x`.

    `magnitude` is the same result of the absolute values of all inputs, without activation: every
    activation and its slope are below 1.13 times that. A sum of n terms is wrong by at most n·ε/2
    of the sum of their magnitudes; n counts the terms of all sums on the way, and a few more for
    the activation. `1 + max|z|` because the slope of the activation moves with z.
    """
    absolute = {
        name: tensor.detach().abs().double().requires_grad_(tensor.requires_grad)
        for name, tensor in inputs.tensors().items()
    }
    magnitudes = inputs.replace(
        **absolute, grad_out=inputs.grad_out.abs().double(), activation="identity"
    )
    with torch.no_grad():
        _, hidden = magnitudes.call(adapter_mixture_with_hidden, impl="reference")
    d, n, h = inputs.w_down.shape[-1], hidden.shape[-1], inputs.w_up.shape[-1]
    tokens, adapters = inputs.x[..., :1].numel(), inputs.gate.shape[-1]
    terms = d + n + h + tokens + adapters + 16
    largest = float(hidden.max()) if hidden.numel() else 0.0
    factor = 2 * terms * torch.finfo(inputs.x.dtype).eps * (1 + largest)
    return {name: factor * result for name, result in run(magnitudes, impl="reference").items()}


def assert_within(name: str, actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """`|actual − exact| ≤ bound`, element by element; NaN is never within."""
    assert actual.shape == exact.shape, f"{name} has shape {list(actual.shape)}"
    error = (actual.detach().double() - exact).abs()
    wrong = ~(error <= bound)
    assert not bool(wrong.any()), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ by more than rounding, "
        f"the first at {wrong.nonzero()[0].tolist()} by {float(error[wrong][0]):.3e}, "
        f"allowed {float(bound[wrong][0]):.3e}"
    )


def assert_equals_reference(
    inputs: MixtureInputs, run: Run = MixtureInputs.gradients, **options: Any
) -> None:
    """Results of `run(inputs, **options)` are those of the float64 reference, up to rounding."""
    exact = run(inputs.to(torch.float64), impl="reference")
    bounds = rounding_bounds(inputs, run)
    actual = run(inputs, **options)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert result.dtype == getattr(inputs, name.removeprefix("d_"), inputs.x).dtype
        # Of a narrower parameter the gradient is rounded once more.
        limits = torch.finfo(result.dtype)
        step = limits.eps * exact[name].abs().clamp(min=limits.tiny)
        assert_within(name, result, exact[name], bounds[name] + step)
