// SPDX-License-Identifier: Apache-2.0
//
// What one block of the decode kernel does, and which instance a call takes. Included after
// `device.cuh`, or after its emulation in tests/helpers/cuda.
#pragma once

#include <type_traits>

#include "decode_products.h"

namespace pemt_fast::cuda {

template <class T, int kTokens, bool kAligned>
DEVICE void decode_block(const Decode& call, const DecodePlan& plan, char* shared) {
  DecodeBlock<T> b(call, plan, shared);
  if (plan.cluster > 1) sync_cluster();  // no block may write into one that has not begun
  b.look_at_gates();
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
    } else {
      up_products<T, kTokens, kAligned>(b, first);
    }
    sync_block();
    b.finish_pass(first);
    sync_block();
  }
  if (plan.slices > 1) b.add_slices();
}

// Calls `use` with the number of tokens and the alignment of the instance for a call, as types.
template <class T, class Use>
auto with_instance(const Decode& call, const DecodePlan& plan, Use use) {
  const auto with_tokens = [&](auto aligned) {
    switch (plan.tokens) {
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
