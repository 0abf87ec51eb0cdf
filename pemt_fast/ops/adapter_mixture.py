# SPDX-License-Identifier: Apache-2.0
"""The operator: a gated weighted sum of many bottleneck or low-rank adapters. This is the contract.

Letters: B sequences, S tokens per sequence, T = B·S tokens, E adapters (experts), D input width,
R bottleneck, H output width, N = ΣR total bottleneck (E·R when the ranks are equal).

From here: `validation.py` (the rules), `autograd.py` (what is kept for backward), then the
implementation that `dispatch.py` names: `stacked.py` (`impl="torch"`), `triton_backend.py`,
`cuda_backend.py` or `reference.py`. The C++ kernels (`impl="cpu"`) begin at `native.py`. A call
without gradients takes a shorter way to the kernels for GPUs, `cuda_door.py` or `triton_door.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pemt_fast.ops import autograd, cuda_door, native, triton_door
from pemt_fast.ops.autocast import autocast_dtype, without_autocast
from pemt_fast.ops.dispatch import CPU_KERNELS_ARE_FAST, resolve_impl
from pemt_fast.ops.reference import adapter_mixture_reference, linear_reference
from pemt_fast.ops.validation import check_adapter_mixture, check_linear


def adapter_mixture(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str,
    base: Tensor | None = None,
    impl: str = "auto",
    recompute: bool = False,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """`out[t] = base[t] + Σ_e gate[t,e]·(act(x[t]·w_down[e]ᵀ + b_down[e])·w_up[e] + b_up[e])`.

    With dense gates this is one two-layer MLP of width N whose hidden units are scaled by the gate:
    two wide matmuls and no tensor of size [E, T, H]. Everything is computed in `x.dtype` (in the
    autocast dtype inside `torch.autocast`), parameters of another float dtype are cast to it; the
    matmuls accumulate in float32, the gate is applied in float32. All gradients are available, each
    on its own; frozen adapters cost nothing for their weights. Deterministic on one machine at one
    number of threads. Second derivatives are not available, except with `impl="reference"`.

    An adapter whose gate is exactly 0 adds nothing to a token, even if its weights or its output
    are NaN or infinite; a token that does use an adapter with a non-finite weight becomes
    non-finite (`impl="torch"` then gives NaN in the whole row).

    Args:
        x: `[..., D]`, any strides; usually `[B, S, D]` or `[T, D]`.
        gate: `[E]`, `[B, E]` or `[B, S, E]`: its leading sizes are a prefix of those of `x`, each
            row serves all tokens below it. Any float dtype; not normalised here.
        w_down: `[E, R, D]`, or `[N, D]` with `ranks`.
        w_up: `[E, R, H]`, or `[N, H]` with `ranks`.
        b_down: `[E, R]`, or `[N]` with `ranks`; None for none.
        b_up: `[E, H]`; None for none.
        activation: `identity`, `relu`, `gelu` (erf), `gelu_tanh` or `silu`.
        base: `[..., H]`, added to the sum; None for none.
        impl: `auto`, `reference`, `torch`, `cpu`, `triton` or `cuda`. A named implementation runs
            or raises with every reason; `auto` follows `pemt-fast info`.
        recompute: Keep no hidden units for backward and compute them again there: T·N elements
            less memory for one more matmul.
        ranks: One rank per adapter when they differ; the weights are then packed `[N, ·]`.

    Returns:
        `[..., H]` in `x.dtype`, contiguous.

    Raises:
        ValueError: a shape, device or name does not fit; the message says what was expected.
        TypeError: an argument is not a float tensor.
        RuntimeError: the implementation asked for cannot run here.

    Example:
        >>> import torch
        >>> from pemt_fast import adapter_mixture
        >>> x, gate = torch.randn(2, 5, 16), torch.softmax(torch.randn(2, 3), -1)
        >>> w_down, w_up = torch.randn(3, 4, 16), torch.randn(3, 4, 8)
        >>> adapter_mixture(x, gate, w_down, w_up, activation="relu").shape
        torch.Size([2, 5, 8])
    """
    if takes_door(impl):
        out = native.door(
            x, gate, w_down, w_up, b_down, b_up, base, activation, ranks, recompute, False
        )
        if out is not None:
            return out
    if impl in ("auto", "cuda", "triton") and not torch.compiler.is_compiling():
        for to in (cuda_door, triton_door):
            out = to.door(x, gate, w_down, w_up, b_down, b_up, base, activation, impl, ranks)
            if out is not None:
                return out
    out, _ = check_and_call(
        x, gate, w_down, w_up, b_down, b_up, activation, base, impl, recompute, ranks, False
    )
    return out


def adapter_mixture_with_hidden(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str,
    base: Tensor | None = None,
    impl: str = "auto",
    recompute: bool = False,
    ranks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`adapter_mixture` that also returns its ungated hidden units `act(x·w_downᵀ + b_down)`.

    The hidden units `[..., N]` are differentiable, so that a loss in rank space (see
    `sparsity_loss.py`) shares the down-projection with the mixture. Arguments as there.
    """
    if takes_door(impl):
        both = native.door(
            x, gate, w_down, w_up, b_down, b_up, base, activation, ranks, recompute, True
        )
        if both is not None:
            return both
    return check_and_call(
        x, gate, w_down, w_up, b_down, b_up, activation, base, impl, recompute, ranks, True
    )


def takes_door(impl: str) -> bool:
    """Whether an eager call may try the quick way to the C++ kernels, which does all checks."""
    if torch.compiler.is_compiling():
        return False
    if impl == "auto":
        # Else the environment says what "auto" means.
        return CPU_KERNELS_ARE_FAST and "PEMT_FAST_IMPL" not in os.environ
    return impl == "cpu"


def check_and_call(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    activation: str,
    base: Tensor | None,
    impl: str,
    recompute: bool,
    ranks: Sequence[int] | None,
    with_hidden: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The long way of a call: the rules, the dtype, the implementation.

    With `weight` it is a call of `linear_mixture` and has no base.
    """
    rank_list = check_adapter_mixture(x, gate, w_down, w_up, b_down, b_up, base, activation, ranks)
    if weight is not None:
        check_linear(x, w_up.shape[-1], weight, bias)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    impl = resolve_impl(impl, x.device, x.dtype)
    if impl == "reference":
        with without_autocast(x.device.type):
            if weight is not None:
                base = linear_reference(x, weight, bias)
            return adapter_mixture_reference(
                x, gate, w_down, w_up, b_down, b_up, base, rank_list, activation
            )
    if impl == "cpu":
        return native.adapter_mixture(
            x, gate, w_down, w_up, b_down, b_up, base,
            rank_list, activation, recompute, with_hidden, weight, bias,
        )  # fmt: skip
    return autograd.adapter_mixture(
        x, gate, w_down, w_up, b_down, b_up, base,
        rank_list, activation, impl, recompute, with_hidden, weight=weight, bias=bias,
    )  # fmt: skip
