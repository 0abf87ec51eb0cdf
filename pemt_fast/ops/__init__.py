# SPDX-License-Identifier: Apache-2.0
"""Operators: `adapter_mixture` (the fused mixture), `linear_mixture` and `task_sparsity_loss`.

Start with `adapter_mixture.py`.
"""

from pemt_fast.ops.adapter_mixture import adapter_mixture, adapter_mixture_with_hidden
from pemt_fast.ops.linear_mixture import linear_mixture
from pemt_fast.ops.sparsity_loss import task_sparsity_loss

__all__ = [
    "adapter_mixture",
    "adapter_mixture_with_hidden",
    "linear_mixture",
    "task_sparsity_loss",
]
