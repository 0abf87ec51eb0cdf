// SPDX-License-Identifier: Apache-2.0
//
// Products of small blocks, C[m, n] (+)= A * B, with the sums of a tile held in registers. Included
// once per isa_*.cpp. The three layouts of B are described at `Product` in kernels.h.
//
// A tile has MR rows and NV vectors of columns: all its sums, one vector row of B and one broadcast
// of A fit the registers (32 with AVX-512, 16 below).
#pragma once

#if PEMT_ISA_LEVEL >= 2
constexpr int kTileRows = 6;
constexpr int kTileVectors = 4;
#elif PEMT_ISA_LEVEL == 1
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
#else
constexpr int kTileRows = 2;
constexpr int kTileVectors = 4;
#endif
constexpr int kPanelVectors = kPanel / kLanes;

// One cache line of each row of the next tile, while this one is computed.
constexpr int64_t kPrefetchStep = 16;
template <int MR>
static inline void prefetch_rows(const void* a, int64_t row_bytes) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) __builtin_prefetch((const char*)a + i * row_bytes);
}

static inline void store_sum(float* c, vf sum, bool accumulate) {
  store(c, accumulate ? load(c) + sum : sum);
}

// Where vector v of a row of B starts, counted from the first column of the tile.
static inline int64_t vector_offset(const Product& p, int v) {
  return (v / kPanelVectors) * p.b_panel + (v % kPanelVectors) * kLanes;
}

// --- float32, B in panels or rows ----------------------------------------------------------------

// `tail` columns beyond the NV - 1 full vectors, 0 if all are full.
template <class TB, int MR, int NV, bool TAIL>
static void tile_f32(const Product& p, int64_t row, const TB* b, float* c, int64_t tail) {
  const float* a = (const float*)p.a + row * p.a_row;
  const int64_t a_row = p.a_row, a_step = p.a_step, b_row = p.b_row;
  int64_t at[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; v++) at[v] = vector_offset(p, v);
  vf sums[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) sums[i][v] = vf{};
  }

  for (int64_t k = 0; k < p.k; k++) {
    if (k % kPrefetchStep == 0) prefetch_rows<MR>(a + MR * a_row, a_row * (int64_t)sizeof(float));
    vf b_k[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      b_k[v] = TAIL && v == NV - 1 ? load_partial(b + at[v], tail) : load(b + at[v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const vf a_ik = splat(a[i * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sums[i][v] += a_ik * b_k[v];
    }
    a += a_step;
    b += b_row;
  }

#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      store_sum(c + (row + i) * p.c_row + v * kLanes, sums[i][v], p.accumulate);
    }
  }
}

template <class TB, int NV, bool TAIL>
static void columns_f32(const Product& p, const TB* b, float* c, int64_t tail) {
  int64_t row = 0;
  for (; row + kTileRows <= p.m; row += kTileRows) {
    tile_f32<TB, kTileRows, NV, TAIL>(p, row, b, c, tail);
  }
  switch (p.m - row) {
    case 5:
      return tile_f32<TB, kTileRows >= 5 ? 5 : 1, NV, TAIL>(p, row, b, c, tail);
    case 4:
      return tile_f32<TB, kTileRows >= 4 ? 4 : 1, NV, TAIL>(p, row, b, c, tail);
    case 3:
      return tile_f32<TB, kTileRows >= 3 ? 3 : 1, NV, TAIL>(p, row, b, c, tail);
    case 2:
      return tile_f32<TB, kTileRows >= 2 ? 2 : 1, NV, TAIL>(p, row, b, c, tail);
    case 1:
      return tile_f32<TB, 1, NV, TAIL>(p, row, b, c, tail);
    default:
      return;
  }
}

template <class TB>
static void multiply_f32(const Product& p) {
  const TB* b = (const TB*)p.b;
  const bool panels = p.b_panel != kPanel;
  const int64_t n = panels ? (p.n + kPanel - 1) / kPanel * kPanel : p.n;
  int64_t column = 0;
  const auto b_at = [&] { return b + column / kPanel * p.b_panel + column % kPanel; };
  for (; column + kTileVectors * kLanes <= n; column += kTileVectors * kLanes) {
    columns_f32<TB, kTileVectors, false>(p, b_at(), p.c + column, 0);
  }
  if (kTileVectors > 2) {
    for (; column + 2 * kLanes <= n; column += 2 * kLanes) {
      columns_f32<TB, 2, false>(p, b_at(), p.c + column, 0);
    }
  }
  for (; column + kLanes <= n; column += kLanes) {
    columns_f32<TB, 1, false>(p, b_at(), p.c + column, 0);
  }
  if (column < n) columns_f32<TB, 1, true>(p, b_at(), p.c + column, n - column);
}

// --- float32, B in rows, few rows of A -----------------------------------------------------------

// KR rows of B are read at a time from left to right, which is how memory likes to be read; the
// sums of all columns lie in C, which fits the first cache.
template <class TB, int MR, int KR>
static void stream_f32(const Product& p, int64_t k, bool accumulate) {
  const float* a = (const float*)p.a + k * p.a_step;
  const TB* b = (const TB*)p.b + k * p.b_row;
  vf a_k[MR][KR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < KR; j++) a_k[i][j] = splat(a[i * p.a_row + j * p.a_step]);
  }
  const auto step = [&](int64_t column, int64_t count) __attribute__((always_inline)) {
    vf sums[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) sums[i] = vf{};
#pragma GCC unroll 8
    for (int j = 0; j < KR; j++) {
      const vf b_k = load_upto(b + j * p.b_row + column, count);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) sums[i] += a_k[i][j] * b_k;
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) store_sum(p.c + i * p.c_row + column, sums[i], accumulate);
  };
  int64_t column = 0;
  for (; column + kLanes <= p.n; column += kLanes) step(column, kLanes);
  if (column < p.n) step(column, p.n - column);
}

template <class TB, int MR, int KR>
static void stream_rows_f32(const Product& p) {
  int64_t k = 0;
  for (; k + KR <= p.k; k += KR) stream_f32<TB, MR, KR>(p, k, k > 0 || p.accumulate);
  for (; k < p.k; k++) stream_f32<TB, MR, 1>(p, k, k > 0 || p.accumulate);
}

template <class TB>
static void rows_f32(const Product& p) {
  switch (p.m) {
    case 1:
      return stream_rows_f32<TB, 1, 8>(p);
    case 2:
      return stream_rows_f32<TB, 2, PEMT_ISA_LEVEL >= 2 ? 8 : 4>(p);
    case 3:
      return stream_rows_f32<TB, 3, PEMT_ISA_LEVEL >= 2 ? 4 : 2>(p);
    case 4:
      return stream_rows_f32<TB, 4, PEMT_ISA_LEVEL >= 2 ? 4 : 2>(p);
    default:
      return multiply_f32<TB>(p);
  }
}

// --- float32, B as rows along k ------------------------------------------------------------------

template <class TB, int MR, int NR>
static void dots_tile_f32(const Product& p, int64_t row, int64_t column) {
  const float* a = (const float*)p.a + row * p.a_row;
  const TB* b = (const TB*)p.b + column * p.b_row;
  vf sums[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) sums[i][j] = vf{};
  }
  for (int64_t k = 0; k < p.k; k += kLanes) {
    const int64_t left = p.k - k;
    vf a_k[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) a_k[i] = load_upto(a + i * p.a_row + k, left);
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      const vf b_k = load_upto(b + j * p.b_row + k, left);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) sums[i][j] += a_k[i] * b_k;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) {
      float& c = p.c[(row + i) * p.c_row + column + j];
      c = (p.accumulate ? c : 0.f) + sum(sums[i][j]);
    }
  }
}

template <class TB, int MR, int NR>
static void dots_rows_f32(const Product& p, int64_t row) {
  int64_t column = 0;
  for (; column + NR <= p.n; column += NR) dots_tile_f32<TB, MR, NR>(p, row, column);
  for (; column < p.n; column++) dots_tile_f32<TB, MR, 1>(p, row, column);
}

template <class TB>
static void dots_f32(const Product& p) {
  int64_t row = 0;
#if PEMT_ISA_LEVEL >= 2
  for (; row + 4 <= p.m; row += 4) dots_rows_f32<TB, 4, 4>(p, row);
#endif
  for (; row + 2 <= p.m; row += 2) dots_rows_f32<TB, 2, 4>(p, row);
  if (row < p.m) dots_rows_f32<TB, 1, 8>(p, row);
}
