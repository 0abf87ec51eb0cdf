# SPDX-License-Identifier: Apache-2.0
"""Time only what is right: each contender against the published form in float64.

The weights are the same in every dtype (`t5_models.py`). T5 computes its layer norms and softmax in
float32 whatever the dtype, so float64 is a reference to about 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Largest ‖found − reference‖ / ‖reference‖ over logits, losses and every gradient, in Euclidean
# norms. Measured: 4e-6 and 0.12, both in gate gradients of 24 + 24 layers. A wrong sign is 2, a
# part that is missing 1; that a small one is missing shows in float32.
BOUNDS = {"fp32": 1e-4, "bf16": 0.25}


def deviation(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference and the name of the tensor that has it."""
    assert found.keys() == reference.keys(), sorted(found.keys() ^ reference.keys())
    worst = (-1.0, "")
    for name, expected in reference.items():
        tensor = found[name]
        assert tensor.shape == expected.shape, f"{name} has shape {list(tensor.shape)}"
        assert bool(tensor.isfinite().all()), f"{name} is not finite"
        norm = float(expected.double().norm())
        error = float((tensor.double() - expected.double()).norm())
        worst = max(worst, (error / norm if norm else error, name))
    return worst


def check(found: Mapping[str, Tensor], reference: Mapping[str, Tensor], dtype: str) -> float:
    """The deviation; AssertionError if it exceeds the bound of the dtype."""
    error, name = deviation(found, reference)
    assert error <= BOUNDS[dtype], f"{name}: off by {error:.1e}, {BOUNDS[dtype]} allowed in {dtype}"
    return error


def check_tokens(found: Tensor, expected: Tensor) -> None:
    """AssertionError if the greedy tokens `[B, S]` differ. For float32: lower ones have ties."""
    different = found != expected if found.shape == expected.shape else torch.ones(1, 1)
    assert not bool(different.any()), (
        f"tokens: {int(different.any(-1).sum())} of {len(expected)} sequences differ"
    )
