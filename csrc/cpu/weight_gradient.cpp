// SPDX-License-Identifier: Apache-2.0
//
// Gradients of the weights: [units, tokens] * [tokens, width]. The sum runs over tokens, many more
// than either size of the result, in blocks whose rows of x are packed into the first cache.
// Threads own different parts of the result: nothing is added across threads.
#include <algorithm>

#include "isa.h"
#include "plan.h"
#include "threads.h"

namespace pemt_fast::cpu {
namespace {

constexpr int64_t kMostUnits = 384;  // of a task: 96 KiB of sums
constexpr int64_t kFewUnits = 64;
constexpr int64_t kTaskUnits = 6;   // a multiple of the rows of a register tile
constexpr int64_t kChain = 16;      // token blocks in one sum; longer chains round worse
constexpr int64_t kMostBlocks = 4;  // of 64 columns in a task

struct Task {
  const WeightGradient* gradient;
  const void* units;  // unit values as left side, see convert_units
  int64_t column, columns_end, unit, units_count;
};

struct Sizes {
  int64_t tokens, units, token_step, task_units;
  Dtype storage;
  bool bf16;
  bool transposed;     // the left side is read along its rows
  int64_t token_room;  // of a transposed row
};

// Rows [token, token + count) and at most 64 columns of x as panels.
void pack_x(const Kernels& k, const Sizes& z, const WeightGradient& g, int64_t token, int64_t count,
            int64_t column, float* converted, void* panels) {
  const int64_t columns = std::min(kBlockColumns, g.width - column);
  const char* x = (const char*)g.x + (token * g.x_row + column) * size_of(z.storage);
  int64_t row = g.x_row;
  if (!z.bf16 && z.storage != Dtype::f32) {
    for (int64_t i = 0; i < count; i++) {
      k.to_f32[(int)z.storage](x + i * row * size_of(z.storage), columns,
                               converted + i * kBlockColumns);
    }
    x = (const char*)converted;
    row = kBlockColumns;
  }
  const int64_t wide = z.bf16 ? k.panel_bf16 : kPanel;
  const int64_t size = z.token_step * wide;
  for (int64_t at = 0; at < round_up(columns, kPanel); at += kPanel) {
    const int64_t offset = at / wide * size, inside = at % wide;
    if (z.bf16) {
      k.pack_bf16((const uint16_t*)x, row, columns, count, at,
                  (uint16_t*)panels + offset + 2 * inside, 2 * wide);
    } else {
      k.pack_f32((const float*)x, row, columns, count, at, (float*)panels + offset + inside, wide);
    }
  }
}

// totals += sums, or, for the first ones, totals = sums.
void add_sums(const float* sums, int64_t count, bool first, float* totals) {
  for (int64_t i = 0; i < count; i++) totals[i] = first ? sums[i] : totals[i] + sums[i];
}

// What a thread works in: the sums of one chain, and for each block of columns of its task the
// totals of all chains so far.
struct Memory {
  float *sums, *totals, *converted;
  void* panels;
};

// The sums of tokens [begin, end) for at most 64 columns.
void sum_chain(const Kernels& k, const Sizes& z, const Task& task, const Memory& memory,
               int64_t column, int64_t begin, int64_t end) {
  const WeightGradient& g = *task.gradient;
  Product p{};
  p.m = task.units_count;
  p.n = std::min(kBlockColumns, g.width - column);
  p.c = memory.sums;
  p.c_row = kBlockColumns;
  p.b = memory.panels;
  const int64_t wide = z.bf16 ? k.panel_bf16 : kPanel;
  p.b_row = z.bf16 ? 2 * wide : wide;
  p.b_panel = z.token_step * wide;
  const char* units = (const char*)task.units;
  int64_t token_bytes;
  if (z.transposed) {
    p.a_row = z.token_room;
    p.a_step = 2;
    units += task.unit * z.token_room * 2;
    token_bytes = 2;
  } else if (z.bf16) {
    p.a_row = 2;
    p.a_step = 2 * z.task_units;
    units += task.unit * round_up(z.tokens, 2) * 2;
    token_bytes = z.task_units * 2;
  } else {
    p.a_row = 1;
    p.a_step = z.units;
    units += task.unit * 4;
    token_bytes = z.units * 4;
  }
  for (int64_t token = begin; token < end; token += z.token_step) {
    p.k = std::min(z.token_step, end - token);
    pack_x(k, z, g, token, p.k, column, memory.converted, memory.panels);
    p.a = units + token * token_bytes;
    p.accumulate = token > begin;
    (z.bf16 ? k.panels_bf16 : k.panels_f32)(p);
  }
}

// Chain after chain, so that its unit values stay in the second cache for all columns of the task.
void run_task(const Kernels& k, const Sizes& z, const Task& task, const Memory& memory) {
  const WeightGradient& g = *task.gradient;
  const int64_t count = task.units_count * kBlockColumns, element = size_of(g.dtype);
  const int64_t chain = kChain * z.token_step;
  for (int64_t begin = 0; begin < z.tokens; begin += chain) {
    const int64_t end = std::min(begin + chain, z.tokens);
    float* totals = memory.totals;
    for (int64_t column = task.column; column < task.columns_end;
         column += kBlockColumns, totals += count) {
      sum_chain(k, z, task, memory, column, begin, end);
      if (z.tokens > chain) add_sums(memory.sums, count, begin == 0, totals);
      if (end < z.tokens) continue;
      const float* result = z.tokens > chain ? totals : memory.sums;
      for (int64_t unit = 0; unit < task.units_count; unit++) {
        char* out = (char*)g.d_weight + ((task.unit + unit) * g.width + column) * element;
        k.from_f32[(int)g.dtype](result + unit * kBlockColumns,
                                 std::min(kBlockColumns, g.width - column), out);
      }
    }
  }
}

// The unit values as the left side of a product: float32 [tokens, units], bfloat16 [units, tokens],
// or bfloat16 pairs of two tokens, [tokens / 2, task_units, 2] for the units of each task: rows of
// all units would often be a power of two apart, and so compete for the same lines of the first
// cache.
void convert_units(const Kernels& k, const Sizes& z, const WeightGradient& g, int64_t token,
                   int64_t count, void* out) {
  const void* values = g.unit_values;
  if (!z.bf16) {
    const int64_t at = token * z.units;
    k.to_f32[(int)g.units_dtype]((const char*)values + at * size_of(g.units_dtype), count * z.units,
                                 (float*)out + at);
    return;
  }
  if (z.transposed) {
    const uint16_t* from = (const uint16_t*)values + token * z.units;
    for (int64_t n = 0; n < z.units; n++) {
      uint16_t* to = (uint16_t*)out + n * z.token_room + token;
      for (int64_t t = 0; t < count; t++) to[t] = from[t * z.units + n];
      if (count % 2 != 0) to[count] = 0;
    }
    return;
  }
  for (int64_t t = token; t < token + count; t += 2) {
    const uint16_t* even = (const uint16_t*)values + t * z.units;
    const uint16_t* odd = t + 1 < z.tokens ? even + z.units : nullptr;
    uint32_t* pairs = (uint32_t*)out + t / 2 * z.task_units;
    for (int64_t n = 0; n < z.units; pairs += round_up(z.tokens, 2) / 2 * z.task_units) {
      const int64_t count_here = std::min(z.task_units, z.units - n);
      for (int64_t i = 0; i < count_here; i++, n++) {
        pairs[i] = even[n] | (odd ? (uint32_t)odd[n] << 16 : 0);
      }
    }
  }
}

}  // namespace

void run(const Kernels& kernels, const WeightGradient* gradients, int count, int64_t tokens,
         int64_t units, Dtype storage, bool bf16, int threads) {
  Sizes z{tokens,
          units,
          0,
          0,
          storage,
          bf16,
          bf16 && kernels.panel_bf16 != kPanel,
          round_up(tokens, 2)};
  // Token blocks: the packed columns of x take about two thirds of the first cache. Where there are
  // few units the float32 sums can afford to be shorter, which rounds better.
  z.token_step =
      std::max<int64_t>(caches().l1 * 2 / 3 / (kBlockColumns * (bf16 ? 2 : 4)) / 32 * 32, 64);
  if (!bf16 && units <= kFewUnits) z.token_step = 32;
  const bool converts = bf16 || gradients[0].units_dtype != Dtype::f32;
  if (double(tokens) * double(units) * double(gradients[0].width) < 1 << 18) threads = 1;

  // Enough tasks for all threads, each with as many units as its sums allow.
  int64_t blocks = 0;
  for (int i = 0; i < count; i++) blocks += ceil_div(gradients[i].width, kBlockColumns);
  const int64_t cuts = std::max(ceil_div(units, kMostUnits), ceil_div(2 * threads, blocks));
  z.task_units = round_up(ceil_div(units, cuts), kTaskUnits);
  const int64_t unit_tasks = ceil_div(units, z.task_units);
  const int64_t task_blocks =
      std::clamp<int64_t>(blocks * unit_tasks / (4 * threads), 1, kMostBlocks);
  const int64_t task_columns = task_blocks * kBlockColumns;
  int64_t column_tasks = 0;
  for (int i = 0; i < count; i++) column_tasks += ceil_div(gradients[i].width, task_columns);

  const size_t converted_units =
      converts ? Workspace::round_up(size_t(round_up(tokens, 2) * unit_tasks * z.task_units) *
                                     (bf16 ? 2 : 4))
               : 0;
  const size_t sums = Workspace::round_up(size_t(z.task_units * kBlockColumns) * 4);
  const size_t converted = Workspace::round_up(size_t(z.token_step * kBlockColumns) * 4);
  const size_t each = sums * size_t(1 + task_blocks) + 2 * converted;
  char* memory = (char*)Workspace::of_this_thread().reserve(each * size_t(threads) +
                                                            converted_units * size_t(count));
  char* unit_values = memory + each * size_t(threads);

  constexpr int64_t kConvertTokens = 64;  // even: pairs stay together
  Tasks conversions(converts ? count * ceil_div(tokens, kConvertTokens) : 0);
  Tasks tasks(column_tasks * unit_tasks);
  parallel(threads, [&](int thread) {
    if (thread < threads) {
      for (int64_t i; conversions.next(i);) {
        const int64_t token = i / count * kConvertTokens;
        convert_units(kernels, z, gradients[i % count], token,
                      std::min(kConvertTokens, tokens - token),
                      unit_values + size_t(i % count) * converted_units);
      }
    }
    if (threads > 1) barrier();
    if (thread >= threads) return;
    char* own = memory + size_t(thread) * each;
    for (int64_t i; tasks.next(i);) {
      int64_t column = i % column_tasks * task_columns;
      int which = 0;
      while (column >= round_up(gradients[which].width, task_columns)) {
        column -= round_up(gradients[which++].width, task_columns);
      }
      const int64_t unit = i / column_tasks * z.task_units;
      const Task task{
          gradients + which,
          converts ? unit_values + size_t(which) * converted_units : gradients[which].unit_values,
          column,
          std::min(column + task_columns, gradients[which].width),
          unit,
          std::min(z.task_units, units - unit)};
      run_task(kernels, z, task,
               {(float*)own, (float*)(own + sums), (float*)(own + sums * size_t(1 + task_blocks)),
                own + sums * size_t(1 + task_blocks) + converted});
    }
    kernels.release();
  });
}

}  // namespace pemt_fast::cpu
