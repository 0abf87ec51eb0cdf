// SPDX-License-Identifier: Apache-2.0
//
// The Task Sparsity Loss token by token, see LossRows in kernels.h: the rows of a token are summed
// while they come in, and scaled while they are still in the first cache. Included once per
// isa_*.cpp. S is the dtype of the tensors.
#pragma once

// Of the squares of norms: torch's cosine_similarity clamps each norm at 1e-8.
constexpr float kLeastSquare = 1e-16f;

// Terms per lane of a float32 sum before they go to a second one, and elements of a row that makes.
constexpr int64_t kChain = 32;
constexpr int64_t kSpan = kChain * kLanes;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline vf square_root(vf v) {
  for (int i = 0; i < kLanes; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
}

// NaN passes.
static inline vf clamped(vf square) { return square < kLeastSquare ? splat(kLeastSquare) : square; }

// The first `count` elements of a row of which `left` are left; the other lanes are 0.
template <class S>
static inline vf load_first(const S* p, int64_t count, int64_t left) {
  if (count >= kLanes) return load(p);
  if (left < kLanes) return load_partial(p, count);
  vi lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane < (int32_t)count ? load(p) : vf{};
}

// Also writes beyond `count` where the row goes on: what follows there is written later.
template <class S>
static inline void store_first(S* p, vf v, int64_t count, int64_t left) {
  store_upto(p, v, left < kLanes ? count : kLanes);
}

template <class S>
static inline float squared_norm(const S* row, int64_t width) {
  vf total{};
  for (int64_t at = 0; at < width;) {
    const int64_t stop = smaller(width, at + 4 * kSpan);
    vf part[4] = {};
    for (; at + 4 * kLanes <= stop; at += 4 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const vf v = load(row + at + i * kLanes);
        part[i] += v * v;
      }
    }
    for (; at < stop; at += kLanes) {
      const vf v = load_upto(row + at, stop - at);
      part[0] += v * v;
    }
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
  return sum(total);
}

// The rows of units of one token.
template <class S>
struct UnitRows {
  const S *hidden, *products, *folded, *projected;
  int64_t n;

  UnitRows(const LossRows& r, int64_t t)
      : hidden((const S*)r.hidden + t * r.hidden_row),
        products((const S*)r.products + t * r.n),
        folded((const S*)r.folded + t * r.n),
        projected(r.projected ? (const S*)r.projected + t * r.projected_row : nullptr),
        n(r.n) {}

  // Sums over the units from `begin` on of products * hidden and (folded + 2 projected) * hidden.
  void add_up(int64_t begin, int64_t end, float& dot, float& squared) const {
    vf dots{}, squares{};
    while (begin < end) {
      const int64_t stop = smaller(end, begin + kSpan);
      vf d{}, s{};
      for (; begin < stop; begin += kLanes) {
        const int64_t count = stop - begin, left = n - begin;
        const vf h = load_first(hidden + begin, count, left);
        vf f = load_first(folded + begin, count, left);
        if (projected) f += 2.f * load_first(projected + begin, count, left);
        d += load_first(products + begin, count, left) * h;
        s += f * h;
      }
      begin = stop;
      dots += d;
      squares += s;
    }
    dot = sum(dots);
    squared = sum(squares);
  }

  // What the factors of an adapter make of its units; outputs that are null are left out.
  void scale(int64_t begin, int64_t end, float for_dot, float for_norm, S* scaled, S* by_norm,
             S* d_hidden) const {
    for (; begin < end; begin += kLanes) {
      const int64_t count = end - begin, left = n - begin;
      const vf h = load_first(hidden + begin, count, left);
      if (scaled) store_first(scaled + begin, h * for_dot, count, left);
      if (by_norm) store_first(by_norm + begin, h * for_norm, count, left);
      if (!d_hidden) continue;
      vf f = load_first(folded + begin, count, left);
      if (projected) f += load_first(projected + begin, count, left);
      const vf d = load_first(products + begin, count, left) * for_dot + f * for_norm;
      store_first(d_hidden + begin, d, count, left);
    }
  }
};

template <class S>
static inline S* row_of(void* array, int64_t token, int64_t width) {
  return array ? (S*)array + token * width : nullptr;
}

// A token that does not count: zeros, whatever its rows hold.
template <class S>
static void clear_token(const LossRows& r, int64_t t) {
  const auto clear = [](auto* row, int64_t width) {
    if (row) memset((void*)row, 0, (size_t)width * sizeof(*row));
  };
  clear(row_of<S>(r.scaled, t, r.n), r.n);
  clear(row_of<S>(r.by_norm, t, r.n), r.n);
  clear(row_of<S>(r.d_hidden, t, r.n), r.n);
  clear(row_of<S>(r.d_z, t, r.h), r.h);
  clear(row_of<float>(r.for_dot, t, r.adapters), r.adapters);
  clear(row_of<float>(r.for_norm, t, r.adapters), r.adapters);
}

template <class S>
static void loss_token(const LossRows& r, int64_t t) {
  const S* z = (const S*)r.z + t * r.z_row;
  const UnitRows<S> units(r, t);
  S* scaled = row_of<S>(r.scaled, t, r.n);
  S* by_norm = row_of<S>(r.by_norm, t, r.n);
  S* d_hidden = row_of<S>(r.d_hidden, t, r.n);
  const float z_squared = squared_norm(z, r.h);
  const vf z_norm = square_root(clamped(splat(z_squared)));
  vf along{};
  for (int64_t first = 0; first < r.adapters; first += kLanes) {
    const int64_t count = smaller(kLanes, r.adapters - first);
    float dots[kLanes] = {}, squares[kLanes] = {};
    for (int64_t i = 0; i < count; i++) {
      const int64_t e = first + i, begin = e > 0 ? r.ends[e - 1] : 0;
      units.add_up(begin, r.ends[e], dots[i], squares[i]);
      if (r.offset_dot) dots[i] += r.offset_dot[t * r.adapters + e];
      if (r.offset_squared) squares[i] += r.offset_squared[t * r.adapters + e];
    }
    const vf square = load(squares), least = clamped(square);
    const vf norms = z_norm * square_root(least);
    const vf cosine = load(dots) / norms;
    const vf slope = load_upto(r.d_cosine + first, count);
    const vf for_dot = slope / norms;
    // A clamped norm does not change.
    const vf for_norm = square <= kLeastSquare ? vf{} : -slope * cosine / least;
    along += slope * cosine;
    for (int64_t i = 0; i < count; i++) r.cosines[first + i] += cosine[i];
    if (r.for_dot) store_upto(r.for_dot + t * r.adapters + first, for_dot, count);
    if (r.for_norm) store_upto(r.for_norm + t * r.adapters + first, for_norm, count);
    if (!scaled && !by_norm && !d_hidden) continue;
    for (int64_t i = 0; i < count; i++) {
      const int64_t e = first + i, begin = e > 0 ? r.ends[e - 1] : 0;
      units.scale(begin, r.ends[e], for_dot[i], for_norm[i], scaled, by_norm, d_hidden);
    }
  }
  if (!r.d_z) return;
  S* d_z = row_of<S>(r.d_z, t, r.h);
  const float back = z_squared <= kLeastSquare ? 0.f : -sum(along) / z_squared;
  for (int64_t at = 0; at < r.h; at += kLanes) {
    store_upto(d_z + at, load_upto(z + at, r.h - at) * back, r.h - at);
  }
}

template <class S>
static void loss_rows(const LossRows& r) {
  for (int64_t t = r.begin; t < r.end; t++) {
    if (r.mask && !r.mask[t]) {
      clear_token<S>(r, t);
    } else {
      loss_token<S>(r, t);
    }
  }
}
