# SPDX-License-Identifier: Apache-2.0
"""The operator of Poly and MHR: low-rank skills whose factors are averaged per task.

Letters: B sequences, S tokens per sequence, T = B·S tokens, D input width, R rank, H output width,
K skills, P splits (P = 1 in Poly), M tasks.

`adapter_mixture` sums the outputs of its adapters, `Σ_k w_k·(x·A_kᵀ)·B_k`; here A and B are
averaged each by itself and then multiplied, `(x·(Σ_k w_k·A_k)ᵀ)·(Σ_k w_k·B_k)`.

From here: `skill_validation.py` (the rules), `skill_autograd.py` (the registration with torch, what
is kept for backward), then `skill_terms.py` (the arithmetic), `csrc/skill_mixture_cpu.cpp` (the C++
kernels) or `skill_reference.py` (the specification).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pemt_fast.ops.autocast import autocast_dtype, without_autocast
from pemt_fast.ops.dispatch import resolve_impl
from pemt_fast.ops.skill_autograd import (
    OPS,
    SkillMixtureFunction,
    forward_only,
    is_differentiated,
)
from pemt_fast.ops.skill_reference import skill_mixture_reference
from pemt_fast.ops.skill_validation import check_skill_mixture
from pemt_fast.ops.watchers import nobody_watches

# Implementations that `adapter_mixture` has and this operator has not.
IMPLS_WITHOUT_KERNELS = ("triton", "cuda")


def skill_mixture(
    x: Tensor,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    task_ids: Tensor | None = None,
    base: Tensor | None = None,
    scale: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
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
        weight: `[H, D]` of a linear, whose output takes the place of `base`: the same as
            `base=linear(x, weight, bias)` with two passes over memory less, one over the output and
            one over d_x. Cast to `x.dtype`; frozen it costs nothing for its gradients, which need x
            otherwise.
        bias: `[H]` of the linear; None for none.
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
    check_skill_mixture(x, mixing, a, b, task_ids, base, weight, bias)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype not in (dtype, torch.float64):
        x = x.to(dtype)
    scale = float(scale)
    impl = _resolve(impl, x)
    if impl == "reference":
        with without_autocast(x.device.type):
            return skill_mixture_reference(x, mixing, a, b, task_ids, base, scale, weight, bias)
    tensors = (x, mixing, a, b, task_ids, base)
    if not nobody_watches(*tensors, weight, bias):
        return OPS.skill_mixture.default(*tensors, scale, impl, weight, bias)
    if is_differentiated((*tensors, weight, bias)):
        return SkillMixtureFunction.apply(*tensors, scale, impl, weight, bias, False)
    with torch._C._AutoDispatchBelowAutograd():
        return forward_only(*tensors, scale, impl, weight, bias)


def _resolve(impl: str, x: Tensor) -> str:
    if impl in IMPLS_WITHOUT_KERNELS:
        raise RuntimeError(
            f"impl={impl!r} cannot run: this version of pemt_fast ships no {impl} kernels for "
            "skill_mixture"
        )
    found = resolve_impl(impl, x.device, x.dtype)
    return "torch" if found in IMPLS_WITHOUT_KERNELS else found
