// SPDX-License-Identifier: Apache-2.0
//
// Weights and gates as the products want them.
#include <algorithm>
#include <cstring>

#include "plan.h"
#include "threads.h"

namespace pemt_fast::cpu {

void split_gate(const float* gate, int64_t adapters, bool bf16, void* out) {
  if (!bf16) {
    std::memcpy(out, gate, size_t(adapters) * sizeof(float));
    return;
  }
  // Each as the sum of two bfloat16: the upper half of its bits, and what is left.
  uint16_t* parts = (uint16_t*)out;
  for (int64_t e = 0; e < adapters; e++) {
    uint32_t bits, rest_bits;
    std::memcpy(&bits, gate + e, sizeof bits);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    const uint32_t upper_bits = bits & 0xffff0000u;
    float upper;
    std::memcpy(&upper, &upper_bits, sizeof upper);
    const float rest = finite ? gate[e] - upper : 0.f;
    std::memcpy(&rest_bits, &rest, sizeof rest_bits);
    // NaN keeps a bit of its mantissa among the upper ones.
    parts[e] = uint16_t(upper_bits >> 16 | (gate[e] != gate[e] ? 0x40 : 0));
    parts[adapters + e] = uint16_t((rest_bits + 0x7fff + (rest_bits >> 16 & 1)) >> 16);
  }
}

int64_t packed_bytes(const Kernels& kernels, int64_t units, int64_t width, bool sums_over_width,
                     bool bf16) {
  const int64_t panel = bf16 ? kernels.panel_bf16 : kPanel;
  const int64_t columns = round_up(sums_over_width ? units : width, panel);
  const int64_t sums = sums_over_width ? width : units;
  return bf16 ? columns * round_up(sums, 2) * 2 : columns * sums * 4;
}

void pack(const Kernels& kernels, const void* weight, int64_t row, int64_t units, int64_t width,
          bool sums_over_width, bool bf16, void* panels, int threads) {
  const int64_t panel = bf16 ? kernels.panel_bf16 : kPanel;
  const int64_t n = sums_over_width ? units : width, k = sums_over_width ? width : units;
  const int64_t size = bf16 ? round_up(k, 2) * panel : k * panel;
  Tasks tasks(ceil_div(n, kPanel));
  const int team = units * width > (1 << 15) ? threads : 1;
  parallel(team, [&](int) {
    for (int64_t i; tasks.next(i);) {
      const int64_t column = i * kPanel, inside = column % panel;
      const int64_t at = column / panel * size;
      if (bf16) {
        const auto pack_columns =
            sums_over_width ? kernels.pack_transposed_bf16 : kernels.pack_bf16;
        pack_columns((const uint16_t*)weight, row, n, k, column,
                     (uint16_t*)panels + at + 2 * inside, 2 * panel);
      } else {
        const auto pack_columns = sums_over_width ? kernels.pack_transposed_f32 : kernels.pack_f32;
        pack_columns((const float*)weight, row, n, k, column, (float*)panels + at + inside, panel);
      }
    }
  });
}

void clear_if_not_finite(const void* weight, Dtype dtype, int64_t row, int64_t width,
                         const int32_t* adapter_of_unit, int64_t units, bool* finite) {
  for (int64_t unit = 0; unit < units; unit++) {
    bool bad = false;
    if (dtype == Dtype::f32) {
      const uint32_t* at = (const uint32_t*)weight + unit * row;
      for (int64_t i = 0; i < width; i++) bad |= (at[i] & 0x7f800000u) == 0x7f800000u;
    } else {
      const uint16_t mask = dtype == Dtype::bf16 ? 0x7f80 : 0x7c00;
      const uint16_t* at = (const uint16_t*)weight + unit * row;
      for (int64_t i = 0; i < width; i++) bad |= (at[i] & mask) == mask;
    }
    if (bad) finite[adapter_of_unit[unit]] = false;
  }
}

}  // namespace pemt_fast::cpu
