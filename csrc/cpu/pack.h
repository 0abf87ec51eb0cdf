// SPDX-License-Identifier: Apache-2.0
//
// Packing of weights into panels of 16 columns (see Product in kernels.h), and conversions of whole
// arrays. Included once per isa_*.cpp. A column of `transposed` packing is a row of the weight.
#pragma once

// Transposes kLanes rows of kLanes units of 4 bytes: exchanges the off-diagonal halves, then those
// of the quarters, and so on.
static inline void transpose(vu* rows) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    vu first, second;
    for (int lane = 0; lane < kLanes; lane++) {
      first[lane] = (uint32_t)(lane & half ? kLanes + lane - half : lane);
      second[lane] = (uint32_t)(lane & half ? kLanes + lane : lane + half);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      if (i & half) continue;
      const vu low = rows[i], high = rows[i + half];
      rows[i] = __builtin_shuffle(low, high, first);
      rows[i + half] = __builtin_shuffle(low, high, second);
    }
  }
}

// Units of 4 bytes along k: a float32, or two bfloat16 (low half: even k, high half: odd k).
// `unit_at(column, i)` reads one where a whole vector of them cannot be read.
template <class T, class UnitAt>
static void pack_transposed_units(const T* source, int64_t row, int64_t columns, int64_t whole,
                                  int64_t units, uint32_t* panel, int64_t panel_row,
                                  const UnitAt& unit_at) {
  constexpr int64_t kPerUnit = 4 / (int64_t)sizeof(T);
  int64_t at = 0;
  for (; columns == kPanel && at + kLanes <= whole; at += kLanes) {
    for (int64_t column = 0; column < kPanel; column += kLanes) {
      vu rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        memcpy(&rows[i], source + (column + i) * row + at * kPerUnit, sizeof rows[i]);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        memcpy(panel + (at + i) * panel_row + column, &rows[i], sizeof rows[i]);
      }
    }
  }
  for (; at < units; at++) {
    for (int64_t column = 0; column < kPanel; column++) {
      panel[at * panel_row + column] = column < columns ? unit_at(source + column * row, at) : 0u;
    }
  }
}

static void pack_transposed_f32(const float* source, int64_t row, int64_t n, int64_t k,
                                int64_t first, float* panel, int64_t panel_row) {
  const int64_t columns = n - first < kPanel ? n - first : kPanel;
  pack_transposed_units(source + first * row, row, columns, k, k, (uint32_t*)panel, panel_row,
                        [](const float* from, int64_t i) {
                          uint32_t bits;
                          memcpy(&bits, from + i, sizeof bits);
                          return bits;
                        });
}

static void pack_transposed_bf16(const uint16_t* source, int64_t row, int64_t n, int64_t k,
                                 int64_t first, uint16_t* panel, int64_t panel_row) {
  const int64_t columns = n - first < kPanel ? n - first : kPanel;
  pack_transposed_units(source + first * row, row, columns, k / 2, (k + 1) / 2, (uint32_t*)panel,
                        panel_row / 2, [k](const uint16_t* from, int64_t i) {
                          const uint32_t odd = 2 * i + 1 < k ? from[2 * i + 1] : 0u;
                          return from[2 * i] | odd << 16;
                        });
}

static void pack_f32(const float* source, int64_t row, int64_t n, int64_t k, int64_t first,
                     float* panel, int64_t panel_row) {
  const int64_t columns = n - first < kPanel ? n - first : kPanel;
  for (int64_t i = 0; i < k; i++) {
    const float* from = source + i * row + first;
    for (int64_t v = 0; v < kPanelVectors; v++) {
      const int64_t left = columns - v * kLanes;
      store(panel + i * panel_row + v * kLanes,
            left > 0 ? load_upto(from + v * kLanes, left) : vf{});
    }
  }
}

static void pack_bf16(const uint16_t* source, int64_t row, int64_t n, int64_t k, int64_t first,
                      uint16_t* panel, int64_t panel_row) {
  const int64_t columns = n - first < kPanel ? n - first : kPanel;
  for (int64_t i = 0; i < (k + 1) / 2; i++) {
    const uint16_t* even = source + 2 * i * row + first;
    const uint16_t* odd = even + row;
    const bool both = 2 * i + 1 < k;
    uint16_t* to = panel + i * panel_row;
    for (int64_t v = 0; v < kPanelVectors; v++) {
      const int64_t from = v * kLanes;
      vu pairs = vu{};
      if (from + kLanes <= columns) {
        pairs = load_u16(even + from);
        if (both) pairs |= load_u16(odd + from) << 16;
      } else {
        for (int64_t j = from; j < columns; j++) {
          pairs[j - from] = even[j] | (both ? (uint32_t)odd[j] << 16 : 0u);
        }
      }
      memcpy(to + from * 2, &pairs, sizeof pairs);
    }
  }
}

template <class S>
static void to_f32(const void* source, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_upto(to + i, load_upto((const S*)source + i, count - i), count - i);
  }
}

template <class S>
static void from_f32(const float* source, int64_t count, void* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_upto((S*)to + i, load_upto(source + i, count - i), count - i);
  }
}
