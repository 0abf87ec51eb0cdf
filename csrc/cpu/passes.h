// SPDX-License-Identifier: Apache-2.0
//
// The vector passes over the float32 sums of a product, while these are in the first cache: bias,
// activation, gate and one rounding between the two products, base and one rounding after the
// second. Included once per isa_*.cpp. S is the dtype of the tensors, C that of the products.
#pragma once

constexpr int kBlockVectors = kBlockColumns / kLanes;

// The gate of each unit of a block: its adapter's entry of a row. Units of one adapter are
// neighbours, so most vectors name a single one.
static inline void expand_gate(const float* gate, const int32_t* adapter, int64_t columns,
                               vf* out) {
  for (int v = 0; v * kLanes < columns; v++) {
    const int32_t* of = adapter + v * kLanes;
    if (of[0] == of[kLanes - 1]) {
      out[v] = splat(gate[of[0]]);
      continue;
    }
    float lanes[kLanes];
    for (int i = 0; i < kLanes; i++) lanes[i] = gate[of[i]];
    out[v] = load(lanes);
  }
}

// Zero times infinity is NaN: where the gate is exactly 0 nothing of the unit is used.
static inline vf scale(vf value, vf gate) { return gate == 0.f ? vf{} : value * gate; }

// Writes zeros beyond the columns of a block, up to whole panels, so that the second product may
// read them.
template <class C>
static inline void fill_zero(C* row, int64_t from, int64_t to) {
  if (to > from) memset((void*)(row + from), 0, (size_t)(to - from) * sizeof(C));
}

// The part of `b` from a column on, at most kBlockColumns wide.
static inline UnitBlock part_of(const UnitBlock& b, int64_t column) {
  UnitBlock part = b;
  const int64_t left = b.columns - column;
  part.columns = left < kBlockColumns ? left : kBlockColumns;
  part.padded = b.padded - column < kBlockColumns ? b.padded - column : kBlockColumns;
  part.unit = b.unit + column;
  part.c = b.c + column;
  return part;
}

template <class S, class C, Activation A>
static void forward_part(const UnitBlock& b, C* gated) {
  const int64_t columns = b.columns;
  const int32_t* adapter = b.adapter_of_unit + b.unit;
  const int64_t at = b.token * b.n + b.unit;
  S* saved = b.saved ? (S*)b.saved + at : nullptr;
  S* hidden = b.hidden ? (S*)b.hidden + at : nullptr;
  vf gate[kBlockVectors], bias[kBlockVectors];
  for (int v = 0; v * kLanes < columns; v++) {
    bias[v] = b.bias ? load(b.bias + b.unit + v * kLanes) : vf{};
  }
  int64_t gate_row = b.token / b.tokens_per_row - 1, next_run = 0;
  const float* c = b.c;
  for (int64_t row = 0; row < b.rows; row++) {
    if (row == next_run) {
      gate_row++;
      next_run = (gate_row + 1) * b.tokens_per_row - b.token;
      expand_gate(b.gate + gate_row * b.gate_row, adapter, columns, gate);
    }
    const auto step = [&](int v, int64_t count) __attribute__((always_inline)) {
      const int64_t from = v * kLanes;
      const vf z = load(c + from) + bias[v];
      const vf activated = activate<A>(z);
      if (saved) store_upto(saved + from, keeps_pre_activation(A) ? z : activated, count);
      if (hidden) store_upto(hidden + from, activated, count);
      if (gated) store(gated + from, scale(activated, gate[v]));
    };
    int v = 0;
    for (; (v + 1) * kLanes <= columns; v++) step(v, kLanes);
    if (v * kLanes < columns) step(v, columns - v * kLanes);
    if (gated) {
      fill_zero(gated, columns, b.padded);
      gated += b.gated_row;
    }
    if (saved) saved += b.n;
    if (hidden) hidden += b.n;
    c += b.c_row;
  }
}

template <class S, class C, Activation A>
static void forward_pass(const UnitBlock& b) {
  for (int64_t column = 0; column < b.columns; column += kBlockColumns) {
    forward_part<S, C, A>(part_of(b, column), b.gated ? (C*)b.gated + column : nullptr);
  }
}

// Adds the sum over each adapter's units of a block to its entry of `d_gate`.
static inline void add_by_adapter(const vf* products, const int32_t* adapter, int64_t columns,
                                  double* d_gate) {
  vf pending = vf{};
  int32_t pending_adapter = adapter[0];
  for (int v = 0; v * kLanes < columns; v++) {
    const int32_t* of = adapter + v * kLanes;
    if (of[0] == of[kLanes - 1]) {
      if (of[0] != pending_adapter) {
        d_gate[pending_adapter] += sum(pending);
        pending = vf{};
        pending_adapter = of[0];
      }
      pending += products[v];
      continue;
    }
    float lanes[kLanes];
    store(lanes, products[v]);
    float total = 0.f;
    int32_t current = of[0];
    // Lanes beyond the columns hold whatever an earlier product left there.
    const int64_t count = columns - v * kLanes < kLanes ? columns - v * kLanes : kLanes;
    for (int i = 0; i < count; i++) {
      if (of[i] != current) {
        d_gate[current] += total;
        total = 0.f;
        current = of[i];
      }
      total += lanes[i];
    }
    d_gate[current] += total;
  }
  d_gate[pending_adapter] += sum(pending);
}

template <class S, class C, Activation A>
static void backward_part(const UnitBlock& b, C* gated) {
  const int64_t columns = b.columns;
  const int32_t* adapter = b.adapter_of_unit + b.unit;
  const int64_t at = b.token * b.n + b.unit;
  const S* saved = (const S*)b.saved + at;
  const S* d_hidden = b.d_hidden ? (const S*)b.d_hidden + at : nullptr;
  S* d_z_out = b.d_z ? (S*)b.d_z + at : nullptr;
  S* kept = b.kept_gated ? (S*)b.kept_gated + at : nullptr;
  const float* c = b.c;
  const int64_t first_gate_row = b.token / b.tokens_per_row;
  vf gate[kBlockVectors], products[kBlockVectors];
  int64_t row = 0;
  for (int64_t gate_row = first_gate_row; row < b.rows; gate_row++) {
    // Tokens that share a row of the gate also share its gradient.
    int64_t end = (gate_row + 1) * b.tokens_per_row - b.token;
    if (end > b.rows) end = b.rows;
    expand_gate(b.gate + gate_row * b.gate_row, adapter, columns, gate);
    for (int v = 0; v * kLanes < columns; v++) products[v] = vf{};
    for (; row < end; row++) {
      const auto step = [&](int v, int64_t count) __attribute__((always_inline)) {
        const int64_t from = v * kLanes;
        const vf d_gated = load(c + from);
        vf activated;
        const vf slope = derivative<A>(load_upto(saved + from, count), activated);
        products[v] += d_gated * activated;
        if (kept) store_upto(kept + from, scale(activated, gate[v]), count);
        vf d_h = scale(d_gated, gate[v]);
        if (d_hidden) d_h += load_upto(d_hidden + from, count);
        // The slope of an overflowed unit is not a number; a zero stops that too.
        const vf d_z = A == Activation::identity ? d_h : d_h == 0.f ? vf{} : d_h * slope;
        if (d_z_out) store_upto(d_z_out + from, d_z, count);
        if (gated) store(gated + from, d_z);
      };
      int v = 0;
      for (; (v + 1) * kLanes <= columns; v++) step(v, kLanes);
      if (v * kLanes < columns) step(v, columns - v * kLanes);
      if (gated) {
        fill_zero(gated, columns, b.padded);
        gated += b.gated_row;
      }
      c += b.c_row;
      saved += b.n;
      if (d_hidden) d_hidden += b.n;
      if (d_z_out) d_z_out += b.n;
      if (kept) kept += b.n;
    }
    if (b.d_gate) {
      double* d_gate = b.d_gate + (gate_row - first_gate_row) * b.d_gate_row;
      add_by_adapter(products, adapter, columns, d_gate);
    }
  }
}

template <class S, class C, Activation A>
static void backward_pass(const UnitBlock& b) {
  for (int64_t column = 0; column < b.columns; column += kBlockColumns) {
    backward_part<S, C, A>(part_of(b, column), b.gated ? (C*)b.gated + column : nullptr);
  }
}

template <class S, class B>
static void output_pass(const OutputBlock& b) {
  const float* c = b.c;
  S* out = (S*)b.out;
  const B* base = (const B*)b.base;
  for (int64_t row = 0; row < b.rows; row++) {
    const auto step = [&](int64_t from, int64_t count) __attribute__((always_inline)) {
      vf value = load(c + from);
      if (base) value += load_upto(base + from, count);
      store_upto(out + from, value, count);
    };
    int64_t from = 0;
    for (; from + kLanes <= b.columns; from += kLanes) step(from, kLanes);
    if (from < b.columns) step(from, b.columns - from);
    c += b.c_row;
    out += b.out_row;
    if (base) base += b.base_row;
  }
}
