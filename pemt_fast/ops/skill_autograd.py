# SPDX-License-Identifier: Apache-2.0
"""`skill_mixture` for torch: its registration, its gradients, and what is kept for them.

The arithmetic is in `skill_terms.py` (`impl="torch"`) and in `csrc/skill_mixture_cpu.cpp`
(`impl="cpu"`), which both mix the factors again in backward. Contract and letters:
`skill_mixture.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pemt_fast.ops import skill_terms
from pemt_fast.ops.autocast import without_autocast
from pemt_fast.ops.linear_terms import cast, linear_gradients
from pemt_fast.ops.skill_terms import flat, with_splits
from pemt_fast.ops.watchers import nobody_watches

_INPUTS = (
    "Tensor x, Tensor? mixing, Tensor a, Tensor b, Tensor? task_ids, Tensor? base, "
    "float scale, str impl"
)
_LINEAR = "Tensor? weight=None, Tensor? bias=None"
_LIBRARY = torch.library.Library("pemt_fast", "FRAGMENT")
_LIBRARY.define(f"skill_mixture({_INPUTS}, {_LINEAR}) -> Tensor")
_LIBRARY.define(
    f"skill_mixture_forward({_INPUTS}, bool save, {_LINEAR}) -> (Tensor out, Tensor hidden)"
)
_LIBRARY.define(
    "skill_mixture_backward(Tensor grad_out, Tensor? x, Tensor? mixing, Tensor a, Tensor b, "
    "Tensor? task_ids, Tensor? hidden, float scale, str impl, bool[] needs, Tensor? weight=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
OPS = torch.ops.pemt_fast


def _shaped(result: Tensor, lead: torch.Size) -> Tensor:
    """`result` as `[*lead, width]`, not a view: autograd refuses to change those in place."""
    if result.shape[:-1] == lead and not result._is_view():
        return result
    return torch.ops.aten._unsafe_view.default(result, [*lead, result.shape[-1]])


def _forward(
    x: Tensor,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    task_ids: Tensor | None,
    base: Tensor | None,
    scale: float,
    impl: str,
    save: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device.type):
        if impl == "cpu":
            return OPS.skill_mixture_forward_cpu.default(
                x, mixing, a, b, task_ids, base, scale, save, weight, bias
            )
        lead = x.shape[:-1]
        if weight is not None:
            base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        out, hidden = skill_terms.forward(
            flat(x), *with_splits(mixing, a, b), task_ids,
            None if base is None else flat(base), scale, in_place=weight is not None,
        )  # fmt: skip
    return _shaped(out, lead), _shaped(hidden, lead) if save else x.new_empty(0)


def _forward_fake(
    x: Tensor, _mixing: Tensor | None, a: Tensor, b: Tensor, *_: Any, save: bool
) -> tuple[Tensor, Tensor]:
    splits = b.shape[0] if b.dim() == 4 else 1
    hidden = x.new_empty(*x.shape[:-1], a.shape[-2]) if save else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], splits * b.shape[-1]), hidden


def _backward(
    grad_out: Tensor,
    x: Tensor | None,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    task_ids: Tensor | None,
    hidden: Tensor | None,
    scale: float,
    impl: str,
    needs: Sequence[bool],
    weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    with without_autocast(grad_out.device.type):
        if impl == "cpu":
            return OPS.skill_mixture_backward_cpu.default(
                grad_out, x, mixing, a, b, task_ids, hidden, scale, needs, weight
            )
        d_linear = None
        if weight is not None and needs[0]:
            d_linear = flat(torch.matmul(grad_out, weight.to(grad_out.dtype)))
        d_x, *d_parameters = skill_terms.backward(
            flat(grad_out),
            None if x is None else flat(x),
            *with_splits(mixing, a, b),
            task_ids,
            None if hidden is None else flat(hidden),
            scale,
            tuple(needs),
            d_linear,
        )
    # Each of its own: results of an operator must not share memory.
    return (
        grad_out.new_empty(0) if d_x is None else _shaped(d_x, grad_out.shape[:-1]),
        *(
            grad_out.new_empty(0)
            if grad is None or parameter is None
            else grad.reshape(parameter.shape).to(parameter.dtype)
            for grad, parameter in zip(d_parameters, (mixing, a, b), strict=True)
        ),
    )


def _backward_fake(
    grad_out: Tensor, _x: Tensor | None, mixing: Tensor | None, a: Tensor, b: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    needs = others[4]
    splits = a.shape[0] if a.dim() == 4 else 1
    like = (
        grad_out.new_empty(*grad_out.shape[:-1], splits * a.shape[-1]),
        *(
            None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (mixing, a, b)
        ),
    )
    return tuple(
        grad if wanted and grad is not None else grad_out.new_empty(0)
        for grad, wanted in zip(like, needs, strict=True)
    )


class SkillMixtureFunction(torch.autograd.Function):
    """Keeps what the contract lists and asks backward only for needed gradients."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        mixing: Tensor | None,
        a: Tensor,
        b: Tensor,
        task_ids: Tensor | None,
        base: Tensor | None,
        scale: float,
        impl: str,
        weight: Tensor | None,
        bias: Tensor | None,
        watched: bool,
    ) -> Tensor:
        ctx.needs = needs = tuple(ctx.needs_input_grad[:4])
        ctx.trained = [
            t.dtype if need and t is not None else None
            for t, need in zip((weight, bias), ctx.needs_input_grad[8:10], strict=True)
        ]
        needs_x, needs_mixing, needs_a, needs_b = needs
        save = needs_mixing or needs_b
        with torch._C._AutoDispatchBelowAutograd():
            if weight is not None:
                weight = cast(weight, x.dtype)  # once for both directions
            run = OPS.skill_mixture_forward.default if watched else _forward
            out, hidden = run(
                x, mixing, a, b, task_ids, base, scale, impl, save, weight, bias
            )  # fmt: skip
        ctx.scale, ctx.impl = scale, impl
        ctx.base_dtype = None if base is None else base.dtype
        if any(needs) or any(ctx.trained):
            keeps_x = needs_mixing or needs_a or ctx.trained[0] is not None
            ctx.save_for_backward(
                x if keeps_x else None, mixing, a, b, task_ids, hidden if save else None,
                weight if needs_x else None,
            )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        d_base = grad_out.to(ctx.base_dtype) if ctx.needs_input_grad[5] else None
        if not any(ctx.needs) and not any(ctx.trained):
            return (*(None,) * 5, d_base, *(None,) * 5)
        tensors = ctx.saved_tensors  # once: what recomputes them may be asked only once
        x, mixing, a, b, task_ids, hidden, weight = tensors
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if any(ctx.needs):
            watched = not nobody_watches(grad_out, *tensors)
            with torch._C._AutoDispatchBelowAutograd():
                run = OPS.skill_mixture_backward.default if watched else _backward
                found = run(
                    grad_out, x, mixing, a, b, task_ids, hidden,
                    ctx.scale, ctx.impl, ctx.needs, weight,
                )  # fmt: skip
            grads = tuple(g if need else None for g, need in zip(found, ctx.needs, strict=True))
        linear = linear_gradients(grad_out, x, ctx.trained)
        return (*grads, None, d_base, None, None, *linear, None)


def is_differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd is on and one of the tensors asks for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(*args: Any) -> Tensor:
    args = (*args, *(None,) * (10 - len(args)))  # the dispatcher leaves defaults out
    if is_differentiated((*args[:6], *args[8:])):
        return SkillMixtureFunction.apply(*args, True)
    with torch._C._AutoDispatchBelowAutograd():
        return OPS.skill_mixture.default(*args)


def forward_only(*args: Any) -> Tensor:
    """The output, without anything kept; arguments as in the schema."""
    return _forward(*(*args[:8], False, *args[8:]))[0]


def _forward_only_fake(*args: Any) -> Tensor:
    return _forward_fake(*args, save=False)[0]


def _forward_saved_fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward_fake(*args[:8], save=args[8])


_LIBRARY.impl("skill_mixture", forward_only, "CompositeExplicitAutograd")
_LIBRARY.impl("skill_mixture", _autograd, "Autograd")
_LIBRARY.impl("skill_mixture_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("skill_mixture_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pemt_fast::skill_mixture", _forward_only_fake, lib=_LIBRARY)
torch.library.register_fake("pemt_fast::skill_mixture_forward", _forward_saved_fake, lib=_LIBRARY)
torch.library.register_fake("pemt_fast::skill_mixture_backward", _backward_fake, lib=_LIBRARY)
