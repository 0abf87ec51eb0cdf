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
from torch import Tensor

from pemt_fast.ops import skill_terms
from pemt_fast.ops.autocast import without_autocast
from pemt_fast.ops.skill_terms import flat, with_splits
from pemt_fast.ops.watchers import nobody_watches

_INPUTS = (
    "Tensor x, Tensor? mixing, Tensor a, Tensor b, Tensor? task_ids, Tensor? base, "
    "float scale, str impl"
)
_LIBRARY = torch.library.Library("pemt_fast", "FRAGMENT")
_LIBRARY.define(f"skill_mixture({_INPUTS}) -> Tensor")
_LIBRARY.define(f"skill_mixture_forward({_INPUTS}, bool save) -> (Tensor out, Tensor hidden)")
_LIBRARY.define(
    "skill_mixture_backward(Tensor grad_out, Tensor? x, Tensor? mixing, Tensor a, Tensor b, "
    "Tensor? task_ids, Tensor? hidden, float scale, str impl, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
OPS = torch.ops.pemt_fast


def _shaped(result: Tensor, lead: torch.Size) -> Tensor:
    """`result` as `[*lead, width]`, not a view: autograd refuses to change those in place."""
    if result.shape[:-1] == lead:
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
) -> tuple[Tensor, Tensor]:
    if impl == "cpu":
        return OPS.skill_mixture_forward_cpu.default(x, mixing, a, b, task_ids, base, scale, save)
    lead = x.shape[:-1]
    with without_autocast(x.device.type):
        out, hidden = skill_terms.forward(
            flat(x), *with_splits(mixing, a, b), task_ids,
            None if base is None else flat(base), scale,
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
) -> tuple[Tensor, ...]:
    if impl == "cpu":
        return OPS.skill_mixture_backward_cpu.default(
            grad_out, x, mixing, a, b, task_ids, hidden, scale, needs
        )
    with without_autocast(grad_out.device.type):
        d_x, *d_parameters = skill_terms.backward(
            flat(grad_out),
            None if x is None else flat(x),
            *with_splits(mixing, a, b),
            task_ids,
            None if hidden is None else flat(hidden),
            scale,
            tuple(needs),
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
        for grad, wanted in zip(like, others[-1], strict=True)
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
        watched: bool,
    ) -> Tensor:
        ctx.needs = needs = tuple(ctx.needs_input_grad[:4])
        _, needs_mixing, needs_a, needs_b = needs
        save = needs_mixing or needs_b
        with torch._C._AutoDispatchBelowAutograd():
            run = OPS.skill_mixture_forward.default if watched else _forward
            out, hidden = run(x, mixing, a, b, task_ids, base, scale, impl, save)
        ctx.scale, ctx.impl = scale, impl
        ctx.base_dtype = None if base is None else base.dtype
        if any(needs):
            ctx.save_for_backward(
                x if needs_mixing or needs_a else None,
                mixing, a, b, task_ids, hidden if save else None,
            )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        d_base = grad_out.to(ctx.base_dtype) if ctx.needs_input_grad[5] else None
        if not any(ctx.needs):
            return (*(None,) * 5, d_base, None, None, None)
        tensors = ctx.saved_tensors  # once: what recomputes them may be asked only once
        watched = not nobody_watches(grad_out, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            run = OPS.skill_mixture_backward.default if watched else _backward
            x, mixing, a, b, task_ids, hidden = tensors
            grads = run(grad_out, x, mixing, a, b, task_ids, hidden, ctx.scale, ctx.impl, ctx.needs)
        wanted = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
        return (*wanted, None, d_base, None, None, None)


def is_differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd is on and one of the tensors asks for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(*args: Any) -> Tensor:
    if is_differentiated(args[:6]):
        return SkillMixtureFunction.apply(*args, True)
    with torch._C._AutoDispatchBelowAutograd():
        return OPS.skill_mixture.default(*args)


def forward_only(*args: Any) -> Tensor:
    """The output, without anything kept; arguments as in the schema."""
    return _forward(*args)[0]


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
