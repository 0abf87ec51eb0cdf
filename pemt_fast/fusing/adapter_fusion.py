# SPDX-License-Identifier: Apache-2.0
"""AdapterFusion's attention over adapters, without the outputs of single adapters.

With `u_e = s_e·(a_e·W_up[e] + b_up[e])`, `a_e = act(x·W_down[e]ᵀ + b_down[e])`, a layer of Pfeiffer
et al. (2021) computes `Σ_e p_e·V·u_e`, `p = softmax_e((Q·y + b_q)·(K·u_e + b_k) / t)`: keys and
values of every adapter, `[T, E, H]` times `[H, H]`. The same is, exactly,

    c = Kᵀ·(Q·y + b_q)                    one vector per token instead of E keys
    score_e = s_e·(a_e·(W_up[e]·c) + b_up[e]·c) + (Q·y + b_q)·b_k
    Σ_e p_e·V·u_e = V·Σ_e p_e·u_e         a mixture with the gate p, then one matmul

so that nothing of size [T, E, H] exists. The last term of the score is the same for all e and
changes no p; it is kept so that b_k has its gradient, which is rounding noise there too.

T tokens, E adapters, H width, N = ΣR total bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pemt_fast.ops.gated_units import scale_units, sum_units


def attend(
    fusion: Any,
    query: Tensor,
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    scales: Tensor,
    ranks: Sequence[int],
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """`Σ_e p_e·u_e`, before the value projection; one step of the temperature, as there.

    Args:
        fusion: A `BertFusion` that does not drop out.
        query: y `[..., H]`.
        x: `[..., H]`, what the adapters read.
        w_down: `[N, H]`.
        b_down: `[N]`.
        w_up: `[N, H]`.
        b_up: `[E, H]`.
        scales: s `[E]`.
        ranks: One per adapter.
        activation: act.

    Returns:
        `[..., H]` in the dtype of the matmuls.
    """
    units = activation(F.linear(x.flatten(0, -2), w_down, b_down))  # [T, N]
    asked = query.flatten(0, -2)
    if fusion.config["query"]:
        asked = fusion.query(asked)
    keyed = asked.mm(fusion.key.weight) if fusion.config["key"] else asked  # c [T, H]
    tokens, sizes = units.shape[0], tuple(ranks)
    scores = sum_units(units * keyed.mm(w_up.t()), tokens, sizes) + keyed.mm(b_up.t())
    scores = scores * scales
    if fusion.config["key"]:
        scores = scores + F.linear(asked, fusion.key.bias.unsqueeze(0))
    gate = torch.softmax(scores / fusion.T, -1)  # [T, E]
    fusion.T = max(fusion.T - fusion.reduction, 1.0)
    gate = gate * scales
    mixed = scale_units(units, gate, sizes).mm(w_up) + gate.to(units.dtype).mm(b_up)
    return mixed.unflatten(0, x.shape[:-1])
