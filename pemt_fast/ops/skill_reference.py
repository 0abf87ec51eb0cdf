# SPDX-License-Identifier: Apache-2.0
"""The specification of `skill_mixture`: the formula for every sequence, in plain PyTorch.

Any device, any float dtype, float64 included, differentiated by autograd. Nobody optimises this
file; when an implementation and this file disagree, the implementation is wrong. Names carry their
shape (`x_BSD`); T counts the rows of `mixing`, P the splits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pemt_fast.ops.reference import linear_reference


def skill_mixture_reference(
    x: Tensor,
    mixing: Tensor | None,
    a: Tensor,
    b: Tensor,
    task_ids: Tensor | None,
    base: Tensor | None,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`out = base + scale·(x·A_tᵀ)·B_t` with the factors `A_t`, `B_t` of each sequence's task.

    With `weight` the base is `x·weightᵀ + bias`. Computed in float64 for float64 inputs, else in
    float32, rounded once to `x.dtype`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight is not None:
        base = linear_reference(x, weight, bias)
    sequences, lead = x.shape[0], x.shape[:-1]
    if mixing is None:  # the factors of the tasks themselves
        mixing = torch.eye(a.shape[0], dtype=dtype, device=a.device)
    mixing_TPK = (mixing if mixing.dim() == 3 else mixing.unsqueeze(1)).to(dtype)
    a_PKRD = (a if a.dim() == 4 else a.unsqueeze(0)).to(dtype)
    b_PKRH = (b if b.dim() == 4 else b.unsqueeze(0)).to(dtype)
    if task_ids is not None:
        rows_BPK = mixing_TPK.index_select(0, task_ids)
    else:
        rows_BPK = mixing_TPK.expand(sequences, -1, -1)
    # Every split mixes its own columns of A_t and B_t.
    a_BRD = torch.einsum("bpk,pkrd->brpd", rows_BPK, a_PKRD).flatten(2)
    b_BRH = torch.einsum("bpk,pkrh->brph", rows_BPK, b_PKRH).flatten(2)
    x_BSD = x.to(dtype).flatten(1, -2) if x.dim() > 2 else x.to(dtype).unsqueeze(1)
    hidden_BSR = torch.einsum("bsd,brd->bsr", x_BSD, a_BRD)
    out_BSH = scale * torch.einsum("bsr,brh->bsh", hidden_BSR, b_BRH)
    out = out_BSH.reshape(*lead, b_BRH.shape[-1])
    return (out if base is None else base.to(dtype) + out).to(x.dtype)
