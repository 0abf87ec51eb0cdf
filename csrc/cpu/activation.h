// SPDX-License-Identifier: Apache-2.0
//
// The activations and their derivatives, float32, within a few rounding steps of the exact value.
// Backward starts from z (gelu, silu) or from act(z) (identity, relu), as `ops/stacked.py` does.
// The polynomials are our own weighted least-squares fits; their errors stand beside them.
#pragma once

static inline vf exponential(vf x) {
  x = x > 88.f ? splat(88.f) : x;
  x = x < -87.f ? splat(-87.f) : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the last bits.
  const vf shifted = x * 1.44269504f + 12582912.f;
  const vf steps = shifted - 12582912.f;
  const vf r = (x - steps * 0.693145752f) - steps * 1.42860677e-6f;
  // exp(r) on [-ln(2) / 2, ln(2) / 2], relative error 1.9e-9.
  vf p = splat(0.0013836831481849818f);
  p = p * r + 0.008374824034398381f;
  p = p * r + 0.041668226265311956f;
  p = p * r + 0.16666420072361626f;
  p = p * r + 0.4999999207475132f;
  p = p * r + 1.0000000363446435f;
  p = p * r + 1.f;
  const vu scale = ((vu)shifted - 0x4b400000u + 127u) << 23;
  return p * (vf)scale;
}

static inline vf sigmoid(vf x) { return 1.f / (1.f + exponential(-x)); }

// The same, and 1 - sigmoid(x) without the cancellation.
static inline vf sigmoid(vf x, vf& complement) {
  const vf e = exponential(-x);
  const vf s = 1.f / (1.f + e);
  complement = e * s;
  return s;
}

// Phi(z), the normal distribution function, and exp(-z^2 / 2).
static inline vf normal_distribution(vf z, vf& density) {
  const vf t = z * 0.70710678118654752f;
  const vf squared = t * t;
  density = exponential(-squared);
  // erf(t) / t on |t| <= 1 in t^2, relative error 1.2e-9.
  vf p = splat(7.853859250055861e-05f);
  p = p * squared - 0.0008010192988234217f;
  p = p * squared + 0.0051883276132111775f;
  p = p * squared - 0.026853811897099816f;
  p = p * squared + 0.11283585147699737f;
  p = p * squared - 0.37612625824152346f;
  p = p * squared + 1.1283791657266986f;
  const vf centre = 0.5f + 0.5f * t * p;
  // erfc(t) * exp(t^2) for t >= 0 in u = 1 / (1 + t / 2), relative error 3.2e-8.
  const vf magnitude = t < 0.f ? -t : t;
  const vf u = 1.f / (1.f + 0.5f * magnitude);
  vf q = splat(-0.05505166650366002f);
  q = q * u + 0.26390499639512344f;
  q = q * u - 0.44148181467699815f;
  q = q * u + 0.22119609218442848f;
  q = q * u + 0.017073792009378537f;
  q = q * u + 0.18125174533008587f;
  q = q * u + 0.24979293205435463f;
  q = q * u + 0.2810985357665512f;
  q = q * u + 0.28222136591721964f;
  q = q * u - 6.010835430336758e-06f;
  const vf tail = 0.5f * density * q;
  return squared <= 1.f ? centre : (t > 0.f ? 1.f - tail : tail);
}

// The argument of tanh in gelu_tanh, times 2: 0.5 * (1 + tanh(v / 2)) is sigmoid(v).
static inline vf tanh_argument(vf z) {
  return z * (1.5957691216057308f + 0.07135481627159656f * z * z);
}

template <Activation A>
static inline vf activate(vf z) {
  if constexpr (A == Activation::relu) return z < 0.f ? vf{} : z;
  if constexpr (A == Activation::silu) return z * sigmoid(z);
  if constexpr (A == Activation::gelu_tanh) return z * sigmoid(tanh_argument(z));
  if constexpr (A == Activation::gelu) {
    vf density;
    return z * normal_distribution(z, density);
  }
  return z;
}

// act(z) and act'(z) from what forward saved.
template <Activation A>
static inline vf derivative(vf saved, vf& activated) {
  activated = saved;
  if constexpr (A == Activation::relu) return saved <= 0.f ? vf{} : splat(1.f);
  if constexpr (A == Activation::silu) {
    vf complement;
    const vf s = sigmoid(saved, complement);
    activated = saved * s;
    return s * (1.f + saved * complement);
  }
  if constexpr (A == Activation::gelu_tanh) {
    vf complement;
    const vf s = sigmoid(tanh_argument(saved), complement);
    activated = saved * s;
    const vf slope = 1.5957691216057308f + 0.21406444881478967f * saved * saved;
    return s * (1.f + saved * complement * slope);
  }
  if constexpr (A == Activation::gelu) {
    vf density;
    const vf below = normal_distribution(saved, density);
    activated = saved * below;
    return below + saved * density * 0.3989422804014327f;
  }
  return splat(1.f);
}

constexpr bool keeps_pre_activation(Activation a) {
  return a != Activation::identity && a != Activation::relu;
}
