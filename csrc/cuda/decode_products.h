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

// Zeros in the place of what is not finite; bit i says that value i was not.
template <class T>
DEVICE uint32_t make_finite(Eight& values) {
  const uint32_t exponent = exponent_bits<T>();
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) {
    const bool low = (values.word[i] & exponent) == exponent;
    const bool high = (values.word[i] >> 16 & exponent) == exponent;
    if (low) values.word[i] &= 0xffff0000u;
    if (high) values.word[i] &= 0x0000ffffu;
    found |= (uint32_t(low) | uint32_t(high) << 1) << (2 * i);
  }
  return found;
}

// Rows of a first factor, tokens of a second one, and where their sums go: [part][row][token + 1].
struct Dots {
  const uint16_t* weights;
  int64_t weights_row;
  int first, end;  // rows there are; the tiles begin at `first`
  const uint16_t* x;
  int64_t x_row;
  int tokens;  // there are
  int terms;
  int tiles, parts;
  float* sums;
  int sums_rows;
};

// Weights whose rows lie along the sums, in tiles of 16 rows for all tokens; lane = 4 * g + i.
// `mend` sees the weights of 8 terms before they are used. Few warps wait for the memory: the loads
// of `kAhead` steps begin before the first one's products.
template <class T, int kTokens, bool kAligned, class Mend>
DEVICE void dot_products(const Dots& d, Mend mend) {
  constexpr int kEights = kTokens / 8, kAhead = kTokens <= 16 ? 4 : 64 / kTokens;
  const int chunks = (d.terms + 31) / 32, g = lane() / 4, i = lane() % 4;
  for (int item = warp(); item < d.tiles * d.parts; item += kWarps) {
    const int tile = item / d.parts, part = item % d.parts;
    const int row = d.first + tile * kTile + g;
    float acc[kEights][4] = {};
    const int last = chunks * (part + 1) / d.parts;
    for (int chunk = chunks * part / d.parts; chunk < last; chunk += kAhead) {
      Eight low[kAhead], high[kAhead], values[kAhead][kEights];
      UNROLL for (int j = 0; j < kAhead; j++) {
        const int at = (chunk + j) * 32 + i * 8;
        const bool is_there = chunk + j < last;
        const auto read = [&](bool has_row, const uint16_t* from) {
          return is_there && has_row ? eight<kAligned>(from, at, d.terms) : nothing();
        };
        low[j] = read(row < d.end, d.weights + row * d.weights_row);
        high[j] = read(row + 8 < d.end, d.weights + (row + 8) * d.weights_row);
        UNROLL for (int e = 0; e < kEights; e++) {
          const int token = e * 8 + g;
          values[j][e] = read(token < d.tokens, d.x + token * d.x_row);
        }
        mend(low[j], at);
        mend(high[j], at);
      }
      UNROLL for (int j = 0; j < kAhead; j++) {
        UNROLL for (int e = 0; e < kEights; e++) {
          const Eight &x = values[j][e], &l = low[j], &h = high[j];
          multiply<T>(acc[e], l.word[0], h.word[0], l.word[1], h.word[1], x.word[0], x.word[1]);
          multiply<T>(acc[e], l.word[2], h.word[2], l.word[3], h.word[3], x.word[2], x.word[3]);
        }
      }
    }
    for (int half = 0; half < 2; half++) {
      const int to = tile * kTile + g + half * 8;
      if (to >= d.sums_rows) continue;
      float* sums = d.sums + (part * d.sums_rows + to) * (kTokens + 1) + 2 * i;
      for (int e = 0; e < kEights; e++) {
        sums[e * 8] = acc[e][2 * half];
        sums[e * 8 + 1] = acc[e][2 * half + 1];
      }
    }
  }
}

// Of the units of this block.
template <class T, int kTokens, bool kAligned>
DEVICE void down_products(const DecodeBlock<T>& b) {
  const int own = b.plan.own_units(), first = b.first_unit() + b.rank * own;
  const auto* w_down = (const uint16_t*)b.adapters.w_down;
  const Dots dots{w_down,
                  b.d,
                  first,
                  b.adapters.units,
                  (const uint16_t*)b.x,
                  b.x_row,
                  b.call.tokens,
                  b.d,
                  own / kTile,
                  b.plan.parts_d,
                  b.sums,
                  own};
  dot_products<T, kTokens, kAligned>(dots, [](Eight&, int) {});
}

// Of the columns of a pass, where w_up is [H, N].
template <class T, int kTokens, bool kAligned>
DEVICE void up_products_transposed(DecodeBlock<T>& b, int first) {
  const int end = min_of(first + b.plan.pass, b.end());
  const auto* w_up = (const uint16_t*)b.adapters.w_up + b.first_unit();
  const Dots dots{w_up,
                  b.adapters.units,
                  first,
                  end,
                  (const uint16_t*)b.hidden,
                  b.hidden_row(),
                  kTokens,
                  min_of(b.plan.units, b.adapters.units - b.first_unit()),
                  (b.plan.pass + kTile - 1) / kTile,
                  b.plan.parts_n,
                  b.sums,
                  b.plan.pass};
  const bool careful = *b.flag != 0;
  dot_products<T, kTokens, kAligned>(dots, [&](Eight& weights, int at) {
    if (!careful) return;
    const uint32_t found = make_finite<T>(weights);
    for (int i = 0; found >> i != 0; i++) {
      if (found >> i & 1) b.poison(b.first_unit() + at + i);
    }
  });
}

// Sums over a part of the slice's units of 64 columns for all tokens, the columns of a pass. The
// four products of a step take every fourth pair of a lane's columns: row g is column 8g + j, row g
// + 8 column 8g + 4 + j.
template <class T, int kTokens, bool kAligned>
DEVICE void up_products(DecodeBlock<T>& b, int first) {
  constexpr int kEights = kTokens / 8, kAhead = kTokens <= 32 ? 2 : 1;
  const Decode& c = b.call;
  const int parts = b.plan.parts_n, tiles = b.plan.pass_tiles();
  const int steps = b.plan.units / kTile, g = lane() / 4, i = lane() % 4;
  const int end = min_of(first + b.plan.pass, b.end());
  const auto* w_up = (const uint16_t*)b.adapters.w_up;
  const bool careful = *b.flag != 0;
  const auto unit_of = [&](int step, int r) {
    return b.first_unit() + step * kTile + 2 * i + r % 2 + r / 2 * 8;
  };
  for (int item = warp(); item < tiles * parts; item += kWarps) {
    const int tile = item / parts, part = item % parts;
    const int column = first + tile * kTileColumns + g * 8;
    float acc[4][kEights][4] = {};
    const int last = steps * (part + 1) / parts;
    for (int step = steps * part / parts; step < last; step += kAhead) {
      Eight rows[kAhead][4];
      UNROLL for (int s = 0; s < kAhead; s++) {
        UNROLL for (int r = 0; r < 4; r++) {
          const int own = unit_of(step + s, r);
          rows[s][r] = step + s < last && own < b.adapters.units && column < end
                           ? eight<kAligned>(w_up + int64_t(own) * c.h, column, end)
                           : nothing();
        }
      }
      UNROLL for (int s = 0; s < kAhead; s++) {
        if (step + s >= last) continue;
        if (careful) {
          uint32_t found = 0;
          UNROLL for (int r = 0; r < 4; r++) {
            found |= uint32_t(make_finite<T>(rows[s][r]) != 0) << r;
          }
          for (int r = 0; found >> r != 0; r++) {
            if (found >> r & 1) b.poison(unit_of(step + s, r));
          }
        }
        uint32_t units[kEights][2];
        for (int e = 0; e < kEights; e++) {
          const T* from = b.hidden + (e * 8 + g) * b.hidden_row() + (step + s) * kTile + 2 * i;
          units[e][0] = two(from);
          units[e][1] = two(from + 8);
        }
        UNROLL for (int j = 0; j < 4; j++) {
          const auto pair = [&](int r, int at) {
            return half_of(rows[s][r], at) | half_of(rows[s][r + 1], at) << 16;
          };
          const uint32_t a[4] = {pair(0, j), pair(0, j + 4), pair(2, j), pair(2, j + 4)};
          for (int e = 0; e < kEights; e++) {
            multiply<T>(acc[j][e], a[0], a[1], a[2], a[3], units[e][0], units[e][1]);
          }
        }
      }
    }
    for (int j = 0; j < 4; j++) {
      const int at = tile * kTileColumns + g * 8 + j;
      for (int half = 0; half < 2; half++) {
        if (at + 4 * half >= b.plan.pass) continue;
        float* sums = b.sums + (part * b.plan.pass + at + 4 * half) * (kTokens + 1) + 2 * i;
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
  const auto* w_down = (const float*)b.adapters.w_down;
  for (int item = warp(); item < own * parts; item += kWarps) {
    const int u = item / parts, part = item % parts;
    const int unit = b.first_unit() + b.rank * own + u;
    float acc[kTokens] = {};
    if (unit < b.adapters.units) {
      const int end = int(int64_t(b.d) * (part + 1) / parts);
      for (int k = int(int64_t(b.d) * part / parts) + lane(); k < end; k += 32) {
        const float weight = w_down[int64_t(unit) * b.d + k];
        UNROLL for (int t = 0; t < kTokens; t++) {
          if (t < c.tokens) acc[t] += weight * b.x[t * b.x_row + k];
        }
      }
    }
    UNROLL for (int t = 0; t < kTokens; t++) {
      const float sum = sum_of_lanes(acc[t]);
      if (lane() == 0) b.sums[(part * own + u) * (kTokens + 1) + t] = sum;
    }
  }
}

// Two columns for each lane of the warp.
template <int kTokens>
DEVICE void up_products_f32(DecodeBlock<float>& b, int first) {
  const Decode& c = b.call;
  const int parts = b.plan.parts_n, tiles = b.plan.pass_tiles(), units = b.plan.units;
  const int end = min_of(first + b.plan.pass, b.end());
  const auto* w_up = (const float*)b.adapters.w_up;
  const int64_t unit_row = b.adapters.transposed ? 1 : c.h;
  const int64_t column_row = b.adapters.transposed ? b.adapters.units : 1;
  const bool careful = *b.flag != 0;
  for (int item = warp(); item < tiles * parts; item += kWarps) {
    const int tile = item / parts, part = item % parts;
    for (int half = 0; half < 2; half++) {
      const int own = tile * kTileColumns + half * 32 + lane(), column = first + own;
      if (column >= end) continue;
      float acc[kTokens] = {};
      for (int u = units * part / parts; u < units * (part + 1) / parts; u++) {
        const int unit = b.first_unit() + u;
        if (unit >= b.adapters.units) break;
        float weight = w_up[unit * unit_row + column * column_row];
        if (careful && !is_finite(weight)) {
          b.poison(unit);
          weight = 0.f;
        }
        UNROLL for (int t = 0; t < kTokens; t++) acc[t] +=
            weight * b.hidden[t * b.hidden_row() + u];
      }
      UNROLL for (int t = 0; t < kTokens; t++) {
        b.sums[(part * b.plan.pass + own) * (kTokens + 1) + t] = acc[t];
      }
    }
  }
}

}  // namespace pemt_fast::cuda
