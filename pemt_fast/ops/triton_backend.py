# SPDX-License-Identifier: Apache-2.0
"""`impl="triton"`: the pair `forward` / `backward` on the kernels of `kernels/`.

Contract and arguments: `stacked.py`. Here tensors get the form the kernels expect and gradients
are collected; which kernel runs is decided in `kernels/adapter_mixture.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pemt_fast.kernels.adapter_mixture import plan_of, run
from pemt_fast.kernels.walk import Walk
from pemt_fast.kernels.weight_gradients import weight_gradients
from pemt_fast.ops.gated_units import Weights
from pemt_fast.ops.stacked import Gradients, up_bias_gradient


def _rows(tensor: Tensor) -> Tensor:
    """Dense along the last dimension; any stride, also 0, along the first."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """A block in which launches go to this device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _gate(gate: Tensor) -> Tensor:
    """Dense, in a dtype of the kernels."""
    return (gate.float() if gate.dtype == torch.float64 else gate).contiguous()


def forward_walk(
    x: Tensor,
    gate: Tensor,
    weights: Weights,
    ranks: tuple[int, ...],
    activation: str,
    out: Tensor | None,
    base: Tensor | None = None,
    saved: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Walk:
    """The forward pass over flat tensors, in the form the kernels expect."""
    if base is not None:
        base = _rows(base.float() if base.dtype == torch.float64 else base)
    return Walk(
        x=_rows(x),
        gate=_gate(gate),
        first=_rows(weights.w_down),
        second=_rows(weights.w_up),
        ranks=ranks,
        activation=activation,
        backward=False,
        out=out,
        base=base,
        b_down=None if weights.b_down is None else weights.b_down.contiguous(),
        b_up=None if weights.b_up is None else weights.b_up.contiguous(),
        saved=saved,
        hidden=hidden,
    )


def forward_call(walk: Walk, lead: torch.Size) -> Callable[..., Tensor]:
    """What runs walks of this form; it returns the output `[*lead, H]`.

    Takes (x, gate, w_down, w_up, b_down, b_up, base) with the data of the walk, in any shape.
    """
    plan = plan_of(walk)
    shape, dtype, device = (*lead, walk.second.shape[1]), walk.x.dtype, walk.x.device
    ranks, activation = walk.ranks, walk.activation

    def call(
        x: Tensor,
        gate: Tensor,
        w_down: Tensor,
        w_up: Tensor,
        b_down: Tensor | None,
        b_up: Tensor | None,
        base: Tensor | None,
    ) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        plan(Walk(x, gate, w_down, w_up, ranks, activation, False, out, base, b_down, b_up))
        return out

    return call


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
    """Output `[T, H]`, hidden units when asked for, and what backward needs when `save`."""
    (T, _), (N, H) = x.shape, weights.w_up.shape
    out = x.new_empty(T, H)
    saved = x.new_empty(T, N) if save else None
    hidden = x.new_empty(T, N) if with_hidden else None
    if weights.weight is not None:
        base = torch.nn.functional.linear(x, weights.weight, weights.bias)
    if T > 0:
        with _current(x.device):
            run(forward_walk(x, gate, weights, ranks, activation, out, base, saved, hidden))
    return out, hidden, saved


def backward(
    grad_out: Tensor,
    grad_hidden: Tensor | None,
    x: Tensor | None,
    gate: Tensor,
    weights: Weights,
    saved: Tensor | None,
    ranks: tuple[int, ...],
    activation: str,
    needs: tuple[bool, ...],
) -> Gradients:
    """Only the gradients that `needs` names, in the order of `Gradients`."""
    with _current(grad_out.device):
        return _backward(grad_out, grad_hidden, x, gate, weights, saved, ranks, activation, needs)


def _backward(
    grad_out: Tensor,
    grad_hidden: Tensor | None,
    x: Tensor | None,
    gate: Tensor,
    weights: Weights,
    saved: Tensor | None,
    ranks: tuple[int, ...],
    activation: str,
    needs: tuple[bool, ...],
) -> Gradients:
    needs_x, needs_gate, needs_w_down, needs_w_up, needs_b_down, needs_b_up = needs
    (T, _), (N, D) = grad_out.shape, weights.w_down.shape
    if T == 0:
        return _of_no_tokens(grad_out, gate, weights, needs)
    if saved is None and any(needs[:5]):
        assert x is not None
        saved = grad_out.new_empty(T, N)
        run(forward_walk(x, gate, weights, ranks, activation, None, saved=saved))

    def units_if(needed: bool) -> Tensor | None:
        return grad_out.new_empty(T, N) if needed else None

    grad_out = _rows(grad_out)
    d_x = grad_out.new_empty(T, D) if needs_x else None
    d_z, gated = units_if(needs_w_down or needs_b_down), units_if(needs_w_up)
    d_gate = d_b_up = None
    if any(needs[:5]):
        d_gate = run(
            Walk(
                x=grad_out,
                gate=_gate(gate),
                first=_rows(weights.w_up),
                second=_rows(weights.w_down),
                ranks=ranks,
                activation=activation,
                backward=True,
                out=d_x,
                base=None if weights.weight is None or d_x is None else grad_out @ weights.weight,
                b_up=None if weights.b_up is None else weights.b_up.contiguous(),
                saved=None if saved is None else saved.contiguous(),
                hidden=None if grad_hidden is None else grad_hidden.contiguous(),
                d_z=d_z,
                gated=gated,
                needs_gate=needs_gate,
            )
        )
    d_w_down, d_w_up = weight_gradients(
        d_z if needs_w_down else None, None if x is None else _rows(x), gated, grad_out
    )
    if needs_b_up:
        d_b_up = up_bias_gradient(gate.float(), grad_out)
    d_b_down = d_z.sum(0, dtype=torch.float32) if needs_b_down and d_z is not None else None
    return Gradients(d_x, d_gate, d_w_down, d_w_up, d_b_down, d_b_up)


def _of_no_tokens(
    grad_out: Tensor, gate: Tensor, weights: Weights, needs: tuple[bool, ...]
) -> Gradients:
    (N, D), (_, H) = weights.w_down.shape, weights.w_up.shape
    shapes = ((0, D), gate.shape, (N, D), (N, H), (N,), (gate.shape[-1], H))
    return Gradients(
        *(grad_out.new_zeros(s) if need else None for s, need in zip(shapes, needs, strict=True))
    )
