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
    case Activation::silu:
      return z / (1.f + exponential(-z));
    default:
      return z;
  }
}

template <class T>
struct DecodeBlock {
  const Decode& call;
  const DecodePlan& plan;
  float* sums;    // [part][own unit or column][token]
  T* hidden;      // [token][unit], rows of units + 8
  int* poisoned;  // [token]
  int* careful;   // whether some gate is 0
  int slice, rank;

  DEVICE DecodeBlock(const Decode& c, const DecodePlan& p, char* shared)
      : call(c), plan(p), slice(block_index() / p.cluster), rank(block_index() % p.cluster) {
    const size_t down = size_t(p.tokens) * p.parts_d * p.own_units() * 4;
    const size_t up = size_t(p.tokens) * p.parts_n * p.pass * 4;
    sums = (float*)shared;
    poisoned = (int*)(shared + (down > up ? down : up));
    careful = poisoned + p.tokens;
    hidden = (T*)(careful + 4);
  }

  DEVICE int hidden_row() const { return plan.units + 8; }
  DEVICE int first_unit() const { return slice * plan.units; }
  DEVICE float gate(int token, int adapter) const {
    return call.gate[token / call.tokens_per_gate * call.adapters + adapter];
  }

  // A gate that is 0 must keep out what is not finite behind it; without one there is nothing to
  // do.
  DEVICE void look_at_gates() {
    for (int t = thread(); t < plan.tokens; t += kThreads) poisoned[t] = 0;
    if (thread() == 0) *careful = 0;
    sync_block();
    const int rows = call.tokens / call.tokens_per_gate * call.adapters;
    for (int i = thread(); i < rows; i += kThreads) {
      if (call.gate[i] == 0.f) *careful = 1;
    }
    sync_block();
  }

  // Gated hidden units of this block, into the shared memory of all blocks of the cluster. Units
  // and tokens that there are not are 0.
  DEVICE void share_hidden() {
    const int own = plan.own_units();
    for (int i = thread(); i < own * plan.tokens; i += kThreads) {
      const int token = i / own, u = i % own, unit = first_unit() + rank * own + u;
      float value = 0.f;
      if (token < call.tokens && unit < call.units) {
        const float g = gate(token, call.adapter_of_unit[unit]);
        float z = call.b_down ? call.b_down[unit] : 0.f;
        for (int part = 0; part < plan.parts_d; part++) {
          z += sums[(part * own + u) * plan.tokens + token];
        }
        value = g == 0.f ? 0.f : activated(z, call.activation) * g;
      }
      const T rounded = from_float<T>(value);
      for (int to = 0; to < plan.cluster; to++) {
        peer(hidden, to)[token * hidden_row() + rank * own + u] = rounded;
      }
    }
    if (plan.cluster > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
  }

  // A weight that is not finite: who uses its adapter gets no finite result, who does not must not
  // meet it.
  DEVICE void poison(int unit) {
    for (int t = 0; t < call.tokens; t++) {
      if (gate(t, call.adapter_of_unit[unit]) != 0.f) poisoned[t] = 1;
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
        value += sums[(part * plan.pass + column) * plan.tokens + token];
      }
      if (plan.slices == 1) {
        write(token, first + column, value);
      } else {
        const int64_t row = int64_t(slice) * call.tokens + token;
        call.workspace[row * call.h + first + column] = value;
      }
    }
  }

  // The block that comes last adds up the slices, in their order.
  DEVICE void add_slices() {
    if (!arrives_last(call.tickets + rank, plan.slices, careful)) return;
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
    if (call.b_up) {
      for (int e = 0; e < call.adapters; e++) {
        const float g = gate(token, e);
        if (g != 0.f) value += g * call.b_up[int64_t(e) * call.h + column];
      }
    }
    if (call.base) value += to_float(((const T*)call.base)[token * call.base_row + column]);
    ((T*)call.out)[int64_t(token) * call.h + column] = from_float<T>(value);
  }
};

}  // namespace pemt_fast::cuda
