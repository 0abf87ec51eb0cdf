// SPDX-License-Identifier: Apache-2.0
//
// The work of one block of tokens: first product, pass, second product, pass. Part of
// adapter_mixture.cpp, which hands the blocks to threads.
#pragma once

#include <algorithm>
#include <cstring>

#include "plan.h"
#include "threads.h"

namespace pemt_fast::cpu {

// Steps of a sum over the input; the last one takes what is left.
constexpr int64_t kMostSteps = 128;

struct Range {
  int64_t begin, end;
};

// What one thread computes in.
struct Scratch {
  float* c;       // sums of a block
  float* x;       // x in the compute dtype, where it has to be converted
  void* units;    // hidden units of a block in the compute dtype
  bool* used;     // [adapters]
  Range* ranges;  // of units in use, none longer than a step of the sums
};

template <int WRITE>
void prefetch_rows(const void* data, int64_t row_bytes, int64_t rows, int64_t bytes) {
  const char* at = (const char*)data;
  for (int64_t row = 0; row < rows; row++, at += row_bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, WRITE);
  }
}

class Runner {
 public:
  Runner(const Kernels& kernels, const Walk& walk, const Plan& plan)
      : k_(kernels),
        w_(walk),
        plan_(plan),
        converts_(w_.storage != Dtype::f32 && !w_.bf16),
        pads_(w_.bf16 && k_.panel_bf16 != kPanel && w_.width_in % 2 != 0) {}

  size_t scratch_bytes() const {
    return sums_bytes() + x_bytes() + (plan_.fused ? units_bytes() : 0) + used_bytes() +
           ranges_bytes();
  }
  size_t units_bytes() const {
    return Workspace::round_up(size_t(plan_.rows * plan_.units_row) * (w_.bf16 ? 2 : 4));
  }
  // Partial sums of d_gate: [column tasks][blocks][runs][adapters].
  int64_t d_gate_parts() const { return plan_.fused ? 1 : unit_tasks(); }
  // Of the first product; the last one is that with b_up, if there is one.
  int64_t unit_tasks() const {
    return ceil_div(w_.units, plan_.unit_columns) + (w_.d_gate && w_.has_gate_bias);
  }
  int64_t d_gate_size() const {
    return w_.d_gate ? d_gate_parts() * plan_.blocks * plan_.runs * w_.adapters : 0;
  }

  Scratch scratch(char* memory, void* shared_units) const {
    Scratch s;
    s.c = (float*)memory;
    memory += sums_bytes();
    s.x = (float*)memory;
    memory += x_bytes();
    s.used = (bool*)memory;
    memory += used_bytes();
    s.ranges = (Range*)memory;
    memory += ranges_bytes();
    s.units = plan_.fused ? (void*)memory : shared_units;
    return s;
  }

  void block(int64_t index, const Scratch& s, double* d_gate) const {
    const int64_t token = index * plan_.rows;
    const int64_t rows = std::min(plan_.rows, w_.tokens - token);
    const void* x = convert(token, rows, s);
    int64_t ranges = find_ranges(token, rows, s);
    double* part = d_gate ? d_gate + index * plan_.runs * w_.adapters : nullptr;
    unit_columns(x, token, rows, 0, w_.units, ranges, s, part);
    if (part && w_.has_gate_bias) gate_bias(x, token, rows, s, part);
    if (w_.out == nullptr) return;
    ranges = add_bias_range(token, rows, ranges, s);
    for (int64_t column = 0; column < w_.width_out; column += plan_.out_columns) {
      output(token, rows, column, std::min(column + plan_.out_columns, w_.width_out), ranges, s);
    }
  }

  void unit_task(int64_t task, const Scratch& s, double* d_gate) const {
    const void* x = convert(0, w_.tokens, s);
    const int64_t first = task * plan_.unit_columns;
    double* part = d_gate ? d_gate + task * plan_.runs * w_.adapters : nullptr;
    if (first >= w_.units) return gate_bias(x, 0, w_.tokens, s, part);
    unit_columns(x, 0, w_.tokens, first, std::min(first + plan_.unit_columns, w_.units),
                 find_ranges(0, w_.tokens, s), s, part);
  }

  void output_task(int64_t task, int64_t ranges, const Scratch& s) const {
    const int64_t column = task * plan_.out_columns;
    output(0, w_.tokens, column, std::min(column + plan_.out_columns, w_.width_out), ranges, s);
  }

  // The ranges of the second product, and the gates beside the hidden units. Once per thread.
  int64_t second_ranges(const Scratch& s) const {
    return add_bias_range(0, w_.tokens, find_ranges(0, w_.tokens, s), s);
  }

 private:
  size_t sums_bytes() const {
    const int64_t columns = std::max(plan_.unit_columns, plan_.out_columns);
    return Workspace::round_up(size_t(plan_.rows * round_up(columns, kBlockColumns)) * 4);
  }
  size_t x_bytes() const {
    return converts_ || pads_ ? Workspace::round_up(size_t(plan_.rows * (w_.width_in + 1)) * 4) : 0;
  }
  size_t used_bytes() const { return Workspace::round_up(size_t(w_.adapters)); }
  size_t ranges_bytes() const {
    return Workspace::round_up(size_t(w_.units / kPanel + w_.units / plan_.k_step + 4) *
                               sizeof(Range));
  }

  // x of the block as the product reads it: itself, or a copy in the compute dtype, or one with
  // rows of whole pairs.
  const void* convert(int64_t token, int64_t rows, const Scratch& s) const {
    const char* x = (const char*)w_.x + token * w_.x_row * size_of(w_.storage);
    if (pads_) {
      uint16_t* to = (uint16_t*)s.x;
      for (int64_t row = 0; row < rows; row++, to += w_.width_in + 1) {
        std::memcpy(to, x + row * w_.x_row * 2, size_t(w_.width_in) * 2);
        to[w_.width_in] = 0;
      }
      return s.x;
    }
    if (!converts_) return x;
    for (int64_t row = 0; row < rows; row++) {
      k_.to_f32[(int)w_.storage](x + row * w_.x_row * size_of(w_.storage), w_.width_in,
                                 s.x + row * w_.width_in);
    }
    return s.x;
  }

  // The units that some token of the block uses, in whole panels; neighbours joined as far as a
  // sum goes. All of them unless the walk skips.
  int64_t find_ranges(int64_t token, int64_t rows, const Scratch& s) const {
    const int64_t longest = rows <= kFewRows ? w_.units : plan_.k_step;
    int64_t count = 0;
    if (!w_.skips_unused) {
      for (int64_t unit = 0; unit < w_.units; unit += longest) {
        s.ranges[count++] = {unit, std::min(unit + longest, w_.units)};
      }
      return count;
    }
    const UnitBlock& b = w_.block;
    std::memset(s.used, 0, size_t(w_.adapters));
    for (int64_t g = token / b.tokens_per_row; g <= (token + rows - 1) / b.tokens_per_row; g++) {
      for (int64_t e = 0; e < w_.adapters; e++) s.used[e] |= b.gate[g * b.gate_row + e] != 0.f;
    }
    const int64_t panel = w_.bf16 ? k_.panel_bf16 : kPanel;
    for (int64_t unit = 0; unit < w_.units; unit += panel) {
      const int64_t end = std::min(unit + panel, w_.units);
      bool used = false;
      for (int32_t e = b.adapter_of_unit[unit]; e <= b.adapter_of_unit[end - 1]; e++) {
        used |= s.used[e];
      }
      if (!used) continue;
      Range* last = s.ranges + count - 1;
      if (count > 0 && last->end == unit && end - last->begin <= longest) {
        last->end = end;
      } else {
        s.ranges[count++] = {unit, end};
      }
    }
    return count;
  }

  // Adds the terms of b_up, and writes their left side: the gates of the block's tokens.
  int64_t add_bias_range(int64_t token, int64_t rows, int64_t count, const Scratch& s) const {
    if (!w_.has_up_bias) return count;
    const UnitBlock& b = w_.block;
    const int64_t element = w_.bf16 ? 2 : 4, terms = terms_of(w_);
    for (int64_t row = 0; row < rows; row++) {
      const float* gate = b.gate + (token + row) / b.tokens_per_row * b.gate_row;
      char* units = (char*)s.units + (row * plan_.units_row + w_.units) * element;
      split_gate(gate, w_.adapters, w_.bf16, units);
      std::memset(units + (terms - w_.units) * element, 0,
                  size_t(std::min(round_up(terms, kPanel), plan_.units_row) - terms) * element);
    }
    Range* last = s.ranges + count - 1;
    if (w_.second.panels && count > 0 && last->end == w_.units) {
      last->end = terms;
      return count;
    }
    int64_t begin = w_.units;
    if (w_.second.panels && w_.bf16 && begin % 2 != 0) {
      // Pairs start at even terms: the last unit, which nobody uses here, comes along as a zero.
      begin--;
      for (int64_t row = 0; row < rows; row++) {
        ((uint16_t*)s.units)[row * plan_.units_row + begin] = 0;
      }
    }
    // Rows of b_up in memory are read once for each part.
    const int64_t step = w_.second.panels ? terms - begin : w_.adapters;
    for (int64_t at = begin; at < terms; at += step) s.ranges[count++] = {at, at + step};
    return count;
  }

  // The units of [first, last) that are in use, in blocks of columns.
  void unit_columns(const void* x, int64_t token, int64_t rows, int64_t first, int64_t last,
                    int64_t ranges, const Scratch& s, double* d_gate) const {
    for (int64_t i = 0; i < ranges; i++) {
      const int64_t begin = std::max(first, s.ranges[i].begin);
      const int64_t end = std::min(last, s.ranges[i].end);
      for (int64_t unit = begin; unit < end; unit += plan_.unit_columns) {
        units(x, token, rows, unit, std::min(unit + plan_.unit_columns, end), s, d_gate);
      }
    }
  }

  // c (+)= a * columns [first, last) of the operand, summed over a range of its `all` terms.
  void multiply(const Operand& operand, bool sums_over_width, const void* a, int64_t a_row,
                int64_t rows, Range range, int64_t all, int64_t first, int64_t last, float* c,
                int64_t c_row, bool accumulate) const {
    const bool dots = !operand.panels && sums_over_width;
    Product p{};
    p.a = (const char*)a + range.begin * (w_.bf16 ? 2 : 4);
    p.a_row = a_row;
    p.a_step = w_.bf16 ? 2 : 1;
    p.c = c;
    p.c_row = c_row;
    p.m = rows;
    p.n = last - first;
    p.k = range.end - range.begin;
    p.accumulate = accumulate;
    if (operand.panels) {
      const int64_t panel = w_.bf16 ? k_.panel_bf16 : kPanel;
      p.b_row = w_.bf16 ? 2 * panel : panel;
      p.b_panel = (w_.bf16 ? round_up(all, 2) : all) * panel;
      p.b = (const char*)operand.data +
            (first / panel * p.b_panel + range.begin * panel) * (w_.bf16 ? 2 : 4);
      return (w_.bf16 ? k_.panels_bf16 : k_.panels_f32)(p);
    }
    p.b_row = operand.row;
    p.b_panel = kPanel;
    if (!dots && range.begin >= w_.units) {
      p.b = (const char*)operand.bias +
            ((range.begin - w_.units) % w_.adapters * operand.row + first) * size_of(operand.dtype);
    } else {
      const int64_t at =
          dots ? first * operand.row + range.begin : range.begin * operand.row + first;
      p.b = (const char*)operand.data + at * size_of(operand.dtype);
    }
    if (w_.bf16) return (dots ? k_.dots_bf16 : k_.rows_bf16)(p);
    (dots ? k_.dots_f32 : k_.rows_f32)[(int)operand.dtype](p);
  }

  // All terms of a product, a few rows at a time: before(row, rows) is called ahead of their first
  // term, after(row, rows, c) while the sums are in the first cache.
  template <class Before, class After>
  void multiply_rows(const Operand& operand, bool sums_over_width, const void* a, int64_t a_row,
                     int64_t rows, const Range* ranges, int64_t count, int64_t all, int64_t first,
                     int64_t last, float* c, int64_t c_row, const Before& before,
                     const After& after) const {
    const int64_t a_bytes = a_row * (w_.bf16 ? 2 : 4);
    for (int64_t i = 0; i < std::max<int64_t>(count, 1); i++) {
      for (int64_t row = 0; row < rows; row += k_.rows_at_once) {
        const int64_t block = std::min(k_.rows_at_once, rows - row);
        // Sums that wait for another range need a place of their own.
        float* sums = count > 1 ? c + row * c_row : c;
        if (i == 0) before(row, block);
        if (i < count) {
          multiply(operand, sums_over_width, (const char*)a + row * a_bytes, a_row, block,
                   ranges[i], all, first, last, sums, c_row, i > 0);
        } else {
          std::memset(sums, 0, size_t(block * c_row) * sizeof(float));
        }
        if (i + 1 >= count) after(row, block, sums);
      }
    }
  }

  // The terms of a sum over the input, in steps. Dots keep one sum per lane; they need no steps.
  int64_t input_ranges(const Operand& operand, int64_t rows, Range* ranges) const {
    const bool whole = rows <= kFewRows || !operand.panels;
    const int64_t step = whole ? std::max<int64_t>(w_.width_in, 1) : plan_.k_step;
    int64_t count = 0;
    for (int64_t k = 0; k < w_.width_in && count < kMostSteps; k += step, count++) {
      ranges[count] = {k, count + 1 < kMostSteps ? std::min(k + step, w_.width_in) : w_.width_in};
    }
    return count;
  }

  int64_t input_row() const { return pads_ ? w_.width_in + 1 : converts_ ? w_.width_in : w_.x_row; }

  // d_gate += x * b_up^T, summed over the tokens of each run.
  void gate_bias(const void* x, int64_t token, int64_t rows, const Scratch& s,
                 double* d_gate) const {
    Range ranges[kMostSteps];
    const int64_t count = input_ranges(w_.gate_bias, rows, ranges);
    const int64_t per_row = w_.block.tokens_per_row;
    for (int64_t first = 0; first < w_.adapters; first += kBlockColumns) {
      const int64_t last = std::min(first + kBlockColumns, w_.adapters);
      multiply_rows(
          w_.gate_bias, true, x, input_row(), rows, ranges, count, w_.width_in, first, last, s.c,
          kBlockColumns, [](int64_t, int64_t) {},
          [&](int64_t row, int64_t block, const float* c) {
            for (int64_t t = row; t < row + block; t++, c += kBlockColumns) {
              const int64_t run = (token + t) / per_row - token / per_row;
              for (int64_t e = first; e < last; e++) d_gate[run * w_.adapters + e] += c[e - first];
            }
          });
    }
  }

  void units(const void* x, int64_t token, int64_t rows, int64_t first, int64_t last,
             const Scratch& s, double* d_gate) const {
    const int64_t c_row = round_up(last - first, kBlockColumns);
    Range ranges[kMostSteps];
    const int64_t count = input_ranges(w_.first, rows, ranges);
    UnitBlock b = w_.block;
    b.c_row = c_row;
    b.columns = last - first;
    b.unit = first;
    b.padded = std::min(round_up(last, kPanel), plan_.units_row) - first;
    b.gated_row = plan_.units_row;
    b.n = w_.units;
    b.d_gate_row = w_.adapters;
    multiply_rows(
        w_.first, true, x, input_row(), rows, ranges, count, w_.width_in, first, last, s.c, c_row,
        [](int64_t, int64_t) {},
        [&](int64_t row, int64_t block, const float* c) {
          b.c = c;
          b.rows = block;
          b.token = token + row;
          if (w_.out != nullptr) {
            b.gated = (char*)s.units + (row * plan_.units_row + first) * (w_.bf16 ? 2 : 4);
          }
          if (d_gate != nullptr) {
            const int64_t run = b.token / b.tokens_per_row - token / b.tokens_per_row;
            b.d_gate = d_gate + run * w_.adapters;
          }
          w_.pass(b);
        });
  }

  void output(int64_t token, int64_t rows, int64_t first, int64_t last, int64_t ranges,
              const Scratch& s) const {
    const int64_t c_row = round_up(last - first, kBlockColumns);
    const int64_t element = size_of(w_.storage);
    const OutputPass pass = k_.output[(int)w_.storage][(int)(w_.base ? w_.base_dtype : w_.storage)];
    OutputBlock b{};
    b.c_row = c_row;
    b.columns = last - first;
    b.out_row = w_.width_out;
    b.base_row = w_.base_row;
    multiply_rows(
        w_.second, false, s.units, plan_.units_row, rows, s.ranges, ranges, terms_of(w_), first,
        last, s.c, c_row,
        [&](int64_t row, int64_t block) {
          point_at(b, token + row, first);
          prefetch_rows<1>(b.out, b.out_row * element, block, b.columns * element);
          if (b.base) {
            prefetch_rows<0>(b.base, b.base_row * size_of(w_.base_dtype), block,
                             b.columns * size_of(w_.base_dtype));
          }
        },
        [&](int64_t row, int64_t block, const float* c) {
          point_at(b, token + row, first);
          b.c = c;
          b.rows = block;
          pass(b);
        });
  }

  void point_at(OutputBlock& b, int64_t token, int64_t column) const {
    b.out = (char*)w_.out + (token * w_.width_out + column) * size_of(w_.storage);
    if (w_.base != nullptr) {
      b.base = (const char*)w_.base + (token * w_.base_row + column) * size_of(w_.base_dtype);
    }
  }

  const Kernels& k_;
  const Walk& w_;
  const Plan& plan_;
  const bool converts_;
  const bool pads_;
};

}  // namespace pemt_fast::cpu
