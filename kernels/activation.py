# SPDX-License-Identifier: Apache-2.0
"""Activations and their derivatives in float32, as functions other kernels call.

NaN passes through all of them. `saved` is what forward kept for backward: `act(z)` for the identity
and relu, `z` for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# gelu_tanh(z) = z·σ(2u) with u = √(2/π)·(z + 0.044715·z³).
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)
# Beyond it σ(2u) is 0 or 1 in float32; without the limit z² overflows and 0·inf is NaN.
_SATURATED = tl.constexpr(30.0)


@triton.jit
def _limited(z):
    return tl.where(z > _SATURATED, _SATURATED, tl.where(z < -_SATURATED, -_SATURATED, z))


@triton.jit
def _tanh_sigmoid(z):
    """`σ(2u)` of gelu_tanh; `z` is limited."""
    return tl.sigmoid((z + z * z * z * _CUBIC) * _TWO_SQRT_2_OVER_PI)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """`act(z)`."""
    h = z
    if ACTIVATION == "relu":
        h = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        h = z * _tanh_sigmoid(_limited(z))
    elif ACTIVATION == "silu":
        h = z * tl.sigmoid(z)
    return h


@triton.jit
def activate_saved(saved, ACTIVATION: tl.constexpr):
    """`act(z)` and `act'(z)` from what forward kept."""
    h = saved
    slope = tl.full(saved.shape, 1.0, tl.float32)
    if ACTIVATION == "relu":
        slope = tl.where(saved <= 0, 0.0, slope)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * _SQRT_HALF))
        h = saved * cdf
        slope = cdf + saved * _INV_SQRT_2PI * tl.exp(-0.5 * saved * saved)
    elif ACTIVATION == "gelu_tanh":
        z = _limited(saved)
        s = _tanh_sigmoid(z)
        h = saved * s
        slope = s + z * s * (1.0 - s) * _TWO_SQRT_2_OVER_PI * (1.0 + z * z * 3.0 * _CUBIC)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(saved)
        h = saved * s
        slope = s * (1.0 + saved * (1.0 - s))
    return h, slope
