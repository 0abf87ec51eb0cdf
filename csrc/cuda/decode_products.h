// SPDX-License-Identifier: Apache-2.0
//
// The two products of the decode kernel.
//
// Products of 16 bits are those of the tensor cores, 16 x 8 x 16, with the weights as the first
// factor: units or columns are its 16 rows, tokens its 8 columns. A lane has 8 neighbouring values
// of a row from one load; which of them meet in which product is its own affair, as long as both
// factors agree, since a sum does not care for the order of its terms on paper and is the same in
// every call.
#pragma once

#include "decode_block.h"

namespace pemt_fast::cuda {

// Those of a row from `at` on; 0 from `end` on.
template <bool kAligned>
DEVICE Eight eight(const uint16_t* row, int at, int end) {
  if (kAligned && at + 8 <= end) return load_eight(row + at);
  Eight result;
  for (int i = 0; i < 4; i++) {
    const uint32_t low = at + 2 * i < end ? row[at + 2 * i] : 0;
    const uint32_t high = at + 2 * i + 1 < end ? row[at + 2 * i + 1] : 0;
    result.word[i] = low | high << 16;
  }
  return result;
}

DEVICE Eight nothing() { return Eight{{0, 0, 0, 0}}; }

DEVICE uint32_t half_of(const Eight& values, int i) {
  return (values.word[i / 2] >> (i % 2 * 16)) & 0xffffu;
}

// Zeros in the place of what is not finite; whether there was something.
template <class T>
DEVICE bool make_finite(Eight& values) {
  const uint32_t exponent = exponent_bits<T>();
  bool found = false;
  for (int i = 0; i < 4; i++) {
    const bool low = (values.word[i] & exponent) == exponent;
    const bool high = (values.word[i] >> 16 & exponent) == exponent;
    if (low) values.word[i] &= 0xffff0000u;
    if (high) values.word[i] &= 0x0000ffffu;
    found |= low || high;
  }
  return found;
}

// Sums over a part of D of 16 units for all tokens; lane = 4 * g + i.
template <class T, int kTokens, bool kAligned>
DEVICE void down_products(const DecodeBlock<T>& b) {
  constexpr int kEights = kTokens / 8;
  const Decode& c = b.call;
  const int own = b.plan.own_units(), tiles = own / kTile, parts = b.plan.parts_d;
  const int chunks = (c.d + 31) / 32, g = lane() / 4, i = lane() % 4;
  const auto* w_down = (const uint16_t*)c.w_down;
  const auto* x = (const uint16_t*)c.x;
  for (int item = warp(); item < tiles * parts; item += kWarps) {
    const int tile = item / parts, part = item % parts;
    const int unit = b.first_unit() + b.rank * own + tile * kTile + g;
    float acc[kEights][4] = {};
    for (int chunk = chunks * part / parts; chunk < chunks * (part + 1) / parts; chunk++) {
      const int at = chunk * 32 + i * 8;
      const Eight low =
          unit < c.units ? eight<kAligned>(w_down + int64_t(unit) * c.d, at, c.d) : nothing();
      const Eight high = unit + 8 < c.units
                             ? eight<kAligned>(w_down + int64_t(unit + 8) * c.d, at, c.d)
                             : nothing();
      for (int e = 0; e < kEights; e++) {
        const int token = e * 8 + g;
        const Eight values =
            token < c.tokens ? eight<kAligned>(x + token * c.x_row, at, c.d) : nothing();
        multiply<T>(acc[e], low.word[0], high.word[0], low.word[1], high.word[1], values.word[0],
                    values.word[1]);
        multiply<T>(acc[e], low.word[2], high.word[2], low.word[3], high.word[3], values.word[2],
                    values.word[3]);
      }
    }
    float* sums = b.sums + (part * own + tile * kTile + g) * kTokens + 2 * i;
    for (int e = 0; e < kEights; e++) {
      sums[e * 8] = acc[e][0];
      sums[e * 8 + 1] = acc[e][1];
      sums[8 * kTokens + e * 8] = acc[e][2];
      sums[8 * kTokens + e * 8 + 1] = acc[e][3];
    }
  }
}

// Sums over a part of the slice's units of 64 columns for all tokens, the columns of a pass. The
// four products of a step take every fourth pair of a lane's columns: row g is column 8g + j, row g
// + 8 column 8g + 4 + j.
template <class T, int kTokens, bool kAligned>
DEVICE void up_products(DecodeBlock<T>& b, int first) {
  constexpr int kEights = kTokens / 8;
  const Decode& c = b.call;
  const int parts = b.plan.parts_n, tiles = b.plan.pass_tiles();
  const int steps = b.plan.units / kTile, g = lane() / 4, i = lane() % 4;
  const int end = min_of(first + b.plan.pass, b.end());
  const auto* w_up = (const uint16_t*)c.w_up;
  const bool careful = *b.careful != 0;
  for (int item = warp(); item < tiles * parts; item += kWarps) {
    const int tile = item / parts, part = item % parts;
    const int column = first + tile * kTileColumns + g * 8;
    float acc[4][kEights][4] = {};
    for (int step = steps * part / parts; step < steps * (part + 1) / parts; step++) {
      Eight rows[4];
      for (int r = 0; r < 4; r++) {
        const int unit = b.first_unit() + step * kTile + 2 * i + r % 2 + r / 2 * 8;
        rows[r] = unit < c.units && column < end
                      ? eight<kAligned>(w_up + int64_t(unit) * c.h, column, end)
                      : nothing();
        if (careful && make_finite<T>(rows[r])) b.poison(unit);
      }
      uint32_t units[kEights][2];
      for (int e = 0; e < kEights; e++) {
        const T* from = b.hidden + (e * 8 + g) * b.hidden_row() + step * kTile + 2 * i;
        units[e][0] = two(from);
        units[e][1] = two(from + 8);
      }
      for (int j = 0; j < 4; j++) {
        const auto pair = [&](int r, int at) {
          return half_of(rows[r], at) | half_of(rows[r + 1], at) << 16;
        };
        const uint32_t a[4] = {pair(0, j), pair(0, j + 4), pair(2, j), pair(2, j + 4)};
        for (int e = 0; e < kEights; e++) {
          multiply<T>(acc[j][e], a[0], a[1], a[2], a[3], units[e][0], units[e][1]);
        }
      }
    }
    for (int j = 0; j < 4; j++) {
      const int at = tile * kTileColumns + g * 8 + j;
      for (int half = 0; half < 2; half++) {
        if (at + 4 * half >= b.plan.pass) continue;
        float* sums = b.sums + (part * b.plan.pass + at + 4 * half) * kTokens + 2 * i;
        for (int e = 0; e < kEights; e++) {
          sums[e * 8] = acc[j][e][2 * half];
          sums[e * 8 + 1] = acc[j][e][2 * half + 1];
        }
      }
    }
  }
}

// The same in float32, without tensor cores: a warp takes a unit, its lanes take terms.
template <int kTokens>
DEVICE void down_products_f32(const DecodeBlock<float>& b) {
  const Decode& c = b.call;
  const int own = b.plan.own_units(), parts = b.plan.parts_d;
  const auto* w_down = (const float*)c.w_down;
  const auto* x = (const float*)c.x;
  for (int item = warp(); item < own * parts; item += kWarps) {
    const int u = item / parts, part = item % parts;
    const int unit = b.first_unit() + b.rank * own + u;
    float acc[kTokens] = {};
    if (unit < c.units) {
      const int end = int(int64_t(c.d) * (part + 1) / parts);
      for (int k = int(int64_t(c.d) * part / parts) + lane(); k < end; k += 32) {
        const float weight = w_down[int64_t(unit) * c.d + k];
        for (int t = 0; t < kTokens; t++) {
          if (t < c.tokens) acc[t] += weight * x[t * c.x_row + k];
        }
      }
    }
    for (int t = 0; t < kTokens; t++) {
      const float sum = sum_of_lanes(acc[t]);
      if (lane() == 0) b.sums[(part * own + u) * kTokens + t] = sum;
    }
  }
}

// Two columns for each lane of the warp.
template <int kTokens>
DEVICE void up_products_f32(DecodeBlock<float>& b, int first) {
  const Decode& c = b.call;
  const int parts = b.plan.parts_n, tiles = b.plan.pass_tiles(), units = b.plan.units;
  const int end = min_of(first + b.plan.pass, b.end());
  const auto* w_up = (const float*)c.w_up;
  const bool careful = *b.careful != 0;
  for (int item = warp(); item < tiles * parts; item += kWarps) {
    const int tile = item / parts, part = item % parts;
    for (int half = 0; half < 2; half++) {
      const int own = tile * kTileColumns + half * 32 + lane(), column = first + own;
      if (column >= end) continue;
      float acc[kTokens] = {};
      for (int u = units * part / parts; u < units * (part + 1) / parts; u++) {
        const int unit = b.first_unit() + u;
        if (unit >= c.units) break;
        float weight = w_up[int64_t(unit) * c.h + column];
        if (careful && !is_finite(weight)) {
          b.poison(unit);
          weight = 0.f;
        }
        for (int t = 0; t < kTokens; t++) acc[t] += weight * b.hidden[t * b.hidden_row() + u];
      }
      for (int t = 0; t < kTokens; t++) {
        b.sums[(part * b.plan.pass + own) * kTokens + t] = acc[t];
      }
    }
  }
}

}  // namespace pemt_fast::cuda
