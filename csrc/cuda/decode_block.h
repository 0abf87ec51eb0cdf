// SPDX-License-Identifier: Apache-2.0
//
// What a block of the decode kernel does between and after the products. Included after
// `device.cuh`, or after its emulation in tests/helpers/cuda: whatever is not C++ is a function
// from there.
#pragma once

#include "decode.h"

namespace pemt_fast::cuda {

DEVICE float activated(float z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0.f ? 0.f : z;  // what is not a number stays so
    case Activation::gelu:
      return 0.5f * z * complementary_error(-0.70710678f * z);
    case Activation::gelu_tanh:
      return 0.5f * z * (1.f + hyperbolic_tangent(0.79788456f * (z + 0.044715f * z * z * z)));
    case Activation::silu:
      return z / (1.f + exponential(-z));
    default:
      return z;
  }
}

DEVICE float value_at(const Values& values, int64_t i) {
  switch (values.dtype) {
    case Dtype::bf16:
      return to_float(((const BFloat16*)values.data)[i]);
    case Dtype::f16:
      return to_float(((const Float16*)values.data)[i]);
    default:
      return ((const float*)values.data)[i];
  }
}

// The mixture, or the target adapter as if it were one.
template <class T>
struct DecodeBlock {
  const Decode& call;
  const DecodePlan& plan;
  const Adapters& adapters;
  const T* x;
  int64_t x_row;
  int d;
  Values base;
  int64_t base_row;
  float* sums;           // [part][own unit or column][token + 1]
  int* poisoned;         // [token]
  int* flag;             // of the block
  int* adapter_of_unit;  // [unit] of the slice
  T* hidden;             // [token][unit], rows of units + 8
  int slice, rank;

  DEVICE DecodeBlock(const Decode& c, const DecodePlan& p, bool target, char* shared)
      : call(c), plan(p), adapters(target ? c.target : c.mixture) {
    x = (const T*)(target ? c.out : c.x);
    x_row = target ? c.h : c.x_row;
    d = target ? c.h : c.d;
    base = target ? Values{c.out, c.dtype} : c.base;
    base_row = target ? c.h : c.base_row;
    slice = target ? 0 : block_index() / p.cluster;
    rank = block_index() % p.cluster;
    sums = (float*)shared;
    poisoned = (int*)(shared + p.sums_bytes());
    flag = poisoned + p.tokens;
    adapter_of_unit = flag + 4;
    hidden = (T*)(adapter_of_unit + p.units);
  }

  DEVICE int hidden_row() const { return plan.units + 8; }
  DEVICE int first_unit() const { return slice * plan.units; }
  DEVICE float gate(int token, int adapter) const {
    if (adapters.gate.data == nullptr) return adapters.scale;
    return value_at(adapters.gate,
                    int64_t(token / adapters.tokens_per_gate) * adapters.adapters + adapter);
  }
  // Whose unit it is, of the slice.
  DEVICE int adapter_of(int unit) const { return adapter_of_unit[unit - first_unit()]; }
  DEVICE void sync_all() const {
    if (plan.cluster > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
  }

  DEVICE int found_adapter(int unit) const {
    if (adapters.rank > 0) return min_of(unit / adapters.rank, adapters.adapters - 1);
    int low = 0, high = adapters.adapters - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (unit < call.ends[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // Whose units these are, and whether some gate is 0: it must keep out what is not finite behind
  // it, and without one there is nothing to do.
  DEVICE void prepare() {
    for (int t = thread(); t < plan.tokens; t += kThreads) poisoned[t] = 0;
    for (int u = thread(); u < plan.units; u += kThreads) {
      adapter_of_unit[u] = found_adapter(first_unit() + u);
    }
    if (thread() == 0) *flag = adapters.gate.data == nullptr && adapters.scale == 0.f;
    sync_block();
    if (adapters.gate.data != nullptr) {
      const int gates = call.tokens / adapters.tokens_per_gate * adapters.adapters;
      for (int i = thread(); i < gates; i += kThreads) {
        if (value_at(adapters.gate, i) == 0.f) *flag = 1;
      }
    }
    sync_block();
  }

  DEVICE float gated_unit(int token, int u) const {
    const int own = plan.own_units(), unit = first_unit() + rank * own + u;
    if (token >= call.tokens || unit >= adapters.units) return 0.f;
    const float g = gate(token, adapter_of(unit));
    float z = adapters.b_down.data ? value_at(adapters.b_down, unit) : 0.f;
    for (int part = 0; part < plan.parts_d; part++) {
      z += sums[(part * own + u) * plan.sums_row() + token];
    }
    return g == 0.f ? 0.f : activated(z, adapters.activation) * g;
  }

  // Gated hidden units of this block, into the shared memory of all blocks of the cluster, four at
  // a time. Units and tokens that there are not are 0.
  DEVICE void share_hidden() {
    struct alignas(4 * sizeof(T)) Four {
      T values[4];
    };
    const int fours = plan.own_units() / 4;
    for (int i = thread(); i < fours * plan.tokens; i += kThreads) {
      const int token = i / fours, u = i % fours * 4;
      Four four;
      UNROLL for (int j = 0; j < 4; j++) four.values[j] = from_float<T>(gated_unit(token, u + j));
      T* own = hidden + token * hidden_row() + rank * plan.own_units() + u;
      for (int to = 0; to < plan.cluster; to++) *(Four*)peer(own, to) = four;
    }
    sync_all();
  }

  // A weight that is not finite: who uses its adapter gets no finite result, who does not must not
  // meet it.
  DEVICE void poison(int unit) {
    for (int t = 0; t < call.tokens; t++) {
      if (gate(t, adapter_of(unit)) != 0.f) poisoned[t] = 1;
    }
  }

  // Where the columns of this block end, in the output.
  DEVICE int end() const { return min_of((rank + 1) * plan.columns, call.h); }

  // The columns of a pass: sums of the parts, and with one slice everything that is not a product.
  DEVICE void finish_pass(int first) {
    const int columns = min_of(plan.pass, end() - first);
    for (int i = thread(); i < columns * call.tokens; i += kThreads) {
      const int token = i / columns, column = i % columns;
      float value = poisoned[token] ? not_a_number() : 0.f;
      for (int part = 0; part < plan.parts_n; part++) {
        value += sums[(part * plan.pass + column) * plan.sums_row() + token];
      }
      if (plan.slices == 1) {
        write(token, first + column, value);
      } else {
        const int64_t row = int64_t(slice) * call.tokens + token;
        call.workspace[row * call.h + first + column] = value;
      }
    }
  }

  // Whether the other clusters have written their sums; the counter is 0 again then.
  DEVICE bool comes_last() {
    make_visible();
    sync_all();
    if (rank == 0 && thread() == 0) {
      const bool last = count_up(call.ticket) == unsigned(plan.slices - 1);
      if (last) *call.ticket = 0;
      for (int to = 0; to < plan.cluster; to++) *peer(flag, to) = last;
    }
    sync_all();
    make_visible();
    return *flag != 0;
  }

  // The cluster that comes last adds up the slices, in their order.
  DEVICE void add_slices() {
    const int first = rank * plan.columns, columns = end() - first;
    for (int i = thread(); i < columns * call.tokens; i += kThreads) {
      const int token = i / columns, column = first + i % columns;
      float value = 0.f;
      for (int s = 0; s < plan.slices; s++) {
        const int64_t row = int64_t(s) * call.tokens + token;
        value += load_written(call.workspace + row * call.h + column);
      }
      write(token, column, value);
    }
  }

  DEVICE void write(int token, int column, float value) {
    if (adapters.b_up.data) {
      for (int e = 0; e < adapters.adapters; e++) {
        const float g = gate(token, e);
        if (g != 0.f) value += g * value_at(adapters.b_up, int64_t(e) * call.h + column);
      }
    }
    if (base.data) value += value_at(base, token * base_row + column);
    ((T*)call.out)[int64_t(token) * call.h + column] = from_float<T>(value);
  }
};

}  // namespace pemt_fast::cuda
