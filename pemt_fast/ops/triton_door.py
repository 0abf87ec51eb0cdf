# SPDX-License-Identifier: Apache-2.0
"""The short way of an eager call without gradients to the Triton kernels.

A call of few tokens costs more on the host than on the GPU. What the host works out (rules, form of
the tensors, kernels and their sizes) depends on the form of the arguments alone: it is done at the
first call of a form, later ones look it up and launch. All other calls take `autograd.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pemt_fast.ops.autocast import autocast_dtype
from pemt_fast.ops.dispatch import backend, kernels_beside, resolve_impl
from pemt_fast.ops.gated_units import pack
from pemt_fast.ops.validation import check_adapter_mixture
from pemt_fast.ops.watchers import nobody_watches

Call = Callable[..., Tensor]

# Form of the arguments -> what launches for it, None for forms that are not for this door.
CALLS: dict[tuple[object, ...], Call | None] = {}
_MOST_CALLS = 2048


def door(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    base: Tensor | None,
    activation: str,
    impl: str,
    ranks: Sequence[int] | None,
) -> Tensor | None:
    """The output, None if the call is not for this door or breaks a rule that `impl` may check."""
    tensors = (x, gate, w_down, w_up, b_down, b_up, base)
    if x is None or not nobody_watches(*tensors):
        return None
    if ranks is not None and type(ranks) is not tuple:
        return None
    if impl == "auto" and (not x.is_cuda or "PEMT_FAST_IMPL" in os.environ):
        return None
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return None
    precision = torch.backends.cuda.matmul.fp32_precision if x.dtype == torch.float32 else None
    form = (
        activation, impl, ranks, autocast_dtype(x.device.type), precision,
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
    )  # fmt: skip
    if form not in CALLS:
        if len(CALLS) >= _MOST_CALLS:
            CALLS.clear()
        CALLS[form] = _prepare(*tensors, activation, impl, ranks)
    call = CALLS[form]
    return None if call is None else call(*tensors)


def _prepare(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    base: Tensor | None,
    activation: str,
    impl: str,
    ranks: Sequence[int] | None,
) -> Call | None:
    """What launches for arguments of this form, if the kernels can take each as it lies there."""
    found = check_adapter_mixture(x, gate, w_down, w_up, b_down, b_up, base, activation, ranks)
    cast = autocast_dtype(x.device.type)
    if (cast is not None and cast != x.dtype) or x.numel() == 0:
        return None
    if kernels_beside(resolve_impl(impl, x.device, x.dtype)) != "triton":
        return None
    kernels = backend("triton")
    walk = kernels.forward_walk(
        x.reshape(-1, x.shape[-1]),
        gate.reshape(-1, gate.shape[-1]),
        pack(w_down, w_up, b_down, b_up, x.dtype),
        found,
        activation,
        x.new_empty(*x.shape[:-1], w_up.shape[-1]).view(-1, w_up.shape[-1]),
        None if base is None else base.reshape(-1, w_up.shape[-1]),
    )
    given = (x, gate, w_down, w_up, b_down, b_up, base)
    taken = (walk.x, walk.gate, walk.first, walk.second, walk.b_down, walk.b_up, walk.base)
    for a, b in zip(given, taken, strict=True):
        if a is not None and a.data_ptr() != b.data_ptr():
            return None  # a copy in another order or dtype is made at every call
    return kernels.forward_call(walk, x.shape[:-1])
