# SPDX-License-Identifier: Apache-2.0
"""`torch.ops.pemt_fast.adapter_mixture`: registration, memory and gradients of the operator.

One opaque, differentiable operator per call for autograd, `torch.compile` and export; an eager call
that nobody watches does the same without `torch.ops` (`watchers.py`). This file owns what is kept
for backward and what is skipped; the arithmetic is in the pair `forward` / `backward` of the
implementation that `dispatch.py` names (`stacked.py` for `impl="torch"`, `triton_backend.py` for
`impl="triton"`). The kernels of `csrc/` have an operator of their own, see `native.py`. With
`weight` and `bias` it is `linear_mixture`: a linear of `x` in the place of `base`.

Saved for backward: `z` (gelu, silu) or `act(z)` (identity, relu), T·N elements in the dtype of
`x`; `x` itself only if `w_down` or `weight` is trained or with `recompute`, which saves no hidden
units at all.
Gradients arrive in the dtype of their input and are accumulated in float32 by the matmuls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops import fakes
from pemt_fast.ops.autocast import without_autocast
from pemt_fast.ops.dispatch import backend
from pemt_fast.ops.gated_units import pack
from pemt_fast.ops.linear_terms import cast, linear_gradients
from pemt_fast.ops.stacked import keeps_pre_activation
from pemt_fast.ops.watchers import nobody_watches

_INPUTS = (
    "Tensor x, Tensor gate, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, "
    "Tensor? base, int[] ranks, str activation, str impl, bool recompute, bool with_hidden"
)
_LINEAR = "Tensor? weight=None, Tensor? bias=None"
_LIBRARY = torch.library.Library("pemt_fast", "DEF")
_LIBRARY.define(f"adapter_mixture({_INPUTS}, {_LINEAR}) -> (Tensor out, Tensor hidden)")
_LIBRARY.define(
    f"adapter_mixture_forward({_INPUTS}, bool save, {_LINEAR}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "adapter_mixture_backward(Tensor? grad_out, Tensor? grad_hidden, Tensor? x, Tensor gate, "
    "Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, Tensor? saved, int[] ranks, "
    "str activation, str impl, bool[] needs, Tensor? weight=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_OPS = torch.ops.pemt_fast


def _forward(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    base: Tensor | None,
    ranks: Sequence[int],
    activation: str,
    impl: str,
    recompute: bool,
    with_hidden: bool,
    save: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    lead, h = x.shape[:-1], w_up.shape[-1]
    with without_autocast(x.device.type):
        out, hidden, saved = backend(impl).forward(
            x.reshape(-1, x.shape[-1]),
            gate.reshape(-1, gate.shape[-1]),
            pack(w_down, w_up, b_down, b_up, x.dtype, weight, bias),
            None if base is None else base.reshape(-1, h),
            tuple(ranks),
            activation,
            save,
            with_hidden,
        )
    none = x.new_empty(0)
    return (
        _shaped(out, lead),
        none if hidden is None else _shaped(hidden, lead),
        x.new_empty(0) if saved is None else saved,
    )


def _shaped(result: Tensor, lead: torch.Size) -> Tensor:
    """`[T, width]` as `[*lead, width]`, not a view: autograd refuses to change those in place."""
    return torch.ops.aten._unsafe_view.default(result, [*lead, result.shape[-1]])


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fakes.forward(args[0], args[3], args[7], with_hidden=args[11], save=args[12])


def _backward(
    grad_out: Tensor | None,
    grad_hidden: Tensor | None,
    x: Tensor | None,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    saved: Tensor | None,
    ranks: Sequence[int],
    activation: str,
    impl: str,
    needs: Sequence[bool],
    weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    lead, dtype, d_out = _gradient_layout(grad_out, grad_hidden, w_up)
    with without_autocast(d_out.device.type):
        grads = backend(impl).backward(
            d_out.reshape(-1, w_up.shape[-1]),
            None if grad_hidden is None else grad_hidden.reshape(-1, sum(ranks)).to(dtype),
            None if x is None else x.reshape(-1, x.shape[-1]),
            gate.reshape(-1, gate.shape[-1]),
            pack(w_down, w_up, b_down, b_up, dtype, weight),
            None if saved is None else saved.reshape(-1, sum(ranks)),
            tuple(ranks),
            activation,
            tuple(needs),
        )
    inputs = (gate, w_down, w_up, b_down, b_up)
    shapes = [(*lead, w_down.shape[-1]), *(None if t is None else t.shape for t in inputs)]
    dtypes = [dtype, *(None if t is None else t.dtype for t in inputs)]
    return tuple(
        d_out.new_empty(0) if grad is None else grad.reshape(shape).to(grad_dtype)
        for grad, shape, grad_dtype in zip(grads, shapes, dtypes, strict=True)
    )


def _gradient_layout(
    grad_out: Tensor | None, grad_hidden: Tensor | None, w_up: Tensor
) -> tuple[torch.Size, torch.dtype, Tensor]:
    """Leading sizes, dtype and a dense gradient of the output, zeros if it was not used."""
    if grad_out is not None:
        return grad_out.shape[:-1], grad_out.dtype, grad_out
    assert grad_hidden is not None
    lead = grad_hidden.shape[:-1]
    return lead, grad_hidden.dtype, grad_hidden.new_zeros(*lead, w_up.shape[-1])


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return fakes.backward(args[0], args[1], args[3:8], args[12])


class AdapterMixtureFunction(torch.autograd.Function):
    """Saves what the module docstring lists and asks backward only for needed gradients."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        w_down: Tensor,
        w_up: Tensor,
        b_down: Tensor | None,
        b_up: Tensor | None,
        base: Tensor | None,
        ranks: Sequence[int],
        activation: str,
        impl: str,
        recompute: bool,
        with_hidden: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        watched: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:6]
        trained = [
            t.dtype if need and t is not None else None
            for t, need in zip((weight, bias), ctx.needs_input_grad[12:14], strict=True)
        ]
        needs_hidden = any(needs[:5])
        # The identity and relu differentiate from act(z), which is the hidden output itself.
        shared = with_hidden and not keeps_pre_activation(activation)
        save = needs_hidden and not recompute and not shared
        with torch._C._AutoDispatchBelowAutograd():
            if weight is not None:
                weight = cast(weight, x.dtype)  # once for both directions
            run = _OPS.adapter_mixture_forward.default if watched else _forward
            out, hidden, saved = run(
                x, gate, w_down, w_up, b_down, b_up, base,
                ranks, activation, impl, recompute, with_hidden, save, weight, bias,
            )  # fmt: skip
        keep = hidden if shared and not recompute else saved if save else None
        needs_x = needs[2] or (needs_hidden and recompute) or trained[0] is not None
        ctx.save_for_backward(
            x if needs_x else None, gate, w_down, w_up, b_down, b_up,
            keep if needs_hidden else None, weight if needs[0] else None,
        )  # fmt: skip
        ctx.ranks, ctx.activation, ctx.impl, ctx.needs = tuple(ranks), activation, impl, needs
        ctx.trained = trained
        ctx.base_dtype = None if base is None else base.dtype
        ctx.set_materialize_grads(False)
        if not with_hidden:
            ctx.mark_non_differentiable(hidden)
        return out, hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # noqa: D102
        ctx: Any,
        grad_out: Tensor | None,
        grad_hidden: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_hidden is None:
            return (None,) * 15
        tensors = ctx.saved_tensors  # once: what recomputes them may be asked only once
        x, gate, w_down, w_up, b_down, b_up, saved, weight = tensors
        d_base = d_weight = d_bias = None
        if ctx.base_dtype is not None and ctx.needs_input_grad[6] and grad_out is not None:
            d_base = grad_out.to(ctx.base_dtype)
        if any(ctx.trained) and grad_out is not None:
            d_weight, d_bias = linear_gradients(grad_out, x, ctx.trained)
        others = (d_base, *(None,) * 5, d_weight, d_bias, None)
        if not any(ctx.needs):
            return (*(None,) * 6, *others)
        watched = not nobody_watches(grad_out, grad_hidden, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            run = _OPS.adapter_mixture_backward.default if watched else _backward
            grads = run(
                grad_out, grad_hidden, x, gate, w_down, w_up, b_down, b_up,
                saved, ctx.ranks, ctx.activation, ctx.impl, ctx.needs, weight,
            )  # fmt: skip
        wanted = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
        return (*wanted, *others)


def adapter_mixture(
    *args: Any, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The operator on checked arguments, in the order of its schema: output and hidden units."""
    if not nobody_watches(*args[:7], weight, bias):
        return _OPS.adapter_mixture.default(*args, weight, bias)
    if _is_differentiated(*args[:7], weight, bias):
        return AdapterMixtureFunction.apply(*args, weight, bias, False)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_only(*args, weight, bias)


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    args = (*args, *(None,) * (14 - len(args)))  # the dispatcher leaves defaults out
    if _is_differentiated(*args[:7], *args[12:]):
        return AdapterMixtureFunction.apply(*args, True)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.adapter_mixture.default(*args)


def _forward_only(*args: Any) -> tuple[Tensor, Tensor]:
    out, hidden, _ = _forward(*(*args[:12], False, *args[12:]))
    return out, hidden


def _forward_only_fake(*args: Any) -> tuple[Tensor, Tensor]:
    out, hidden, _ = fakes.forward(args[0], args[3], args[7], with_hidden=args[11], save=False)
    return out, hidden


_LIBRARY.impl("adapter_mixture", _forward_only, "CompositeExplicitAutograd")
_LIBRARY.impl("adapter_mixture", _autograd, "Autograd")
_LIBRARY.impl("adapter_mixture_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("adapter_mixture_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pemt_fast::adapter_mixture", _forward_only_fake, lib=_LIBRARY)
torch.library.register_fake("pemt_fast::adapter_mixture_forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("pemt_fast::adapter_mixture_backward", _backward_fake, lib=_LIBRARY)
