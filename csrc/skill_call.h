// SPDX-License-Identifier: Apache-2.0
//
// One call of `skill_mixture` on CPU tensors, prepared for cpu/skill_mixture.h and
// cpu/adapter_mixture.h: which factors there are, how products read them, how sequences are walked.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "cpu/skill_mixture.h"
#include "cpu/threads.h"
#include "cpu_call.h"

namespace pemt_fast {

// Skills as the kernels read them.
at::Tensor readable_skills(const at::Tensor& skills);

// Sizes of a call, and the weights with which it mixes. Without `mixing` the skills are the factors
// of the tasks, and a row is one of them.
struct SkillCall {
  int64_t sequences, tokens, d, h, splits, skills, rank, tasks, rows;  // tokens of a sequence
  at::ScalarType type;
  bool bf16;
  std::vector<int64_t> row_of;         // [sequences]; empty: each has its own, in order
  std::vector<int64_t> task_of;        // [rows]; empty: each row is that task
  at::Tensor weights, scaled_weights;  // [rows, P, K] float32, of a and of b

  SkillCall(const at::Tensor& x, const OptionalTensor& mixing, const at::Tensor& a,
            const at::Tensor& b, const OptionalTensor& task_ids, double scale);

  int64_t row(int64_t s) const { return row_of.empty() ? s : row_of[(size_t)s]; }
  int64_t all_tokens() const { return sequences * tokens; }
  cpu::SkillSizes sizes() const {
    return {splits, skills, rank, rows, sequences, row_of.empty() ? nullptr : row_of.data()};
  }
  at::ScalarType compute() const { return bf16 ? at::kBFloat16 : at::kFloat; }
  // Of the values of the tasks those in use, and back, with zeros for tasks that do not occur.
  at::Tensor used(const at::Tensor& of_tasks) const;
  at::Tensor of_tasks(const at::Tensor& used) const;

 private:
  void find_rows(const at::Tensor& task_ids);
};

// One kind of factor, [R, width] for every row, as the right side of products.
class Factors {
 public:
  Factors(const SkillCall& call, int64_t width) : call_(call), width_(width) {}
  // Room for what is mixed.
  void* allocate();
  // The factors of all tasks as they are, times the scale, rounded to the dtype of the tokens.
  void take(const at::Tensor& of_tasks, double scale);
  // Panels, if the sequences are long enough. `sums_over_width`: in the first product of a walk.
  void pack(bool sums_over_width);
  cpu::Operand operand(int64_t row) const;

 private:
  const SkillCall& call_;
  const int64_t width_;
  at::Tensor rows_, panels_;
  int64_t bytes_ = 0;
};

// Skills and weights for `mix` and `unmix`.
cpu::SkillFactor skill_factor(const at::Tensor& skills, const at::Tensor& weights);

// Both factors of all rows, each where it is not null.
void fill(const SkillCall& call, const at::Tensor& a, const at::Tensor& b, double scale,
          Factors* down, Factors* up);

// The walks of all sequences: one adapter whose gate is 1.
class Walks {
 public:
  explicit Walks(const SkillCall& call);
  // Through the rows of a sequence; `rows` [T, width] are those of the whole call.
  cpu::Walk walk(int64_t s, const at::Tensor& rows) const;
  // The first row of a sequence.
  char* at_row(const at::Tensor& rows, int64_t s) const;

 private:
  const SkillCall& call_;
  const float gate_[2] = {1.f, 0.f};
  std::vector<int32_t> adapter_of_unit_;
};

// Sequences this long are shared by the threads, shorter ones are handed out whole.
constexpr int64_t kLongSequence = 256;

// Calls one(sequence, threads) for every sequence.
template <class F>
void for_sequences(const SkillCall& call, const F& one) {
  const int all = threads();
  const int64_t work = call.all_tokens() * call.rank * (call.d + call.h);
  const bool hands_out = call.tokens < kLongSequence || call.sequences % all == 0;
  if (call.sequences < all || !hands_out || work < (1 << 18)) {
    for (int64_t s = 0; s < call.sequences; s++) one(s, all);
    return;
  }
  cpu::Tasks tasks(call.sequences);
  cpu::parallel(all, [&](int thread) {
    if (thread >= all) return;
    for (int64_t s; tasks.next(s);) one(s, 1);
  });
}

}  // namespace pemt_fast
