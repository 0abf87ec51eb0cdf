# SPDX-License-Identifier: Apache-2.0
"""A frozen linear and the mixture of adapters beside it, as one operator. Letters as in its parts.

`adapter_mixture.py` takes the output of a linear as `base`; then the linear and the mixture each
make a gradient `[T, D]` of their common input, and autograd adds the two. Here the gradient of the
linear is what that of the mixture begins with, or both are one matmul. Next: `adapter_mixture.py`,
whose rules and implementations these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from pemt_fast.ops import native
from pemt_fast.ops.adapter_mixture import adapter_mixture, check_and_call, takes_door
from pemt_fast.ops.dispatch import resolve_impl


@overload
def linear_mixture(
    x: Tensor, weight: Tensor, gate: Tensor, w_down: Tensor, w_up: Tensor,
    b_down: Tensor | None = None, b_up: Tensor | None = None, *, activation: str,
    bias: Tensor | None = None, impl: str = "auto", ranks: Sequence[int] | None = None,
    with_hidden: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def linear_mixture(
    x: Tensor, weight: Tensor, gate: Tensor, w_down: Tensor, w_up: Tensor,
    b_down: Tensor | None = None, b_up: Tensor | None = None, *, activation: str,
    bias: Tensor | None = None, impl: str = "auto", ranks: Sequence[int] | None = None,
    with_hidden: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_mixture(
    x: Tensor, weight: Tensor, gate: Tensor, w_down: Tensor, w_up: Tensor,
    b_down: Tensor | None = None, b_up: Tensor | None = None, *, activation: str,
    bias: Tensor | None = None, impl: str = "auto", ranks: Sequence[int] | None = None,
    with_hidden: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_mixture(
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str,
    bias: Tensor | None = None,
    impl: str = "auto",
    ranks: Sequence[int] | None = None,
    with_hidden: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x·weightᵀ + bias + Σ_e gate[e]·(act(x·w_down[e]ᵀ + b_down[e])·w_up[e] + b_up[e])`.

    Dtypes, precision, gradients and zero gates as in `adapter_mixture`; `weight` and `bias` of
    another float dtype are cast to that of `x`. A frozen linear costs nothing for its gradients.

    With `impl="torch"` the linear and the down-projections are one matmul in each direction where
    `weight` and `w_down` lie one behind the other in one storage, as `nn/stacking.py` puts them.
    That is looked at in every call; the results are the same up to rounding.

    Args:
        x: `[..., D]`.
        weight: `[H, D]`, the layout of `nn.Linear`.
        gate: `[E]`, `[B, E]` or `[B, S, E]`.
        w_down: `[E, R, D]`, or `[N, D]` with `ranks`.
        w_up: `[E, R, H]`, or `[N, H]` with `ranks`.
        b_down: `[E, R]`, or `[N]` with `ranks`; None for none.
        b_up: `[E, H]`; None for none.
        activation: A name of `adapter_mixture`.
        bias: `[H]` of the linear; None for none.
        impl: As in `adapter_mixture`.
        ranks: One rank per adapter when they differ.
        with_hidden: Also return the ungated hidden units, as `adapter_mixture_with_hidden` does.

    Returns:
        `[..., H]` in `x.dtype`, contiguous; with `with_hidden` also `[..., N]`.

    Raises:
        ValueError: a shape, device or name does not fit; the message says what was expected.
        TypeError: an argument is not a float tensor.
        RuntimeError: the implementation asked for cannot run here.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if takes_door(impl):
        found = native.door(
            x, gate, w_down, w_up, b_down, b_up, None, activation, ranks, False, with_hidden,
            weight, bias,
        )  # fmt: skip
        if found is not None:
            return found
    tensors = (x, weight, bias, gate, w_down, w_up, b_down, b_up)
    if not with_hidden and _takes_door_of_gpus(impl, *tensors):
        base = torch.nn.functional.linear(x, weight, bias)
        return adapter_mixture(
            x, gate, w_down, w_up, b_down, b_up,
            activation=activation, base=base, impl=impl, ranks=ranks,
        )  # fmt: skip
    both = check_and_call(
        x, gate, w_down, w_up, b_down, b_up, activation, None, impl, False, ranks, with_hidden,
        weight=weight, bias=bias,
    )  # fmt: skip
    return both if with_hidden else both[0]


def _takes_door_of_gpus(
    impl: str, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None
) -> bool:
    """Whether the linear may come first and by itself: no gradients, and nothing wrong with it."""
    if impl not in ("auto", "triton", "cuda") or torch.compiler.is_compiling():
        return False
    tensors = (x, weight, bias, *others)
    if not all(t is None or isinstance(t, Tensor) for t in tensors) or not x.dim():
        return False
    if not (x.is_cuda or impl != "auto"):
        return False
    if resolve_impl(impl, x.device, x.dtype) not in ("triton", "cuda"):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    w_up = others[2]
    if w_up is None or not w_up.dim() or weight.shape != (w_up.shape[-1], x.shape[-1]):
        return False
    same = [weight] if bias is None else [weight, bias]
    return all(t.dtype == x.dtype and t.device == x.device for t in same) and (
        bias is None or bias.shape == weight.shape[:1]
    )
