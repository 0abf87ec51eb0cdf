# SPDX-License-Identifier: Apache-2.0
"""`impl="cpu"`: the C++ kernels of `csrc/`, as `torch.ops.pemt_fast.adapter_mixture_native`.

The extension registers the operator, its CPU kernels and its gradients; here it learns what its
results look like, for `torch.compile` and export. An eager call takes a door of its own, which
checks the arguments in C++ and costs a fraction of the way through `torch.ops`. From here:
`csrc/bindings.cpp` (the door), `csrc/adapter_mixture.cpp` (what is kept for backward),
`csrc/adapter_mixture_cpu.cpp` (packing and allocation), `csrc/cpu/` (the kernels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops import extension, fakes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_module = extension.load()


def _closed(*args: Any) -> None:
    return None


# (x, gate, w_down, w_up, b_down, b_up, base, activation, ranks, recompute, with_hidden), then for
# linear_mixture (weight, bias) -> the output, with `with_hidden` also the hidden units; None if the
# arguments are not for these kernels or break a rule, which is then for `validation.py` to say.
door: Callable[..., Any] = _closed if _module is None else _module.adapter_mixture


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, hidden, _ = fakes.forward(args[0], args[3], args[7], with_hidden=args[10], save=False)
    return out, hidden


def _forward_saved(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fakes.forward(args[0], args[3], args[7], with_hidden=args[10], save=args[11])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return fakes.backward(args[0], args[1], args[3:8], args[11])


if _module is not None:
    torch.library.register_fake("pemt_fast::adapter_mixture_native", _forward)
    torch.library.register_fake("pemt_fast::adapter_mixture_native_forward", _forward_saved)
    torch.library.register_fake("pemt_fast::adapter_mixture_native_backward", _backward)


def adapter_mixture(*args: Any) -> tuple[Tensor, Tensor]:
    """The operator itself, for callers that trace; arguments in the order of its schema."""
    return torch.ops.pemt_fast.adapter_mixture_native(*args)
