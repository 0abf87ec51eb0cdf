# SPDX-License-Identifier: Apache-2.0
"""The way of a call with few tokens and without gradients to the decode kernel, in one launch.

`csrc/bindings.cpp` checks the arguments, `csrc/decode_mixture.cpp` allocates and launches. What is
not for this kernel (more than 64 tokens, gradients, tensors that it cannot read as they lie) takes
the longer way, to `cuda_backend.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pemt_fast.ops import extension
from pemt_fast.ops.dispatch import AUTO_TABLE, auto_impl, resolve_impl, unavailable_reasons
from pemt_fast.ops.gated_units import Weights
from pemt_fast.ops.watchers import nobody_watches

MOST_TOKENS = 64

_module = extension.load()


class Target(NamedTuple):
    """An adapter `y + scale·(act(y·downᵀ + b_down)·upᵀ + b_up)` in the layout of `nn.Linear`."""

    down: Tensor  # [R, H]
    up: Tensor  # [H, R]
    b_down: Tensor | None
    b_up: Tensor | None
    activation: str
    scale: float


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
    target: Target | None = None,
) -> Tensor | None:
    """The output of an eager call; None if it is not for this kernel, or breaks a rule."""
    if _module is None or not _means_cuda(impl, x):
        return None
    behind = () if target is None else target[:4]
    if not nobody_watches(x, gate, w_down, w_up, b_down, b_up, base, *behind):
        return None
    mixture = (x, gate, w_down, w_up, b_down, b_up, base, activation, ranks)
    return launch(*mixture, target=target)


def launch(*mixture: Any, target: Target | None = None) -> Tensor | None:
    """The output, whoever watches; None if the call is not for this kernel, or breaks a rule.

    The arguments are those of `door` without `impl`, in its order.
    """
    *given, ranks = mixture
    x = given[0]
    stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
    behind = () if target is None else target
    assert _module is not None
    return _module.decode_mixture(*given, None if ranks is None else tuple(ranks), stream, *behind)


def _means_cuda(impl: str, x: Tensor) -> bool:
    if not isinstance(x, Tensor):
        return False
    if impl == "auto":
        impl = os.environ.get("PEMT_FAST_IMPL") or "auto"
    if impl == "auto":
        in_table = AUTO_TABLE.get(x.device.type) == "cuda"
        return in_table and auto_impl(x.device, x.dtype) == "cuda"
    return impl == "cuda" and can_run(x.device, x.dtype)


@functools.lru_cache(maxsize=64)
def can_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `impl="cuda"` runs there."""
    return not unavailable_reasons("cuda", device, dtype)


def takes_target(impl: str, x: Tensor) -> bool:
    """Whether `mixture_with_target` may be one launch for calls with this `impl`."""
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return resolve_impl(impl, x.device, x.dtype) == "cuda"
    return _means_cuda(impl, x)


def decode(
    x: Tensor,
    gate: Tensor,
    weights: Weights,
    base: Tensor | None,
    ranks: tuple[int, ...],
    activation: str,
) -> Tensor | None:
    """The output `[T, H]` for flat tensors; None if the kernel cannot read one as it lies."""
    if gate.dtype == torch.float64:
        gate = gate.float()
    if base is not None and base.dtype == torch.float64:
        base = base.float()
    # As the contract has it: the sizes of the gate are the first ones of x.
    groups = max(gate.shape[0], 1)
    with torch.no_grad():
        out = launch(
            x.unflatten(0, (groups, -1)), gate, weights.w_down, weights.w_up, weights.b_down,
            weights.b_up, None if base is None else base.unflatten(0, (groups, -1)),
            activation, ranks,
        )  # fmt: skip
    return None if out is None else out.view(-1, out.shape[-1])
