// SPDX-License-Identifier: Apache-2.0
//
// What one block of the decode kernel does, and which instance a call takes. Included after
// `device.cuh`, or after its emulation in tests/helpers/cuda.
#pragma once

#include <type_traits>

#include "decode_products.h"

namespace pemt_fast::cuda {

// Whether this block has a part in what follows.
template <class T, int kTokens, bool kAligned>
DEVICE bool run_stage(DecodeBlock<T>& b) {
  const DecodePlan& plan = b.plan;
  b.prepare();
  if constexpr (sizeof(T) == 4) {
    down_products_f32<kTokens>(b);
  } else {
    down_products<T, kTokens, kAligned>(b);
  }
  sync_block();
  b.share_hidden();
  for (int first = b.rank * plan.columns; first < b.end(); first += plan.pass) {
    if constexpr (sizeof(T) == 4) {
      up_products_f32<kTokens>(b, first);
    } else if (b.adapters.transposed) {
      up_products_transposed<T, kTokens, kAligned>(b, first);
    } else {
      up_products<T, kTokens, kAligned>(b, first);
    }
    sync_block();
    b.finish_pass(first);
    sync_block();
  }
  if (plan.slices == 1) return true;
  if (!b.comes_last()) return false;
  b.add_slices();
  return true;
}

template <class T, int kTokens, bool kAligned>
DEVICE void decode_block(const Decode& call, const DecodePlans& plans, char* shared) {
  if (plans.mixture.cluster > 1) sync_cluster();  // no block may write into one that has not begun
  const int stages = call.target.units > 0 ? 2 : 1;
  for (int stage = 0; stage < stages; stage++) {
    DecodeBlock<T> b(call, stage == 0 ? plans.mixture : plans.target, stage == 1, shared);
    if (!run_stage<T, kTokens, kAligned>(b)) return;
    // The target adapter reads what all blocks of the cluster have written.
    if (stage + 1 < stages) b.sync_all();
  }
}

// Calls `use` with the number of tokens and the alignment of the instance for a call, as types.
template <class T, class Use>
auto with_instance(const Decode& call, const DecodePlans& plans, Use use) {
  const auto with_tokens = [&](auto aligned) {
    switch (plans.mixture.tokens) {
      case 8:
        return use(std::integral_constant<int, 8>(), aligned);
      case 16:
        return use(std::integral_constant<int, 16>(), aligned);
      case 32:
        return use(std::integral_constant<int, 32>(), aligned);
      default:
        return use(std::integral_constant<int, 64>(), aligned);
    }
  };
  if constexpr (sizeof(T) == 4) {
    return with_tokens(std::true_type());
  } else {
    return is_aligned(call) ? with_tokens(std::true_type()) : with_tokens(std::false_type());
  }
}

}  // namespace pemt_fast::cuda
