# SPDX-License-Identifier: Apache-2.0
"""`impl="triton"` on flat tensors: which kernels run with which sizes.

Called by `pemt_fast/ops/triton_backend.py`. From here: `configs.py` chooses, `plans.py` launches
`fused.py` or `pair.py` (both products, on the helpers of `units.py` and `tiles.py`). The gradients
of the weights are in `weight_gradients.py`. Tokens are never looked at on the host, so calls can be
captured in a graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pemt_fast.kernels.configs import choose, choose_pair, device_facts
from pemt_fast.kernels.plans import Plan, plan_with
from pemt_fast.kernels.walk import Walk, precision_of

# Form of a walk -> what runs walks of this form. Bounded: every T has an entry.
PLANS: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 2048


def _form(walk: Walk) -> tuple[Any, ...]:
    """All that the launches of a walk depend on but the addresses."""
    x, base = walk.x, walk.base
    return (
        x.shape, x.stride(0), x.dtype, x.device, walk.ranks, walk.activation, walk.backward,
        walk.gate.shape[0], walk.gate.dtype, walk.first.stride(0),
        walk.second.shape[1], walk.second.stride(0),
        None if base is None else (base.dtype, base.stride(0)),
        tuple(tensor is None for tensor in walk), walk.needs_gate, precision_of(x.dtype),
    )  # fmt: skip


def plan_of(walk: Walk) -> Plan:
    """What runs walks of this form; it reads no more of one than the addresses of its tensors."""
    form = _form(walk)
    plan = PLANS.get(form)
    if plan is None:
        if len(PLANS) >= _MOST_PLANS:
            PLANS.clear()
        plan = PLANS[form] = _plan(walk)
    return plan


def run(walk: Walk) -> Tensor | None:
    """Launch the kernels of a walk; returns `d_gate [G, E]` in the gate's dtype if it is needed."""
    return plan_of(walk)(walk)


def _plan(walk: Walk) -> Plan:
    kind, _ = device_facts(walk.x.device)
    T, N = walk.x.shape[0], walk.first.shape[0]
    pick = choose if walk.out is not None else choose_pair
    return plan_with(walk, pick(kind, walk.x.element_size(), walk.backward, N, T))
