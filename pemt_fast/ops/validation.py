# SPDX-License-Identifier: Apache-2.0
"""Shape, dtype and device rules of `adapter_mixture` and `linear_mixture`, checked at the door.

Every message names the argument, the letters and sizes expected, and what came. Past this file the
operator trusts its inputs. The letters are those of `adapter_mixture.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _require_dim(name: str, tensor: Tensor, letters: str, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} must be {letters}, got shape {list(tensor.shape)}")


def _require_shape(name: str, tensor: Tensor, letters: str, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must be {letters} = {list(expected)}, got {list(tensor.shape)}")


def _check_ranks(ranks: Sequence[int], n: int) -> tuple[int, ...]:
    ranks = tuple(int(r) for r in ranks)
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks must hold one positive rank per adapter, got {list(ranks)}")
    if sum(ranks) != n:
        raise ValueError(
            f"ranks must sum to N = {n}, the rows of the packed w_down, got {list(ranks)} "
            f"which sums to {sum(ranks)}"
        )
    return ranks


def _check_weights(
    w_down: Tensor, w_up: Tensor, ranks: Sequence[int] | None
) -> tuple[tuple[int, ...], int, int]:
    """Ranks per adapter, D and H of stacked `[E, R, ·]` or packed `[N, ·]` weights."""
    if ranks is None:
        _require_dim("w_down", w_down, "[E, R, D]", 3)
        _require_dim("w_up", w_up, "[E, R, H]", 3)
        e, r, d = w_down.shape
        if e < 1 or r < 1:
            raise ValueError(f"w_down needs E >= 1 and R >= 1, got {list(w_down.shape)}")
        h = w_up.shape[2]
        _require_shape("w_up", w_up, "[E, R, H]", (e, r, h))
        return (int(r),) * int(e), d, h
    _require_dim("w_down", w_down, "[N, D] when ranks are given", 2)
    _require_dim("w_up", w_up, "[N, H] when ranks are given", 2)
    n, d = w_down.shape
    h = w_up.shape[1]
    _require_shape("w_up", w_up, "[N, H]", (n, h))
    return _check_ranks(ranks, n), d, h


def _check_biases(
    b_down: Tensor | None, b_up: Tensor | None, ranks: tuple[int, ...], packed: bool, h: int
) -> None:
    if b_down is not None:
        _require_tensor("b_down", b_down)
        expected = (sum(ranks),) if packed else (len(ranks), ranks[0])
        _require_shape("b_down", b_down, "[N]" if packed else "[E, R]", expected)
    if b_up is not None:
        _require_tensor("b_up", b_up)
        _require_shape("b_up", b_up, "[E, H]", (len(ranks), h))


def _check_gate(gate: Tensor, lead: tuple[int, ...], e: int) -> None:
    """The gate's leading sizes must be a prefix of x's: one row per call, sequence or token."""
    prefix = tuple(gate.shape[:-1])
    fits = gate.dim() >= 1 and gate.shape[-1] == e and prefix == lead[: len(prefix)]
    if gate.dim() >= 1 and fits:
        return
    forms = " or ".join(
        f"{letters} = {[*lead[:k], e]}"
        for k, letters in enumerate(("[E]", "[B, E]", "[B, S, E]")[: len(lead) + 1])
    )
    raise ValueError(f"gate must be {forms}, got {list(gate.shape)}")


def _check_device_and_dtype(tensors: dict[str, Tensor | None], device: torch.device) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, the device of x, got {tensor.device}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )


def check_adapter_mixture(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    base: Tensor | None,
    activation: str,
    ranks: Sequence[int] | None,
) -> tuple[int, ...]:
    """Raise on the first broken rule; return the rank of every adapter."""
    for name, value in (("x", x), ("gate", gate), ("w_down", w_down), ("w_up", w_up)):
        _require_tensor(name, value)
    if x.dim() < 1:
        raise ValueError("x must be [..., D], got a scalar")
    rank_tuple, d, h = _check_weights(w_down, w_up, ranks)
    if x.shape[-1] != d:
        raise ValueError(
            f"x must be [..., D] with D = {d}, the width of w_down, got {list(x.shape)}"
        )
    _check_biases(b_down, b_up, rank_tuple, ranks is not None, h)
    lead = tuple(x.shape[:-1])
    _check_gate(gate, lead, len(rank_tuple))
    if base is not None:
        _require_tensor("base", base)
        _require_shape("base", base, "[..., H]", (*lead, h))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_device_and_dtype(
        {
            "x": x,
            "gate": gate,
            "w_down": w_down,
            "w_up": w_up,
            "b_down": b_down,
            "b_up": b_up,
            "base": base,
        },
        x.device,
    )
    return rank_tuple


def check_linear(x: Tensor, h: int, weight: Tensor, bias: Tensor | None) -> None:
    """The rules for a linear inside an operator; those of x and of H are checked by then."""
    d = x.shape[-1]
    _require_tensor("weight", weight)
    _require_shape("weight", weight, "[H, D]", (h, d))
    if bias is not None:
        _require_tensor("bias", bias)
        _require_shape("bias", bias, "[H]", (h,))
    _check_device_and_dtype({"weight": weight, "bias": bias}, x.device)


def tokens_per_gate_row(x: Tensor, gate: Tensor) -> int:
    """How many consecutive tokens of the flattened `x` share one row of the flattened gate."""
    return math.prod(x.shape[gate.dim() - 1 : -1])
