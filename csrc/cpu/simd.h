// SPDX-License-Identifier: Apache-2.0
//
// Vectors of floats for the instruction set that is being compiled, and their conversions. Included
// once per isa_*.cpp, inside that instruction set's namespace: PEMT_ISA_LEVEL is 0 (plain C++),
// 1 (AVX2), 2 (AVX-512) or 3 (AVX-512 with bfloat16 products). Arithmetic is written with the
// compiler's vector types; intrinsics appear only where those have no word for an instruction.
#pragma once

// 16 lanes at most: a packed panel is 16 columns wide.
#if PEMT_ISA_LEVEL >= 2
constexpr int kLanes = 16;
#elif PEMT_ISA_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline vf splat(float value) { return vf{} + value; }

// --- 16-bit lanes widened and narrowed -----------------------------------------------------------

#if PEMT_ISA_LEVEL >= 2
static inline vu load_u16(const void* p) {
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
static inline void store_u16(void* p, vu v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
}
#elif PEMT_ISA_LEVEL == 1
static inline vu load_u16(const void* p) {
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
static inline void store_u16(void* p, vu v) {
  const __m128i low = _mm256_castsi256_si128((__m256i)v);
  const __m128i high = _mm256_extracti128_si256((__m256i)v, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
}
#else
static inline vu load_u16(const void* p) {
  uint16_t h[kLanes];
  memcpy(h, p, sizeof h);
  vu v;
  for (int i = 0; i < kLanes; i++) v[i] = h[i];
  return v;
}
static inline void store_u16(void* p, vu v) {
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; i++) h[i] = (uint16_t)v[i];
  memcpy(p, h, sizeof h);
}
#endif

// --- load and store: float32, bfloat16, float16 --------------------------------------------------

static inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

static inline vf load(const bf16* p) { return (vf)(load_u16(p) << 16); }

#if PEMT_ISA_LEVEL >= 3
static inline void store(bf16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#else
static inline void store(bf16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  store_u16(p, v != v ? (bits >> 16) | 0x40 : rounded);
}
#endif

#if PEMT_ISA_LEVEL >= 2
static inline vf load(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
static inline void store(f16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif PEMT_ISA_LEVEL == 1
static inline vf load(const f16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
static inline void store(f16* p, vf v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline vf load(const f16* p) {
  const vu half = load_u16(p);
  // Exponent and mantissa moved into place, rebiased by a multiplication that is exact.
  const vf magnitude = (vf)((half & 0x7fff) << 13) * 0x1p112f;
  const vu special = (vu)((half & 0x7c00) == 0x7c00) & 0x7f800000u;
  return (vf)((vu)magnitude | special | ((half & 0x8000) << 16));
}
static inline void store(f16* p, vf v) {
  const vu sign = (vu)v & 0x80000000u;
  const vu magnitude = (vu)v ^ sign;
  // Subnormal halves: the addition rounds at their last bit, which 0.5f puts at its own last bit.
  const vu tiny = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  const vu normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  vu half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? vu{} + 0x7c00 : half;
  half = magnitude > 0x7f800000u ? vu{} + 0x7e00 : half;
  store_u16(p, half | (sign >> 16));
}
#endif

// The first `count` < kLanes elements; the other lanes are 0.
template <class S>
static inline vf load_partial(const S* p, int64_t count) {
  S lanes[kLanes];
  memset(lanes, 0, sizeof lanes);
  memcpy(lanes, p, (size_t)count * sizeof(S));
  return load(lanes);
}
template <class S>
static inline void store_partial(S* p, vf v, int64_t count) {
  S lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, (size_t)count * sizeof(S));
}
template <class S>
static inline vf load_upto(const S* p, int64_t count) {
  return count >= kLanes ? load(p) : load_partial(p, count);
}
template <class S>
static inline void store_upto(S* p, vf v, int64_t count) {
  if (count >= kLanes) {
    store(p, v);
  } else {
    store_partial(p, v, count);
  }
}

#if PEMT_ISA_LEVEL >= 2
static inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#else
static inline float sum(vf v) {
  float lanes[kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
#endif
