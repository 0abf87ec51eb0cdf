// SPDX-License-Identifier: Apache-2.0
//
// Everything of one instruction set, in that instruction set's namespace. An isa_*.cpp defines
// PEMT_ISA and PEMT_ISA_LEVEL, switches the compiler's target, and includes this file once.
#pragma once

namespace pemt_fast::cpu::PEMT_ISA {
namespace {

#include "simd.h"
//
#include "activation.h"
#include "product.h"
#if PEMT_ISA_LEVEL >= 3
#include "product_bf16.h"
#endif
#include "pack.h"
#include "passes.h"
//
#include "loss_pass.h"

template <class S, class C>
void set_passes(Kernels& kernels, Dtype storage, bool bf16_products) {
  const auto set = [&](auto activation) {
    constexpr Activation A = decltype(activation)::value;
    kernels.forward[(int)storage][bf16_products][(int)A] = forward_pass<S, C, A>;
    kernels.backward[(int)storage][bf16_products][(int)A] = backward_pass<S, C, A>;
  };
  set(Constant<Activation::identity>{});
  set(Constant<Activation::relu>{});
  set(Constant<Activation::gelu>{});
  set(Constant<Activation::gelu_tanh>{});
  set(Constant<Activation::silu>{});
}

template <class S>
void set_storage(Kernels& kernels, Dtype storage) {
  const int s = (int)storage;
  kernels.rows_f32[s] = rows_f32<S>;
  kernels.dots_f32[s] = dots_f32<S>;
  kernels.to_f32[s] = to_f32<S>;
  kernels.from_f32[s] = from_f32<S>;
  kernels.output[s][(int)Dtype::f32] = output_pass<S, float>;
  kernels.output[s][s] = output_pass<S, S>;
  kernels.sparsity_loss[s] = loss_rows<S>;
  set_passes<S, float>(kernels, storage, false);
}

}  // namespace

Kernels make_kernels() {
  Kernels kernels{};
  kernels.name = PEMT_ISA_NAME;
  kernels.panel_bf16 = kPanel;
  kernels.rows_at_once = 24;  // 6 KiB of sums for 64 columns
  kernels.panels_f32 = multiply_f32<float>;
  kernels.pack_transposed_f32 = pack_transposed_f32;
  kernels.pack_f32 = pack_f32;
  kernels.pack_transposed_bf16 = pack_transposed_bf16;
  kernels.pack_bf16 = pack_bf16;
  kernels.release = [] {};
  set_storage<float>(kernels, Dtype::f32);
  set_storage<bf16>(kernels, Dtype::bf16);
  set_storage<f16>(kernels, Dtype::f16);
#if PEMT_ISA_LEVEL >= 3
  kernels.bf16 = true;
  kernels.panels_bf16 = multiply_bf16;
  kernels.rows_bf16 = rows_bf16;
  kernels.dots_bf16 = dots_bf16;
  set_passes<bf16, bf16>(kernels, Dtype::bf16, true);
#endif
  return kernels;
}

}  // namespace pemt_fast::cpu::PEMT_ISA
