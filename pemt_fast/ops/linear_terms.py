# SPDX-License-Identifier: Apache-2.0
"""What the operators with a linear inside share: its own gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pemt_fast.ops.autocast import without_autocast
from pemt_fast.ops.gated_units import gate_dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Below autograd no operator may return its input, as `to` does."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def linear_gradients(
    grad_out: Tensor, x: Tensor | None, dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `weight` and `bias`; a dtype of None for what is not asked for."""
    d_out = grad_out.reshape(-1, grad_out.shape[-1])
    d_weight = d_bias = None
    with without_autocast(d_out.device.type):
        if dtypes[0] is not None and x is not None:
            d_weight = cast(torch.mm(d_out.t(), x.reshape(-1, x.shape[-1])), dtypes[0])
        if dtypes[1] is not None:
            d_bias = cast(d_out.sum(0, dtype=gate_dtype(d_out.dtype)), dtypes[1])
    return d_weight, d_bias
