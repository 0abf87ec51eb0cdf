// SPDX-License-Identifier: Apache-2.0
//
// The products of product.h for bfloat16: one instruction multiplies 16 pairs along k and adds both
// products to 16 float32 sums. Included by isa_avx512_bf16.cpp only.
#pragma once

static inline __m512bh pair(const uint16_t* a, bool both) {
  uint32_t bits = a[0];
  if (both) memcpy(&bits, a, sizeof bits);
  return (__m512bh)_mm512_set1_epi32((int)bits);
}

// --- B in panels of pairs ------------------------------------------------------------------------

template <int MR, int NV>
static void tile_bf16(const Product& p, int64_t row, const uint16_t* b, float* c) {
  const uint16_t* a = (const uint16_t*)p.a + row * p.a_row;
  const int64_t a_row = p.a_row, a_step = p.a_step, b_row = p.b_row, b_panel = p.b_panel;
  __m512 sums[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) sums[i][v] = _mm512_setzero_ps();
  }
  const auto step = [&](bool both) __attribute__((always_inline)) {
    __m512bh b_k[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) b_k[v] = (__m512bh)_mm512_loadu_si512(b + v * b_panel);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const __m512bh a_ik = pair(a + i * a_row, both);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], a_ik, b_k[v]);
    }
    a += a_step;
    b += b_row;
  };
  for (int64_t k = 0; k + 2 <= p.k; k += 2) {
    if (k % (2 * kPrefetchStep) == 0) prefetch_rows<MR>(a + MR * a_row, 2 * a_row);
    step(true);
  }
  if (p.k % 2) step(false);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      store_sum(c + (row + i) * p.c_row + v * kLanes, (vf)sums[i][v], p.accumulate);
    }
  }
}

template <int NV>
static void columns_bf16(const Product& p, const uint16_t* b, float* c) {
  int64_t row = 0;
  for (; row + kTileRows <= p.m; row += kTileRows) tile_bf16<kTileRows, NV>(p, row, b, c);
  switch (p.m - row) {
    case 5:
      return tile_bf16<5, NV>(p, row, b, c);
    case 4:
      return tile_bf16<4, NV>(p, row, b, c);
    case 3:
      return tile_bf16<3, NV>(p, row, b, c);
    case 2:
      return tile_bf16<2, NV>(p, row, b, c);
    case 1:
      return tile_bf16<1, NV>(p, row, b, c);
    default:
      return;
  }
}

static void multiply_bf16(const Product& p) {
  const uint16_t* b = (const uint16_t*)p.b;
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  int64_t panel = 0;
  for (; panel + kTileVectors <= panels; panel += kTileVectors) {
    columns_bf16<kTileVectors>(p, b + panel * p.b_panel, p.c + panel * kPanel);
  }
  for (; panel + 2 <= panels; panel += 2) {
    columns_bf16<2>(p, b + panel * p.b_panel, p.c + panel * kPanel);
  }
  if (panel < panels) {
    columns_bf16<1>(p, b + panel * p.b_panel, p.c + panel * kPanel);
  }
}

// --- B as rows along k ---------------------------------------------------------------------------

constexpr int64_t kPairLanes = 2 * kLanes;

static inline __m512bh load_bf16(const uint16_t* p, int64_t count) {
  if (count >= kPairLanes) return (__m512bh)_mm512_loadu_si512(p);
  const __mmask32 mask = (__mmask32)((1ull << count) - 1);
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}

template <int MR, int NR>
static void dots_tile_bf16(const Product& p, int64_t row, int64_t column) {
  const uint16_t* a = (const uint16_t*)p.a + row * p.a_row;
  const uint16_t* b = (const uint16_t*)p.b + column * p.b_row;
  __m512 sums[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) sums[i][j] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < p.k; k += kPairLanes) {
    const int64_t left = p.k - k;
    __m512bh a_k[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) a_k[i] = load_bf16(a + i * p.a_row + k, left);
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      const __m512bh b_k = load_bf16(b + j * p.b_row + k, left);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], a_k[i], b_k);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      float& c = p.c[(row + i) * p.c_row + column + j];
      c = (p.accumulate ? c : 0.f) + sum((vf)sums[i][j]);
    }
  }
}

template <int MR, int NR>
static void dots_rows_bf16(const Product& p, int64_t row) {
  int64_t column = 0;
  for (; column + NR <= p.n; column += NR) dots_tile_bf16<MR, NR>(p, row, column);
  for (; column < p.n; column++) dots_tile_bf16<MR, 1>(p, row, column);
}

static void dots_bf16(const Product& p) {
  int64_t row = 0;
  for (; row + 4 <= p.m; row += 4) dots_rows_bf16<4, 4>(p, row);
  for (; row + 2 <= p.m; row += 2) dots_rows_bf16<2, 4>(p, row);
  if (row < p.m) dots_rows_bf16<1, 8>(p, row);
}

// --- B as rows along n ---------------------------------------------------------------------------

// Two rows of 32 columns are interleaved to pairs in registers. That leaves the columns of a pair
// of vectors in the order 0-3, 8-11, 16-19, 24-27 and 4-7, 12-15, ...
struct Interleaved {
  __m512 low, high;
};

static inline Interleaved load_interleaved(const float* c) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i high =
      _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const __m512 first = _mm512_loadu_ps(c), second = _mm512_loadu_ps(c + kLanes);
  return {_mm512_permutex2var_ps(first, low, second), _mm512_permutex2var_ps(first, high, second)};
}

static inline void store_interleaved(float* c, Interleaved sums) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  _mm512_storeu_ps(c, _mm512_permutex2var_ps(sums.low, first, sums.high));
  _mm512_storeu_ps(c + kLanes, _mm512_permutex2var_ps(sums.low, second, sums.high));
}

// KP pairs of rows of B at a time, from left to right; see stream_f32. `odd` is false where the
// last pair lacks its second row.
template <int MR, int KP>
static void stream_bf16(const Product& p, int64_t k, bool odd, bool accumulate) {
  const uint16_t* a = (const uint16_t*)p.a + k;
  const uint16_t* b = (const uint16_t*)p.b + k * p.b_row;
  __m512bh a_k[MR][KP];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < KP; j++) a_k[i][j] = pair(a + i * p.a_row + 2 * j, odd);
  }
  const auto step = [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    Interleaved sums[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      sums[i] = accumulate ? load_interleaved(p.c + i * p.c_row + column)
                           : Interleaved{_mm512_setzero_ps(), _mm512_setzero_ps()};
    }
#pragma GCC unroll 8
    for (int j = 0; j < KP; j++) {
      const uint16_t* b_j = b + 2 * j * p.b_row + column;
      const __m512i even = (__m512i)load_bf16(b_j, count);
      const __m512i next = odd ? (__m512i)load_bf16(b_j + p.b_row, count) : _mm512_setzero_si512();
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, next);
      const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, next);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        sums[i].low = _mm512_dpbf16_ps(sums[i].low, a_k[i][j], low);
        sums[i].high = _mm512_dpbf16_ps(sums[i].high, a_k[i][j], high);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) store_interleaved(p.c + i * p.c_row + column, sums[i]);
  };
  int64_t column = 0;
  for (; column + kPairLanes <= p.n; column += kPairLanes) step(column, kPairLanes);
  if (column < p.n) step(column, p.n - column);
}

template <int MR, int KP>
static void stream_rows_bf16(const Product& p) {
  int64_t k = 0;
  for (; k + 2 * KP <= p.k; k += 2 * KP) stream_bf16<MR, KP>(p, k, true, k > 0 || p.accumulate);
  for (; k + 2 <= p.k; k += 2) stream_bf16<MR, 1>(p, k, true, k > 0 || p.accumulate);
  if (k < p.k) stream_bf16<MR, 1>(p, k, false, k > 0 || p.accumulate);
}

// The columns of a block of rows; the sums stay in registers over all of k.
template <int MR>
static void rows_tile_bf16(const Product& p, int64_t row, int64_t column, int64_t count) {
  const uint16_t* a = (const uint16_t*)p.a + row * p.a_row;
  const uint16_t* b = (const uint16_t*)p.b + column;
  Interleaved sums[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    float* c = p.c + (row + i) * p.c_row + column;
    sums[i] =
        p.accumulate ? load_interleaved(c) : Interleaved{_mm512_setzero_ps(), _mm512_setzero_ps()};
  }
  for (int64_t k = 0; k < p.k; k += 2) {
    const bool odd = k + 1 < p.k;
    const __m512i even = (__m512i)load_bf16(b, count);
    const __m512i next = odd ? (__m512i)load_bf16(b + p.b_row, count) : _mm512_setzero_si512();
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, next);
    const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, next);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const __m512bh a_ik = pair(a + i * p.a_row + k, odd);
      sums[i].low = _mm512_dpbf16_ps(sums[i].low, a_ik, low);
      sums[i].high = _mm512_dpbf16_ps(sums[i].high, a_ik, high);
    }
    b += 2 * p.b_row;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    store_interleaved(p.c + (row + i) * p.c_row + column, sums[i]);
  }
}

static void rows_bf16(const Product& p) {
  switch (p.m) {
    case 1:
      return stream_rows_bf16<1, 4>(p);
    case 2:
      return stream_rows_bf16<2, 4>(p);
    case 3:
      return stream_rows_bf16<3, 2>(p);
    case 4:
      return stream_rows_bf16<4, 2>(p);
    default:
      break;
  }
  for (int64_t column = 0; column < p.n; column += kPairLanes) {
    const int64_t count = p.n - column;
    int64_t row = 0;
    for (; row + 8 <= p.m; row += 8) rows_tile_bf16<8>(p, row, column, count);
    for (; row + 2 <= p.m; row += 2) rows_tile_bf16<2>(p, row, column, count);
    if (row < p.m) rows_tile_bf16<1>(p, row, column, count);
  }
}
