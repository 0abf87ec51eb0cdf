# SPDX-License-Identifier: Apache-2.0
"""PEMT's tail without gradients: a mixture of adapters, then one adapter of its output.

With `impl="cuda"` and few tokens both are one launch (`cuda_door.py`), also within a compiled
graph; else they are two calls of `adapter_mixture`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops import cuda_door
from pemt_fast.ops.adapter_mixture import adapter_mixture
from pemt_fast.ops.autocast import autocast_dtype
from pemt_fast.ops.cuda_door import Target
from pemt_fast.ops.validation import check_adapter_mixture

_LIBRARY = torch.library.Library("pemt_fast", "FRAGMENT")
_LIBRARY.define(
    "mixture_with_target(Tensor x, Tensor gate, Tensor w_down, Tensor w_up, Tensor? b_down, "
    "Tensor? b_up, Tensor? base, str activation, int[] ranks, Tensor down, Tensor up, "
    "Tensor? target_b_down, Tensor? target_b_up, str target_activation, float scale) -> Tensor"
)


def mixture_with_target(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    *,
    activation: str,
    base: Tensor | None,
    target: Target,
    impl: str = "auto",
    ranks: Sequence[int],
) -> Tensor:
    """`out = y + scale·(act(y·downᵀ + b_down)·upᵀ + b_up)` with `y = adapter_mixture(x, …)`.

    Arguments, dtypes, zero gates and errors as in `adapter_mixture`, with packed weights; between
    the two `y` is rounded to its dtype in every implementation. Gradients are not available: ask
    `cuda_door.takes_target` first, else call the two one by one.

    Args:
        x: `[..., D]`.
        gate: `[E]`, `[B, E]` or `[B, S, E]`.
        w_down: `[N, D]`.
        w_up: `[N, H]`.
        b_down: `[N]`; None for none.
        b_up: `[E, H]`; None for none.
        activation: Of the mixture.
        base: `[..., H]`; None for none.
        target: The adapter: `down [R, H]`, `up [H, R]`, `b_down [R]`, `b_up [H]`, its activation
            and scale.
        impl: As in `adapter_mixture`.
        ranks: One rank per adapter of the mixture.

    Returns:
        `[..., H]` in `x.dtype`, contiguous.
    """
    tensors = (x, gate, w_down, w_up, b_down, b_up, base)
    if not torch.compiler.is_compiling():
        out = cuda_door.door(*tensors, activation, impl, tuple(ranks), target)
        if out is not None:
            return out
    if autocast_dtype(x.device.type) is None and cuda_door.takes_target(impl, x):
        check_adapter_mixture(*tensors, activation, ranks)
        return torch.ops.pemt_fast.mixture_with_target(*tensors, activation, tuple(ranks), *target)
    return _one_by_one(*tensors, activation, ranks, target=target, impl=impl)


def _one_by_one(*mixture: Any, target: Target, impl: str) -> Tensor:
    *tensors, base, activation, ranks = mixture
    y = adapter_mixture(*tensors, activation=activation, base=base, impl=impl, ranks=ranks)
    dtype = torch.promote_types(y.dtype, torch.float32)
    return adapter_mixture(
        y,
        torch.full((1,), target.scale, dtype=dtype, device=y.device),
        target.down.unsqueeze(0),
        target.up.t().unsqueeze(0),
        None if target.b_down is None else target.b_down.unsqueeze(0),
        None if target.b_up is None else target.b_up.unsqueeze(0),
        activation=target.activation, base=y, impl=impl,
    )  # fmt: skip


def _forward(*args: Any) -> Tensor:
    mixture, target = args[:9], Target(*args[9:])
    with torch.no_grad():
        out = cuda_door.launch(*mixture, target=target)
        return _one_by_one(*mixture, target=target, impl="cuda") if out is None else out


def _fake(*args: Any) -> Tensor:
    x, w_up = args[0], args[3]
    return x.new_empty(*x.shape[:-1], w_up.shape[-1])


_LIBRARY.impl("mixture_with_target", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("pemt_fast::mixture_with_target", _fake, lib=_LIBRARY)
