// SPDX-License-Identifier: Apache-2.0
#include "adapter_mixture.h"

#include <vector>

#include "block.h"

namespace pemt_fast::cpu {
namespace {

// Sums the parts of d_gate in a fixed order.
void sum_d_gate(const Walk& w, const Plan& plan, int64_t parts, const double* d_gate) {
  const int64_t groups = w.tokens / w.block.tokens_per_row;
  const int64_t part_size = plan.blocks * plan.runs * w.adapters;
  std::vector<double> sums(size_t(w.adapters));
  for (int64_t g = 0; g < groups; g++) {
    std::fill(sums.begin(), sums.end(), 0.);
    const int64_t first = g * w.block.tokens_per_row, last = first + w.block.tokens_per_row - 1;
    for (int64_t block = first / plan.rows; block <= last / plan.rows; block++) {
      const int64_t run = g - block * plan.rows / w.block.tokens_per_row;
      const double* part = d_gate + (block * plan.runs + run) * w.adapters;
      for (int64_t i = 0; i < parts; i++, part += part_size) {
        for (int64_t e = 0; e < w.adapters; e++) sums[size_t(e)] += part[e];
      }
    }
    for (int64_t e = 0; e < w.adapters; e++) w.d_gate[g * w.adapters + e] = float(sums[size_t(e)]);
  }
}

}  // namespace

void run(const Kernels& kernels, const Walk& walk, int threads) {
  if (walk.tokens == 0) return;
  const Plan plan = make_plan(kernels, walk, threads);
  const Runner runner(kernels, walk, plan);
  const int team = plan.parallel ? threads : 1;
  const size_t each = runner.scratch_bytes();
  const size_t units = plan.fused ? 0 : runner.units_bytes();
  const size_t d_gate_bytes = size_t(runner.d_gate_size()) * sizeof(double);
  char* memory =
      (char*)Workspace::of_this_thread().reserve(each * size_t(team) + units + d_gate_bytes);
  void* shared_units = memory + each * size_t(team);
  double* d_gate = nullptr;
  if (walk.d_gate != nullptr) {
    d_gate = (double*)((char*)shared_units + units);
    std::memset(d_gate, 0, d_gate_bytes);
  }

  if (plan.fused) {
    Tasks blocks(plan.blocks);
    parallel(team, [&](int thread) {
      if (thread >= team) return;
      const Scratch s = runner.scratch(memory + size_t(thread) * each, nullptr);
      for (int64_t i; blocks.next(i);) runner.block(i, s, d_gate);
      kernels.release();
    });
  } else {
    Tasks unit_tasks(runner.unit_tasks());
    Tasks output_tasks(walk.out ? ceil_div(walk.width_out, plan.out_columns) : 0);
    parallel(team, [&](int thread) {
      const Scratch s =
          runner.scratch(memory + size_t(std::min(thread, team - 1)) * each, shared_units);
      if (thread < team) {
        for (int64_t i; unit_tasks.next(i);) runner.unit_task(i, s, d_gate);
      }
      barrier();
      if (thread < team) {
        const int64_t ranges = walk.out ? runner.second_ranges(s) : 0;
        for (int64_t i; output_tasks.next(i);) runner.output_task(i, ranges, s);
        kernels.release();
      }
    });
  }
  if (walk.d_gate != nullptr) sum_d_gate(walk, plan, runner.d_gate_parts(), d_gate);
}

}  // namespace pemt_fast::cpu
