// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>

#include "isa.h"

namespace pemt_fast::cpu {
namespace {

// Below this many cycles waking other threads costs more than they save.
constexpr double kParallelCycles = 16000;
constexpr int64_t kMostRows = 192, kFewestRows = 24;

// Terms of a float32 sum between additions to memory.
constexpr int64_t kFloatTerms = 64;

bool worth_threads(const Walk& w) {
  const double weights = double(w.units) * double(w.width_in + (w.out ? w.width_out : 0));
  const double products = double(w.tokens) * weights / (w.bf16 ? 64 : 32);
  const double reading = weights * double(size_of(w.first.dtype)) / 16;
  return std::max(products, reading) > kParallelCycles;
}

int64_t columns_of_task(int64_t columns, int64_t rows, int threads, int64_t panel) {
  const int64_t share = round_up(ceil_div(columns, threads), panel);
  // Few rows: long runs through memory. Else blocks whose sums stay in the first cache.
  if (rows <= kFewRows) return std::max<int64_t>(share, panel);
  return std::clamp<int64_t>(share, panel, kBlockColumns);
}

}  // namespace

Plan make_plan(const Kernels& kernels, const Walk& w, int threads) {
  Plan plan;
  plan.parallel = threads > 1 && worth_threads(w);
  if (!plan.parallel) threads = 1;
  const int64_t element = w.bf16 ? 2 : 4;
  const int64_t row_bytes = (w.width_in + w.units) * element;
  const int64_t fit = caches().l2 * 3 / 4 / std::max<int64_t>(row_bytes, 1);
  int64_t rows = std::clamp<int64_t>(fit, kFewestRows, kMostRows);
  if (plan.parallel) {
    plan.fused = w.tokens >= threads * kFewestRows;
    // Four blocks per thread level out a slow core; smaller ones would read the weights too often.
    rows = std::min(rows, std::max<int64_t>(2 * kFewestRows, ceil_div(w.tokens, 4 * threads)));
    int64_t blocks = ceil_div(w.tokens, rows);
    if (plan.fused && blocks < 4 * threads) blocks = round_up(blocks, threads);
    rows = ceil_div(w.tokens, blocks);
  }
  plan.rows = plan.fused ? std::max<int64_t>(std::min(rows, w.tokens), 1) : w.tokens;
  plan.blocks = ceil_div(w.tokens, plan.rows);
  const int64_t panel = w.bf16 ? kernels.panel_bf16 : kPanel;
  plan.unit_columns = plan.fused && plan.rows > kFewRows
                          ? kBlockColumns
                          : columns_of_task(w.units, plan.rows, threads, panel);
  plan.out_columns = plan.fused && plan.rows > kFewRows
                         ? kBlockColumns
                         : columns_of_task(w.width_out, plan.rows, threads, panel);
  // So much of 64 columns of a weight takes an eighth of the second cache; it is read once for
  // every few rows. Float32 takes short sums, which round better.
  plan.k_step = w.bf16
                    ? std::max<int64_t>(caches().l2 / 8 / (kBlockColumns * element) / 32 * 32, 128)
                    : kFloatTerms;
  plan.units_row = round_up(terms_of(w), kBlockColumns);
  const int64_t tokens_per_row = std::max<int64_t>(w.block.tokens_per_row, 1);
  plan.runs = (plan.rows - 1) / tokens_per_row + 2;
  return plan;
}

}  // namespace pemt_fast::cpu
