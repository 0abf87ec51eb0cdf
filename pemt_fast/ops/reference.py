# SPDX-License-Identifier: Apache-2.0
"""The specification of `adapter_mixture`: a loop over the adapters in plain PyTorch.

Any device, any float dtype, float64 included, differentiated by autograd. Nobody optimises this
file; when a kernel and this file disagree, the kernel is wrong. Names carry their shape (`y_TH`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def adapter_mixture_reference(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    base: Tensor | None,
    ranks: Sequence[int],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`out[t] = base[t] + Σ_e gate[t, e]·(act(x[t]·w_down[e]ᵀ + b_down[e])·w_up[e] + b_up[e])`.

    Computed in float64 for float64 inputs, else in float32, rounded once to `x.dtype`. An adapter
    whose gate is exactly 0 adds nothing, even if its weights or its output are not finite.

    Returns:
        `out [..., H]` and the ungated hidden units `[..., N]`, both in `x.dtype`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    lead, e_count, h = x.shape[:-1], len(ranks), w_up.shape[-1]
    x_TD = x.reshape(-1, x.shape[-1]).to(dtype)
    tokens = x_TD.shape[0]
    gate_TE = gate.reshape(*gate.shape[:-1], *([1] * (x.dim() - gate.dim())), e_count)
    gate_TE = gate_TE.expand(*lead, e_count).reshape(tokens, e_count).to(dtype)
    down_ND, up_NH = w_down.reshape(-1, x.shape[-1]), w_up.reshape(-1, h)
    bias_N = None if b_down is None else b_down.reshape(-1).to(dtype)

    out_TH = x_TD.new_zeros(tokens, h) if base is None else base.reshape(tokens, h).to(dtype)
    hidden, start = [], 0
    for e, rank in enumerate(ranks):
        rows = slice(start, start + rank)
        start += rank
        w_down_RD, w_up_RH = down_ND[rows].to(dtype), up_NH[rows].to(dtype)
        b_down_R = None if bias_N is None else bias_N[rows]
        b_up_H = None if b_up is None else b_up[e].to(dtype)
        gate_T1 = gate_TE[:, e : e + 1]
        h_TR, y_TH = _adapter(x_TD, w_down_RD, w_up_RH, b_down_R, b_up_H, activation)
        if not _all_finite(w_down_RD, w_up_RH, b_down_R, b_up_H, h_TR, y_TH):
            # Zero times NaN is NaN, in the gradient too: only tokens that use this adapter meet it.
            used = gate_T1.squeeze(1).nonzero().squeeze(1)
            h_uR, y_uH = _adapter(x_TD[used], w_down_RD, w_up_RH, b_down_R, b_up_H, activation)
            h_TR = x_TD.new_zeros(tokens, rank).index_add(0, used, h_uR)
            y_TH = x_TD.new_zeros(tokens, h).index_add(0, used, y_uH)
        hidden.append(h_TR)
        out_TH = out_TH + gate_T1 * y_TH
    hidden_TN = torch.cat(hidden, dim=-1)
    return (
        out_TH.to(x.dtype).reshape(*lead, h),
        hidden_TN.to(x.dtype).reshape(*lead, hidden_TN.shape[-1]),
    )


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x·weightᵀ + bias` in float64 for float64 inputs, else in float32, not rounded: a base."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _adapter(
    x_TD: Tensor,
    w_down_RD: Tensor,
    w_up_RH: Tensor,
    b_down_R: Tensor | None,
    b_up_H: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """One adapter: its hidden units and its output."""
    z_TR = x_TD @ w_down_RD.T
    if b_down_R is not None:
        z_TR = z_TR + b_down_R
    h_TR = ACTIVATION_FUNCTIONS[activation](z_TR)
    y_TH = h_TR @ w_up_RH
    return h_TR, y_TH if b_up_H is None else y_TH + b_up_H


def _all_finite(*tensors: Tensor | None) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)
