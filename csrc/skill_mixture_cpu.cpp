// SPDX-License-Identifier: Apache-2.0
//
// `skill_mixture` on CPU tensors: the factors of each task are mixed once (cpu/skill_mixture.h),
// then each sequence is a walk through its own two factors (cpu/adapter_mixture.h). What is
// computed and who calls it: pemt_fast/ops/skill_mixture.py, whose letters these are. With `weight`
// the walks add to the product of the linear in place: it is nobody else's.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "skill_call.h"

namespace pemt_fast {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> skill_mixture_forward(const Tensor& x, const OptionalTensor& mixing,
                                                 const Tensor& a_, const Tensor& b_,
                                                 const OptionalTensor& task_ids,
                                                 const OptionalTensor& base_, double scale,
                                                 bool save, const OptionalTensor& weight,
                                                 const OptionalTensor& bias) {
  const SkillCall call(x, mixing, a_, b_, task_ids, scale);
  const int64_t all = call.all_tokens();
  const Tensor x_rows = as_rows(x, all, call.d);
  Tensor out = weight ? linear(x_rows, *weight, bias, x.sizes())
                      : at::empty(with_last(x.sizes(), call.h), x.options());
  Tensor hidden = at::empty(save ? with_last(x.sizes(), call.rank) : at::DimVector{0}, x.options());
  if (all == 0) return {out, hidden};
  Factors down(call, call.d), up(call, call.h);
  fill(call, readable_skills(a_), readable_skills(b_), scale, &down, &up);
  down.pack(true);
  up.pack(false);

  const Tensor out_rows = out.view({all, call.h});
  const Tensor hidden_rows = save ? hidden.view({all, call.rank}) : hidden;
  Tensor base;
  if (weight) {
    base = out_rows;
  } else if (base_) {
    const bool direct = base_->scalar_type() == call.type || base_->scalar_type() == at::kFloat;
    base = as_rows(direct ? *base_ : base_->to(at::kFloat), all, call.h);
  }
  const cpu::Kernels& k = cpu::kernels();
  const Walks walks(call);
  for_sequences(call, [&](int64_t s, int threads) {
    cpu::Walk w = walks.walk(s, x_rows);
    w.first = down.operand(call.row(s));
    w.second = up.operand(call.row(s));
    w.pass = k.forward[(int)w.storage][w.bf16][(int)cpu::Activation::identity];
    w.block.saved = save ? walks.at_row(hidden_rows, s) : nullptr;
    w.out = walks.at_row(out_rows, s);
    w.width_out = call.h;
    if (base.defined()) {
      w.base = walks.at_row(base, s);
      w.base_row = all > 1 ? base.stride(0) : call.h;
      w.base_dtype = cpu_dtype(base.scalar_type());
    }
    cpu::run(k, w, threads);
  });
  return {out, hidden};
}

// The order of the gradients, and of what `needs` asks for.
enum Input { kX, kMixing, kA, kB };

// d_mixed [sequences, R, width] of one factor: sums over tokens of units * rows.
void factor_gradient(const SkillCall& call, const void* units, const char* rows, int64_t row,
                     int64_t width, char* d_mixed, int threads) {
  const cpu::Dtype type = cpu_dtype(call.type);
  const cpu::WeightGradient work{units, type, rows, row, width, d_mixed, type};
  cpu::run(cpu::kernels(), &work, 1, call.tokens, call.rank, cpu_dtype(call.type), call.bf16,
           threads);
}

// Gradients with respect to the mixed factors, [sequences, R, width]; undefined if not asked for.
struct FactorGradients {
  Tensor down, up;
};

// The sequences backwards: d_x, or with `adds` more of it, and the gradients of the mixed factors.
FactorGradients walk_back(const SkillCall& call, const Tensor& grad_rows, const OptionalTensor& x,
                          const OptionalTensor& hidden, const Factors& up, const Factors& down,
                          const std::array<bool, 4>& needs, bool adds, Tensor& d_x) {
  const int64_t all = call.all_tokens();
  const auto of_sequences = [&](int64_t width) {
    return at::empty({call.sequences, call.rank, width}, grad_rows.options());
  };
  FactorGradients found;
  const bool walks_back = needs[kX] || needs[kMixing] || needs[kA];
  if (needs[kMixing] || needs[kA]) found.down = of_sequences(call.d);
  if (needs[kMixing] || needs[kB]) found.up = of_sequences(call.h);
  // Also what the pass reads as the saved units where the caller kept none: their values only
  // make the gradient of a gate, for which nobody asks.
  const Tensor d_units = at::empty({all, call.rank}, grad_rows.options());
  Tensor x_rows, d_x_rows;
  if (found.down.defined()) x_rows = as_rows(*x, all, call.d);
  if (needs[kX]) d_x_rows = d_x.view({all, call.d});
  const Tensor units = hidden ? as_rows(*hidden, all, call.rank).contiguous() : d_units;
  const cpu::Kernels& k = cpu::kernels();
  const Walks walks(call);
  const auto of = [&](const Tensor& t, int64_t s) {
    return (char*)t.mutable_data_ptr() + s * t.stride(0) * t.element_size();
  };
  const auto row_of = [&](const Tensor& t) { return all > 1 ? t.stride(0) : t.size(1); };
  for_sequences(call, [&](int64_t s, int threads) {
    cpu::Walk w = walks.walk(s, grad_rows);
    if (walks_back) {
      w.first = up.operand(call.row(s));
      w.pass = k.backward[(int)w.storage][w.bf16][(int)cpu::Activation::identity];
      w.block.saved = walks.at_row(units, s);
      w.block.d_z = walks.at_row(d_units, s);
      if (needs[kX]) {
        w.second = down.operand(call.row(s));
        w.out = walks.at_row(d_x_rows, s);
        w.width_out = call.d;
        if (adds) {
          w.base = w.out;
          w.base_row = call.d;
          w.base_dtype = cpu_dtype(call.type);
        }
      }
      cpu::run(k, w, threads);
    }
    if (found.down.defined()) {
      factor_gradient(call, walks.at_row(d_units, s), walks.at_row(x_rows, s), row_of(x_rows),
                      call.d, of(found.down, s), threads);
    }
    if (found.up.defined()) {
      factor_gradient(call, walks.at_row(units, s), (const char*)w.x, row_of(grad_rows), call.h,
                      of(found.up, s), threads);
    }
  });
  return found;
}

// Gradients of everything that was mixed.
struct SkillGradients {
  Tensor d_mixing, d_a, d_b;  // float32 of mixing, else the dtype of the skills; or undefined
};

SkillGradients unmixed(const SkillCall& call, const FactorGradients& found, const Tensor& a,
                       const Tensor& b, double scale, const std::array<bool, 4>& needs) {
  SkillGradients result;
  if (needs[kA]) result.d_a = at::empty(a.sizes(), a.options());
  if (needs[kB]) result.d_b = at::empty(b.sizes(), b.options());
  Tensor d_weights;
  if (needs[kMixing]) {
    d_weights = at::empty({2, call.rows, call.splits, call.skills}, at::kFloat);
  }
  cpu::SkillFactor factors[2];
  int count = 0;
  const auto add = [&](const Tensor& d_mixed, const Tensor& skills, const Tensor& weights,
                       Tensor& d_skills, int64_t which) {
    if (!d_mixed.defined()) return;
    cpu::SkillFactor& f = factors[count++] = skill_factor(skills, weights);
    f.d_mixed = d_mixed.const_data_ptr();
    f.d_mixed_dtype = cpu_dtype(d_mixed.scalar_type());
    if (d_skills.defined()) f.d_skills = d_skills.mutable_data_ptr();
    if (needs[kMixing]) f.d_weights = d_weights[which].mutable_data_ptr<float>();
  };
  add(found.down, a, call.weights, result.d_a, 0);
  add(found.up, b, call.scaled_weights, result.d_b, 1);
  if (count > 0) cpu::unmix(cpu::kernels(), call.sizes(), factors, count, threads());
  if (needs[kMixing]) {
    result.d_mixing = call.of_tasks(at::add(d_weights[0], d_weights[1], scale));
  }
  return result;
}

// The same where nothing was mixed: the sequences of a task added up.
SkillGradients summed(const SkillCall& call, const FactorGradients& found, double scale,
                      const std::array<bool, 4>& needs) {
  const auto sum = [&](const Tensor& d_mixed) {
    const Tensor wide = d_mixed.to(at::kFloat);
    if (call.row_of.empty()) return call.of_tasks(wide);
    at::DimVector sizes(d_mixed.sizes().begin(), d_mixed.sizes().end());
    sizes[0] = call.rows;
    const Tensor rows = at::tensor(call.row_of, at::kLong);
    return call.of_tasks(at::zeros(sizes, at::kFloat).index_add_(0, rows, wide));
  };
  SkillGradients result;
  if (needs[kA]) result.d_a = sum(found.down);
  if (needs[kB]) result.d_b = sum(found.up).mul_(scale);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> skill_mixture_backward(
    const Tensor& grad_out, const OptionalTensor& x, const OptionalTensor& mixing, const Tensor& a_,
    const Tensor& b_, const OptionalTensor& task_ids, const OptionalTensor& hidden, double scale,
    std::array<bool, 4> needs, const OptionalTensor& weight) {
  const SkillCall call(grad_out, mixing, a_, b_, task_ids, scale);
  const int64_t all = call.all_tokens();
  // A new one each time: results of an operator must not share memory.
  const auto none = [&] { return at::empty({0}, grad_out.options()); };
  Tensor d_x = !needs[kX] ? none()
               : weight ? linear(as_rows(grad_out, all, call.h), weight->t(), {}, grad_out.sizes())
                        : at::empty(with_last(grad_out.sizes(), call.d), grad_out.options());
  SkillGradients found;
  if (all > 0) {
    const Tensor a = readable_skills(a_), b = readable_skills(b_);
    FactorGradients factors;
    {  // the mixed factors are freed before the gradients of the skills need memory
      Factors down(call, call.d), up(call, call.h);
      const bool goes_back = needs[kX] || needs[kMixing] || needs[kA];
      fill(call, a, b, scale, needs[kX] ? &down : nullptr, goes_back ? &up : nullptr);
      if (needs[kX]) down.pack(false);
      if (goes_back) up.pack(true);
      factors = walk_back(call, as_rows(grad_out, all, call.h), x, hidden, up, down, needs,
                          weight.has_value(), d_x);
    }
    found = call.weights.defined() ? unmixed(call, factors, a, b, scale, needs)
                                   : summed(call, factors, scale, needs);
  }
  const auto finished = [&](Input input, const Tensor& gradient, const Tensor& like) {
    if (!needs[input]) return none();
    if (!gradient.defined()) return at::zeros(like.sizes(), like.options());
    return gradient.reshape(like.sizes()).to(like.scalar_type());
  };
  const Tensor d_mixing = mixing ? finished(kMixing, found.d_mixing, *mixing) : none();
  return {d_x, d_mixing, finished(kA, found.d_a, a_), finished(kB, found.d_b, b_)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pemt_fast, m) {
  m.def(
      "skill_mixture_forward_cpu(Tensor x, Tensor? mixing, Tensor a, Tensor b, Tensor? task_ids, "
      "Tensor? base, float scale, bool save, Tensor? weight, Tensor? bias) -> (Tensor, Tensor)");
  m.def(
      "skill_mixture_backward_cpu(Tensor grad_out, Tensor? x, Tensor? mixing, Tensor a, Tensor b, "
      "Tensor? task_ids, Tensor? hidden, float scale, bool[4] needs, Tensor? weight) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pemt_fast, CPU, m) {
  m.impl("skill_mixture_forward_cpu", &skill_mixture_forward);
  m.impl("skill_mixture_backward_cpu", &skill_mixture_backward);
}

}  // namespace pemt_fast
