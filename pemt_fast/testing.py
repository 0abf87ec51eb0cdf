# SPDX-License-Identifier: Apache-2.0
"""What a test of `adapter_mixture` needs: inputs, the eager baseline and the error budget.

An implementation is right when it is about as close to the float64 oracle as the plain loop over
adapters in the same dtype: `assert_within_budget` holds that formula, the only tolerance there is
for low precision, and `assert_matches_oracle` applies it to the output and to every gradient. The
letters are those of `ops/adapter_mixture.py`; start with `make_inputs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pemt_fast.ops.adapter_mixture import adapter_mixture
from pemt_fast.ops.reference import ACTIVATION_FUNCTIONS

TENSOR_NAMES = ("x", "gate", "w_down", "w_up", "b_down", "b_up", "base")
GATE_FORMS = ("[E]", "[B, E]", "[B, S, E]")
LAYOUTS = ("contiguous", "sliced", "transposed")

# The budget compares two maxima of random errors. Over a handful of elements the eager one can be
# small by luck, so results of several draws are pooled until there are about this many.
_POOLED_ELEMENTS = 64
_MOST_DRAWS = 8


@dataclasses.dataclass(frozen=True)
class MixtureInputs:
    """The arguments of one call, and the gradient that its output receives."""

    x: Tensor
    gate: Tensor
    w_down: Tensor
    w_up: Tensor
    b_down: Tensor | None
    b_up: Tensor | None
    base: Tensor | None
    grad_out: Tensor
    activation: str
    ranks: tuple[int, ...] | None

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments that are not None, by name, in the order of the operator."""
        named = {name: getattr(self, name) for name in TENSOR_NAMES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replace(self, **changes: Tensor | str | None) -> MixtureInputs:
        """The same inputs with other values for some of them."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> MixtureInputs:
        """Leaves of another dtype with the same values, as far as `dtype` can hold them."""
        named = {**self.tensors(), "grad_out": self.grad_out}
        return self.replace(
            **{
                name: tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)
                for name, tensor in named.items()
            }
        )

    def call(self, function: Callable[..., Tensor], **options: object) -> Tensor:
        """`function`, which takes what `adapter_mixture` takes, of these inputs."""
        return function(
            self.x, self.gate, self.w_down, self.w_up, self.b_down, self.b_up,
            activation=self.activation, base=self.base, ranks=self.ranks, **options,
        )  # fmt: skip

    def gradients(
        self, function: Callable[..., Tensor] = adapter_mixture, **options: object
    ) -> dict[str, Tensor]:
        """`out` of `function` and the gradients `d_x`, `d_gate`, … of what requires grad."""
        out = self.call(function, **options)
        leaves = {name: t for name, t in self.tensors().items() if t.requires_grad}
        if not leaves:
            return {"out": out}
        grads = torch.autograd.grad(out, tuple(leaves.values()), self.grad_out)
        named = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {"out": out.detach(), **named}


def make_inputs(
    *lead: int,
    E: int = 6,
    D: int = 60,
    R: int | Sequence[int] = 24,
    H: int = 96,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
    base_dtype: torch.dtype | None = None,
    gate: str = "[B, E]",
    bias: bool = True,
    base: bool = True,
    activation: str = "gelu",
    requires_grad: bool | Collection[str] = True,
    layout: str = "contiguous",
    param_layout: str = "contiguous",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> MixtureInputs:
    """Random inputs of unit scale: weights are divided by the square root of their fan-in.

    Args:
        lead: Leading sizes of x: `T`, or `B, S`, or none for a single token `[D]`.
        E: Adapters; ignored when `R` lists their ranks.
        D: Input width.
        R: Bottleneck, or one per adapter: the weights are then packed.
        H: Output width.
        dtype: Of x and of the output.
        param_dtype: Of weights and biases; None for `dtype`.
        gate_dtype: Of the gate; None for `dtype`.
        base_dtype: Of the base; None for `dtype`.
        gate: One of `GATE_FORMS`. Positive and negative values, none of them 0.
        bias: Whether there are `b_down` and `b_up`.
        base: Whether there is a base.
        activation: A name of `adapter_mixture`.
        requires_grad: True for all tensors, False for none, or the names of those that do.
        layout: One of `LAYOUTS`, of x, gate, base and the gradient of the output. What lies between
            the rows of a sliced tensor is NaN.
        param_layout: The same for weights and biases.
        seed: Of the generator; the global one is not touched.
        device: Where the tensors live; the values do not depend on it.
    """
    ranks = None if isinstance(R, int) else tuple(R)
    e_count = E if ranks is None else len(ranks)
    rows = (e_count, R) if isinstance(R, int) else (sum(R),)
    fan_in = R if isinstance(R, int) else max(R)
    generator = torch.Generator().manual_seed(seed)
    wanted = TENSOR_NAMES if requires_grad is True else requires_grad or ()
    gate_lead = lead[: GATE_FORMS.index(gate)]

    def draw(
        name: str, shape: Sequence[int], scale: float, as_dtype: torch.dtype | None, as_layout: str
    ) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        tensor = values.to(device, as_dtype or dtype)
        return lay_out(tensor, as_layout).requires_grad_(name in wanted)

    def data(name: str, shape: Sequence[int], scale: float, as_dtype: torch.dtype | None) -> Tensor:
        return draw(name, shape, scale, as_dtype, layout)

    def parameter(name: str, shape: Sequence[int], scale: float) -> Tensor:
        return draw(name, shape, scale, param_dtype, param_layout)

    return MixtureInputs(
        x=data("x", (*lead, D), 1.0, dtype),
        gate=data("gate", (*gate_lead, e_count), e_count**-0.5, gate_dtype),
        w_down=parameter("w_down", (*rows, D), D**-0.5),
        w_up=parameter("w_up", (*rows, H), fan_in**-0.5),
        b_down=parameter("b_down", rows, 0.5) if bias else None,
        b_up=parameter("b_up", (e_count, H), 0.5) if bias else None,
        base=data("base", (*lead, H), 1.0, base_dtype) if base else None,
        grad_out=data("grad_out", (*lead, H), 1.0, dtype),
        activation=activation,
        ranks=ranks,
    )


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with the strides of one of `LAYOUTS`."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        width = tensor.shape[-1]
        wide = tensor.new_full((*tensor.shape[:-1], width + 3), float("nan"))
        wide[..., 1 : width + 1] = tensor
        return wide[..., 1 : width + 1]
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def adapter_mixture_loop(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str,
    base: Tensor | None = None,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """The mixture as published: a loop over the adapters, everything in the dtype of `x`.

    The eager baseline of the error budget: each step is rounded to `x.dtype`, as it is when every
    adapter is a module of its own. Arguments as in `adapter_mixture`; differentiated by autograd.
    """
    dtype = x.dtype
    e_count = gate.shape[-1]
    ranks = (w_down.shape[1],) * e_count if ranks is None else tuple(ranks)
    gate = gate.to(dtype).reshape(*gate.shape[:-1], *[1] * (x.dim() - gate.dim()), e_count)
    downs = w_down.reshape(-1, x.shape[-1]).to(dtype).split(ranks)
    ups = w_up.reshape(-1, w_up.shape[-1]).to(dtype).split(ranks)
    down_biases = [None] * e_count if b_down is None else b_down.reshape(-1).to(dtype).split(ranks)
    out = x.new_zeros(*x.shape[:-1], w_up.shape[-1]) if base is None else base.to(dtype)
    for e, (down, up, down_bias) in enumerate(zip(downs, ups, down_biases, strict=True)):
        z = torch.nn.functional.linear(x, down, down_bias)
        up_bias = None if b_up is None else b_up[e].to(dtype)
        y = torch.nn.functional.linear(ACTIVATION_FUNCTIONS[activation](z), up.t(), up_bias)
        out = out + gate[..., e : e + 1] * y
    return out


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """`max|actual − exact| ≤ 2 · (max|eager − exact| + ε · max|exact|)`.

    `ε` is the rounding step of `actual.dtype` at 1 (`torch.finfo(dtype).eps`). Nothing here is
    tuned: an implementation may be twice as far from the truth as the loop over adapters and one
    rounding of the result. Also asserted: shape, dtype, and that `actual` is finite.

    Args:
        name: What to call the tensor in the message.
        actual: The tensor under test.
        exact: The oracle: `impl="reference"` in float64 on the same, already rounded inputs.
        eager: `adapter_mixture_loop`, or its gradient, in the dtype under test.
    """
    assert actual.shape == exact.shape, (
        f"{name} has shape {list(actual.shape)} instead of {list(exact.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{name} is {actual.dtype} instead of {eager.dtype}"
    assert bool(eager.isfinite().all()), f"{name}: the eager loop overflows, this case says nothing"
    assert bool(actual.isfinite().all()), f"{name} is not finite"
    if actual.numel() == 0:
        return
    error = (actual.detach().double() - exact).abs()
    eager_error, step = _error_of_eager_and_step(actual, exact, eager)
    budget = 2 * (eager_error + step)
    worst = int(error.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    assert float(error.max()) <= budget, (
        f"{name}: error {float(error.max()):.3e} exceeds the budget {budget:.3e} "
        f"= 2 · ({eager_error:.3e} of the eager loop + {step:.3e} of rounding), worst at {index}: "
        f"{float(actual.flatten()[worst])!r} instead of {float(exact.flatten()[worst])!r}"
    )


def _error_of_eager_and_step(actual: Tensor, exact: Tensor, eager: Tensor) -> tuple[float, float]:
    eager_error = float((eager.detach().double() - exact).abs().max())
    return eager_error, torch.finfo(actual.dtype).eps * float(exact.abs().max())


def share_of_budget(actual: Tensor, exact: Tensor, eager: Tensor) -> float:
    """The error over what `assert_within_budget` allows; 1 and below passes."""
    if actual.numel() == 0:
        return 0.0
    error = float((actual.detach().double() - exact).abs().max())
    budget = 2 * sum(_error_of_eager_and_step(actual, exact, eager))
    return error / budget if budget > 0 else float(error > 0)


def assert_matches_oracle(
    make: Callable[[int], MixtureInputs],
    function: Callable[..., Tensor] = adapter_mixture,
    **options: object,
) -> None:
    """Assert the budget for the output of `function` and for the gradient of every input.

    Args:
        make: Inputs for a seed. Called more than once where a tensor has few elements: the draws
            are pooled, so that the budget does not depend on one lucky rounding of the eager loop.
        function: The operator under test, called like `adapter_mixture`.
        options: Passed to `function`, for instance `impl`.
    """
    for name, (actual, exact, eager) in compare_with_oracle(make, function, **options).items():
        assert_within_budget(name, actual, exact, eager)


def compare_with_oracle(
    make: Callable[[int], MixtureInputs],
    function: Callable[..., Tensor] = adapter_mixture,
    **options: object,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Name → (of `function`, oracle, eager loop), for the output and all gradients.

    Arguments as in `assert_matches_oracle`.
    """
    first = make(0)
    smallest = min(t.numel() for t in first.tensors().values())
    draws = min(_MOST_DRAWS, math.ceil(_POOLED_ELEMENTS / max(smallest, 1)))
    results = []
    for seed in range(draws):
        inputs = first if seed == 0 else make(seed)
        results.append(
            (
                inputs.gradients(function, **options),
                inputs.to(torch.float64).gradients(impl="reference"),
                inputs.gradients(adapter_mixture_loop),
            )
        )
    return {
        name: tuple(torch.stack([r[i][name] for r in results]) for i in range(3))  # type: ignore
        for name in results[0][0]
    }


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within this context, memory that torch allocates without filling it starts as NaN.

    This is torch's own switch, so it also reaches compiled extensions. It comes with deterministic
    algorithms, as warnings where there are none.
    """
    module: Any = torch.utils.deterministic  # torch does not declare its attribute
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = module.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    module.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        module.fill_uninitialized_memory = fill


class LargestTensor(TorchDispatchMode):
    """Records, inside the context, the most elements that any created tensor had: `elements`.

    Looks into our operators, whose own calls a dispatch mode does not see by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(  # noqa: D102
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if func.namespace == "pemt_fast":
            key = getattr(torch._C.DispatchKey, tensors[0].device.type.upper())
            with self:
                result = func.redispatch(torch._C.DispatchKeySet(key), *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result
