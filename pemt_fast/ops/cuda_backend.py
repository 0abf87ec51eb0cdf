# SPDX-License-Identifier: Apache-2.0
"""`impl="cuda"`: CUDA C++ for few tokens without gradients, the Triton kernels for all else.

Generation is bound by launches: a call of up to 64 tokens is one (`cuda_door.py`). Every other call
is that of `triton_backend.py`, with the same contract: more tokens, gradients, hidden units,
tensors that the kernel cannot read as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pemt_fast.ops import triton_backend
from pemt_fast.ops.cuda_door import MOST_TOKENS, decode
from pemt_fast.ops.gated_units import Weights

backward = triton_backend.backward


def forward(
    x: Tensor,
    gate: Tensor,
    weights: Weights,
    base: Tensor | None,
    ranks: tuple[int, ...],
    activation: str,
    save: bool,
    with_hidden: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As in `stacked.py`."""
    if 0 < x.shape[0] <= MOST_TOKENS and not save and not with_hidden:
        if weights.weight is not None:
            base = torch.nn.functional.linear(x, weights.weight, weights.bias)
            weights = weights._replace(weight=None, bias=None)
        out = decode(x, gate, weights, base, ranks, activation)
        if out is not None:
            return out, None, None
    return triton_backend.forward(x, gate, weights, base, ranks, activation, save, with_hidden)
