# SPDX-License-Identifier: Apache-2.0
"""The operator of Poly and MHR: low-rank skills whose factors are averaged per task.

Letters: B sequences, S tokens per sequence, T = B·S tokens, D input width, R rank, H output width,
K skills, P splits (P = 1 in Poly), M tasks.

`adapter_mixture` sums the outputs of its adapters, `Σ_k w_k·(x·A_kᵀ)·B_k`; here A and B are
averaged each by itself and then multiplied, `(x·(Σ_k w_k·A_k)ᵀ)·(Σ_k w_k·B_k)`.

From here: `skill_validation.py` (the rules), then `skill_terms.py` (the arithmetic) or
`skill_reference.py` (the specification). This file owns the contract, the registration with torch
and what is kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops import skill_terms
from pemt_fast.ops.autocast import autocast_dtype, without_autocast
from pemt_fast.ops.dispatch import resolve_impl
from pemt_fast.ops.skill_reference import skill_mixture_reference
from pemt_fast.ops.skill_terms import flat, with_splits
from pemt_fast.ops.skill_validation import check_skill_mixture
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
_OPS = torch.ops.pemt_fast
# Implementations that `adapter_mixture` has and this operator has not.
_NO_KERNELS = ("triton", "cuda")


def skill_mixture(
    x: Tensor,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    task_ids: Tensor | None = None,
    base: Tensor | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """`out = base + scale·(x·A_tᵀ)·B_t` with `A_t = Σ_k mixing[t, k]·a[k]`, `B_t` likewise.

    The factors are mixed once per task or per sequence, never per token: in float32 (float64 for
    float64 x), then rounded once to `x.dtype` (to the autocast dtype inside `torch.autocast`), in
    which everything else is computed; the matmuls accumulate in float32. Parameters of another
    float dtype are cast. All gradients are available, each on its own; d_mixing, d_a and d_b are
    summed over sequences in float32. Deterministic on one machine at one number of threads. Second
    derivatives are not available, except with `impl="reference"`.

    Kept for backward besides the arguments themselves: `hidden = x·A_tᵀ`, T·R elements in
    `x.dtype`, only if `mixing` or `b` is trained; `x` only if `mixing` or `a` is. The mixed factors
    are not kept but mixed again.

    A skill with weight 0 is still multiplied: if it is not finite, neither is the output. A
    gradient that is not finite in one sequence may reach the rows of all tasks.

    Args:
        x: `[B, ..., D]`, any strides; usually `[B, S, D]`.
        mixing: `[M, K]`, or `[M, P, K]` for P splits: one row of weights per task. Any float dtype;
            not normalised here. None: a and b hold the factors of the tasks themselves, K = M,
            which are only rounded to `x.dtype`.
        a: `[K, R, D]`; with splits `[P, K, R, D / P]`, each of which reads its own columns of x.
            The last two dimensions are those of peft's `poly_lora_A` transposed.
        b: `[K, R, H]`; with splits `[P, K, R, H / P]`, each of which writes its own columns.
        task_ids: `[B]`, int64 or int32, the row of `mixing` of each sequence. None: `mixing` has
            one row per sequence, or a single one for all. Checked where they are on the CPU;
            elsewhere, and inside a compiled graph, an unknown id is an error of the device.
        base: `[B, ..., H]`, added to the product; None for none.
        scale: Factor of the product, a number: 1 / R in Poly.
        impl: `auto`, `reference`, `torch` or `cpu`; `auto` is `cpu` where `adapter_mixture` takes
            its C++ kernels too, else `torch`: there are no kernels for GPUs.

    Returns:
        `[B, ..., H]` in `x.dtype`, contiguous.

    Raises:
        ValueError: a shape, device or name does not fit; the message says what was expected.
        IndexError: a task id has no row in `mixing`.
        TypeError: an argument is not a tensor of a dtype that it may have.
        RuntimeError: the implementation asked for cannot run here.

    Example:
        >>> import torch
        >>> from pemt_fast.ops.skill_mixture import skill_mixture
        >>> x, task_ids = torch.randn(2, 5, 16), torch.tensor([2, 0])
        >>> mixing, a, b = torch.rand(3, 4), torch.randn(4, 2, 16), torch.randn(4, 2, 8)
        >>> skill_mixture(x, mixing, a, b, task_ids=task_ids).shape
        torch.Size([2, 5, 8])
    """
    check_skill_mixture(x, mixing, a, b, task_ids, base)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype not in (dtype, torch.float64):
        x = x.to(dtype)
    scale = float(scale)
    impl = _resolve(impl, x)
    if impl == "reference":
        with without_autocast(x.device.type):
            return skill_mixture_reference(x, mixing, a, b, task_ids, base, scale)
    tensors = (x, mixing, a, b, task_ids, base)
    if not nobody_watches(*tensors):
        return _OPS.skill_mixture.default(*tensors, scale, impl)
    if _is_differentiated(tensors):
        return SkillMixtureFunction.apply(*tensors, scale, impl, False)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_only(*tensors, scale, impl)


def _resolve(impl: str, x: Tensor) -> str:
    if impl in _NO_KERNELS:
        raise RuntimeError(
            f"impl={impl!r} cannot run: this version of pemt_fast ships no {impl} kernels for "
            "skill_mixture"
        )
    found = resolve_impl(impl, x.device, x.dtype)
    return "torch" if found in _NO_KERNELS else found


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
        return _OPS.skill_mixture_forward_cpu.default(x, mixing, a, b, task_ids, base, scale, save)
    lead = x.shape[:-1]
    with without_autocast(x.device.type):
        out, hidden = skill_terms.forward(
            flat(x), *with_splits(mixing, a, b), task_ids,
            None if base is None else flat(base), scale,
        )  # fmt: skip
    return _shaped(out, lead), _shaped(hidden, lead) if save else x.new_empty(0)


def _forward_fake(
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
        return _OPS.skill_mixture_backward_cpu.default(
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
        watched: bool,
    ) -> Tensor:
        ctx.needs = needs = tuple(ctx.needs_input_grad[:4])
        _, needs_mixing, needs_a, needs_b = needs
        save = needs_mixing or needs_b
        with torch._C._AutoDispatchBelowAutograd():
            run = _OPS.skill_mixture_forward.default if watched else _forward
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
            run = _OPS.skill_mixture_backward.default if watched else _backward
            x, mixing, a, b, task_ids, hidden = tensors
            grads = run(grad_out, x, mixing, a, b, task_ids, hidden, ctx.scale, ctx.impl, ctx.needs)
        wanted = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
        return (*wanted, None, d_base, None, None, None)


def _is_differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autograd(*args: Any) -> Tensor:
    if _is_differentiated(args[:6]):
        return SkillMixtureFunction.apply(*args, True)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.skill_mixture.default(*args)


def _forward_only(*args: Any) -> Tensor:
    return _forward(*args)[0]


def _forward_only_fake(*args: Any) -> Tensor:
    return _forward_fake(*args)[0]


_LIBRARY.impl("skill_mixture", _forward_only, "CompositeExplicitAutograd")
_LIBRARY.impl("skill_mixture", _autograd, "Autograd")
_LIBRARY.impl("skill_mixture_forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("skill_mixture_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("pemt_fast::skill_mixture", _forward_only_fake, lib=_LIBRARY)
torch.library.register_fake("pemt_fast::skill_mixture_forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("pemt_fast::skill_mixture_backward", _backward_fake, lib=_LIBRARY)
