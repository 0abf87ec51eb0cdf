# SPDX-License-Identifier: Apache-2.0
"""PEMT's Task Sparsity Loss, computed in rank space.

`L = Σ_e mean_b(gate[b,e]) · (1 − mean_t cos(z[t], m[t,e]))`

with the adapter outputs `m[t,e] = hidden[t,e]·w_up[e] + c[t,e]` and `c = b_up[e] + residual[t]`
(both optional). `m [T, E, H]` is never built. One opaque operator for autograd and `torch.compile`;
the loss is a scalar, so its gradients are computed with it (`sparsity_terms.py`) and only scaled in
backward: of the size of the tokens they are all that is kept. Matmuls are torch's on every device;
`impl` names what computes in between (`sparsity_rows.py`).
Source: `imbalance_loss` of the published code (github JachinLin2022/PEMT, modeling_t5.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops.autocast import without_autocast
from pemt_fast.ops.dispatch import kernels_beside, resolve_impl
from pemt_fast.ops.sparsity_terms import Inputs, Needs, loss_and_gradients, scale_of

_INPUTS = (
    "Tensor z, Tensor gate, Tensor hidden, Tensor w_up, Tensor? b_up, Tensor? residual, "
    "Tensor? mask, int[] ranks, str impl"
)
_LIBRARY = torch.library.Library("pemt_fast", "FRAGMENT")
_LIBRARY.define(f"task_sparsity_loss({_INPUTS}) -> Tensor")
_LIBRARY.define(
    f"task_sparsity_loss_gradients({_INPUTS}, bool[] needs) "
    "-> (Tensor loss, Tensor back, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_OPS = torch.ops.pemt_fast
_TENSORS = 6  # the differentiable ones come first


def task_sparsity_loss(
    z: Tensor,
    gate: Tensor,
    hidden: Tensor,
    w_up: Tensor,
    b_up: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    ranks: Sequence[int],
    impl: str = "auto",
) -> Tensor:
    """Task Sparsity Loss of one feed-forward layer.

    Args:
        z: `[B, S, H]`, the layer's output after the target adapter, before dropout and residual.
        gate: `[B, E]`, the mixture weights.
        hidden: `[B, S, N]`, the ungated hidden units of the source adapters.
        w_up: `[N, H]`, their packed up-projections.
        b_up: `[E, H]`, their output biases.
        residual: `[B, S, H]`, added to every adapter's output (PEMT's bottleneck experts add the
            input of the feed-forward layer).
        mask: `[B, S]`, true for the tokens to average over; None for all of them, padding
            included, as in the published code.
        ranks: One rank per adapter.
        impl: As in `adapter_mixture`; `reference` is `torch` here.

    Returns:
        A scalar, float32 (float64 for float64 inputs). 0 where no token counts.

    Raises:
        ValueError: sizes that do not belong together; the message names them.
        RuntimeError: the implementation asked for cannot run here.
    """
    ranks = tuple(ranks)
    _check(z, gate, hidden, w_up, b_up, residual, mask, ranks)
    impl = kernels_beside(resolve_impl(impl, z.device, z.dtype))
    return _OPS.task_sparsity_loss.default(z, gate, hidden, w_up, b_up, residual, mask, ranks, impl)


def _check(
    z: Tensor,
    gate: Tensor,
    hidden: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    ranks: tuple[int, ...],
) -> None:
    n, h, e = sum(ranks), z.shape[-1], len(ranks)
    expected = {
        "hidden": (hidden, (*z.shape[:-1], n), "[..., N]"),
        "w_up": (w_up, (n, h), "[N, H]"),
        "b_up": (b_up, (e, h), "[E, H]"),
        "residual": (residual, tuple(z.shape), "[..., H]"),
        "mask": (mask, tuple(z.shape[:-1]), "[...]"),
    }
    for name, (tensor, shape, letters) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {letters} = {list(shape)}, got {list(tensor.shape)} "
                f"(z is {list(z.shape)}, ranks sum to {n})"
            )
    if gate.shape[-1] != e:
        raise ValueError(f"gate must be [B, E] with E = {e}, got {list(gate.shape)}")


def _inputs(
    z: Tensor,
    gate: Tensor,
    hidden: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    ranks: Sequence[int],
) -> Inputs:
    """Flat, and everything of the width of tokens or weights in the dtype of z."""

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1]).to(z.dtype)

    return Inputs(
        flat(z),
        gate.reshape(-1, gate.shape[-1]),
        flat(hidden),
        w_up.to(z.dtype).contiguous(),
        None if b_up is None else b_up.to(z.dtype),
        None if residual is None else flat(residual),
        None if mask is None else mask.reshape(-1),
        tuple(ranks),
    )


def _forward(*args: Any) -> Tensor:
    *given, impl = args
    with without_autocast(given[0].device.type):
        return loss_and_gradients(_inputs(*given), Needs(), impl)[0]


def _with_gradients(*args: Any) -> tuple[Tensor, ...]:
    *given, impl, needs = args
    with without_autocast(given[0].device.type):
        inputs = _inputs(*given)
        value, grads = loss_and_gradients(inputs, Needs(*needs), impl)
    shaped = (
        given[0].new_empty(0) if grad is None else grad.reshape(tensor.shape).to(tensor.dtype)
        for grad, tensor in zip(grads, given[:_TENSORS], strict=True)
    )
    return value, torch.full_like(value, 1 / scale_of(inputs.z.shape[0])), *shaped


def _fake(*args: Any) -> Tensor:
    z = args[0]
    return z.new_empty((), dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)


def _with_gradients_fake(*args: Any) -> tuple[Tensor, ...]:
    *given, needs = args
    shaped = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if need and tensor is not None
        else given[0].new_empty(0)
        for tensor, need in zip(given[:_TENSORS], needs, strict=True)
    )
    return _fake(*given), _fake(*given), *shaped


class TaskSparsityLossFunction(torch.autograd.Function):
    """Computes the gradients with the loss; backward scales them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:  # noqa: D102
        needs = tuple(ctx.needs_input_grad[:_TENSORS])
        with torch._C._AutoDispatchBelowAutograd():
            value, back, *grads = _OPS.task_sparsity_loss_gradients.default(*args, needs)
        # The factor is a tensor: as a number it would tie a compiled graph to its tokens.
        kept = (g if need else None for g, need in zip(grads, needs, strict=True))
        ctx.save_for_backward(back, *kept)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        back, z, gate, *others = ctx.saved_tensors
        taken_back = grad * back
        return (
            None if z is None else z * taken_back,
            None if gate is None else gate * grad,
            *(None if other is None else other * taken_back for other in others),
            None,
            None,
            None,
        )


def _autograd(*args: Any) -> Tensor:
    inputs = args[:_TENSORS]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return TaskSparsityLossFunction.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.task_sparsity_loss.default(*args)


_LIBRARY.impl("task_sparsity_loss", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("task_sparsity_loss", _autograd, "Autograd")
_LIBRARY.impl("task_sparsity_loss_gradients", _with_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("pemt_fast::task_sparsity_loss", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "pemt_fast::task_sparsity_loss_gradients", _with_gradients_fake, lib=_LIBRARY
)
