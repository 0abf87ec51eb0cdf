// SPDX-License-Identifier: Apache-2.0
#include "skill_mixture.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "plan.h"
#include "threads.h"

namespace pemt_fast::cpu {
namespace {

// Below this many multiplications waking other threads costs more than they save.
constexpr int64_t kParallelProducts = 1 << 17;

// A task: one row of one split of one factor, for all skills.
struct Task {
  const SkillFactor* factor;
  int64_t split, r;
};

struct TaskList {
  const SkillSizes& z;
  const SkillFactor* factors;
  int64_t count() const { return z.splits * z.rank; }
  Task at(int64_t i) const {
    const int64_t each = count(), inside = i % each;
    return {factors + i / each, inside / z.rank, inside % z.rank};
  }
};

int team_of(const SkillSizes& z, const SkillFactor* factors, int count, int threads) {
  int64_t products = 0;
  for (int i = 0; i < count; i++) {
    products += z.rows * z.skills * z.rank * z.splits * factors[i].width;
  }
  return products < kParallelProducts ? 1 : threads;
}

const char* skills_of(const SkillSizes& z, const Task& task, int64_t column) {
  const SkillFactor& f = *task.factor;
  const int64_t at = (task.split * z.skills * z.rank + task.r) * f.width + column;
  return (const char*)f.skills + at * size_of(f.dtype);
}

void mix_row(const Kernels& k, const SkillSizes& z, const Task& task, Dtype storage, bool bf16,
             float* sums, void* narrow) {
  const SkillFactor& f = *task.factor;
  const int64_t full = z.splits * f.width;
  Product p{};
  p.a = f.weights + task.split * z.skills;
  p.a_row = z.splits * z.skills;
  p.a_step = 1;
  p.b_row = z.rank * f.width;
  p.b_panel = kPanel;
  p.c = sums;
  p.c_row = kBlockColumns;
  p.m = z.rows;
  p.k = z.skills;
  for (int64_t column = 0; column < f.width; column += kBlockColumns) {
    p.n = std::min(kBlockColumns, f.width - column);
    p.b = skills_of(z, task, column);
    k.rows_f32[(int)f.dtype](p);
    for (int64_t row = 0; row < z.rows; row++) {
      const float* from = sums + row * kBlockColumns;
      const int64_t at = (row * z.rank + task.r) * full + task.split * f.width + column;
      if (bf16) {
        k.from_f32[(int)Dtype::bf16](from, p.n, (uint16_t*)f.mixed + at);
      } else if (storage == Dtype::f32) {
        std::memcpy((float*)f.mixed + at, from, size_t(p.n) * sizeof(float));
      } else {
        k.from_f32[(int)storage](from, p.n, narrow);
        k.to_f32[(int)storage](narrow, p.n, (float*)f.mixed + at);
      }
    }
  }
}

// d_mixed [rows, width] of one split and one r in float32, sequences of the same row added up.
struct RowSums {
  const float* data;
  int64_t row;
};

// `sums` [rows, width], `wide` [width].
RowSums sum_sequences(const Kernels& k, const SkillSizes& z, const Task& task, float* sums,
                      float* wide) {
  const SkillFactor& f = *task.factor;
  const int64_t full = z.splits * f.width, each = z.rank * full;
  const int64_t first = task.r * full + task.split * f.width;
  const bool is_float = f.d_mixed_dtype == Dtype::f32;
  if (z.row_of == nullptr && is_float) return {(const float*)f.d_mixed + first, each};
  const auto at = [&](int64_t s) {
    return (const char*)f.d_mixed + (s * each + first) * size_of(f.d_mixed_dtype);
  };
  if (z.row_of == nullptr) {
    for (int64_t s = 0; s < z.sequences; s++) {
      k.to_f32[(int)f.d_mixed_dtype](at(s), f.width, sums + s * f.width);
    }
    return {sums, f.width};
  }
  std::memset(sums, 0, size_t(z.rows * f.width) * sizeof(float));
  for (int64_t s = 0; s < z.sequences; s++) {
    const float* from = is_float ? (const float*)at(s) : wide;
    if (!is_float) k.to_f32[(int)f.d_mixed_dtype](at(s), f.width, wide);
    float* to = sums + z.row_of[s] * f.width;
    for (int64_t i = 0; i < f.width; i++) to[i] += from[i];
  }
  return {sums, f.width};
}

void unmix_row(const Kernels& k, const SkillSizes& z, const Task& task, const RowSums& d_mixed,
               float* sums, float* d_weights) {
  const SkillFactor& f = *task.factor;
  if (f.d_skills != nullptr) {
    Product p{};
    p.a = f.weights + task.split * z.skills;
    p.a_row = 1;
    p.a_step = z.splits * z.skills;
    p.b_row = d_mixed.row;
    p.b_panel = kPanel;
    p.c = sums;
    p.c_row = kBlockColumns;
    p.m = z.skills;
    p.k = z.rows;
    for (int64_t column = 0; column < f.width; column += kBlockColumns) {
      p.n = std::min(kBlockColumns, f.width - column);
      p.b = d_mixed.data + column;
      k.rows_f32[(int)Dtype::f32](p);
      char* to = (char*)f.d_skills + (skills_of(z, task, column) - (const char*)f.skills);
      for (int64_t skill = 0; skill < z.skills; skill++) {
        k.from_f32[(int)f.dtype](sums + skill * kBlockColumns, p.n, to);
        to += z.rank * f.width * size_of(f.dtype);
      }
    }
  }
  if (d_weights == nullptr) return;
  Product p{};
  p.a = d_mixed.data;
  p.a_row = d_mixed.row;
  p.a_step = 1;
  p.b_row = z.rank * f.width;
  p.b_panel = kPanel;
  p.c_row = round_up(z.skills, kBlockColumns);
  p.m = z.rows;
  p.k = f.width;
  p.accumulate = true;
  for (int64_t first = 0; first < z.skills; first += kBlockColumns) {
    p.n = std::min(kBlockColumns, z.skills - first);
    p.b = skills_of(z, task, 0) + first * z.rank * f.width * size_of(f.dtype);
    p.c = d_weights + task.split * z.rows * p.c_row + first;
    k.dots_f32[(int)f.dtype](p);
  }
}

int64_t share_begin(int64_t count, int thread, int team) { return count * thread / team; }

}  // namespace

void mix(const Kernels& kernels, const SkillSizes& z, const SkillFactor* factors, int count,
         Dtype storage, bool bf16, int threads) {
  const TaskList tasks{z, factors};
  const int team = team_of(z, factors, count, threads);
  const int64_t all = tasks.count() * count;
  parallel(team, [&](int thread) {
    if (thread >= team) return;
    const size_t sums_bytes = Workspace::round_up(size_t(z.rows * kBlockColumns) * 4);
    char* memory = (char*)Workspace::of_this_thread().reserve(sums_bytes + kBlockColumns * 2);
    const int64_t end = share_begin(all, thread + 1, team);
    for (int64_t i = share_begin(all, thread, team); i < end; i++) {
      mix_row(kernels, z, tasks.at(i), storage, bf16, (float*)memory, memory + sums_bytes);
    }
  });
}

void unmix(const Kernels& kernels, const SkillSizes& z, const SkillFactor* factors, int count,
           int threads) {
  const TaskList tasks{z, factors};
  const int team = team_of(z, factors, count, threads);
  const int64_t all = tasks.count() * count;
  const int64_t weights_row = round_up(z.skills, kBlockColumns);
  const int64_t part = z.splits * z.rows * weights_row;
  std::vector<float> parts(size_t(part * team * count), 0.f);
  int64_t widest = 0;
  for (int i = 0; i < count; i++) widest = std::max(widest, factors[i].width);
  parallel(team, [&](int thread) {
    if (thread >= team) return;
    const size_t sums_bytes = Workspace::round_up(size_t(z.skills * kBlockColumns) * 4);
    const size_t rows_bytes = Workspace::round_up(size_t(z.rows * widest) * 4);
    char* memory =
        (char*)Workspace::of_this_thread().reserve(sums_bytes + rows_bytes + size_t(widest) * 4);
    float* wide = (float*)(memory + sums_bytes + rows_bytes);
    const int64_t end = share_begin(all, thread + 1, team);
    for (int64_t i = share_begin(all, thread, team); i < end; i++) {
      const Task task = tasks.at(i);
      const int64_t which = task.factor - factors;
      float* d_weights =
          task.factor->d_weights ? parts.data() + part * (which * team + thread) : nullptr;
      const RowSums d_mixed = sum_sequences(kernels, z, task, (float*)(memory + sums_bytes), wide);
      unmix_row(kernels, z, task, d_mixed, (float*)memory, d_weights);
    }
  });
  for (int i = 0; i < count; i++) {
    float* to = factors[i].d_weights;
    if (to == nullptr) continue;
    for (int64_t row = 0; row < z.rows; row++) {
      for (int64_t split = 0; split < z.splits; split++) {
        for (int64_t skill = 0; skill < z.skills; skill++) {
          const int64_t at = (split * z.rows + row) * weights_row + skill;
          float sum = 0;
          for (int t = 0; t < team; t++) sum += parts[size_t(part * (i * team + t) + at)];
          *to++ = sum;
        }
      }
    }
  }
}

}  // namespace pemt_fast::cpu
