// SPDX-License-Identifier: Apache-2.0
//
// The decode kernel on the host: a random problem against sums in double. Prints the worst error in
// units of its bound, whether the bits are the same with the slices in another order, and whether
// the tickets are 0 again. Arguments: tokens d h units adapters tokens_per_gate cluster slices
// activation dtype flags seed shared_bytes. Flags: b biases, r base, 0 a gate of 0, and behind it
// what is not finite: u i in w_up, d in w_down, e in b_down, f in b_up.
#include "emulated_device.h"
// clang-format off
#include "../../../csrc/cuda/decode_kernel.h"
// clang-format on

#include <algorithm>
#include <random>
#include <string>

using namespace pemt_fast::cuda;

namespace {

struct Problem {
  int tokens, d, h, units, adapters, tokens_per_gate, cluster, slices, shared_bytes;
  Activation activation;
  std::string flags;
  bool has(char flag) const { return flags.find(flag) != std::string::npos; }
};

double exact_activation(double z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::gelu:
      return z * 0.5 * std::erfc(-z * std::sqrt(0.5));
    case Activation::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

template <class T>
struct Tensors {
  std::vector<T> x, w_down, w_up, base, out;
  std::vector<float> b_down, b_up, gate;
  std::vector<int32_t> adapter_of_unit;
};

template <class T>
Tensors<T> draw(const Problem& p, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  const auto fill = [&](size_t count, float scale) {
    std::vector<T> values(count);
    for (T& value : values) value = from_float<T>(normal(generator) * scale);
    return values;
  };
  Tensors<T> t;
  t.x = fill(size_t(p.tokens) * p.d, 1);
  t.w_down = fill(size_t(p.units) * p.d, 1 / std::sqrt(float(p.d)));
  t.w_up = fill(size_t(p.units) * p.h, 1);
  t.base = fill(size_t(p.tokens) * p.h, 1);
  t.out.assign(size_t(p.tokens) * p.h, from_float<T>(std::nanf("")));
  for (int i = 0; i < p.units; i++) t.b_down.push_back(normal(generator));
  for (int i = 0; i < p.adapters * p.h; i++) t.b_up.push_back(normal(generator));
  for (int i = 0; i < p.tokens / p.tokens_per_gate * p.adapters; i++) {
    t.gate.push_back(normal(generator));
  }
  for (int n = 0; n < p.units; n++) {  // unequal ranks: the last adapter gets the rest
    t.adapter_of_unit.push_back(std::min(n / std::max(p.units / p.adapters, 1), p.adapters - 1));
  }
  if (p.has('0')) {  // adapter 0 is not used by the first row of gates
    t.gate[0] = 0;
    if (p.has('u')) t.w_up[size_t(p.h) - 1] = from_float<T>(std::nanf(""));
    if (p.has('i')) t.w_up[0] = from_float<T>(-INFINITY);
    if (p.has('d')) t.w_down[0] = from_float<T>(INFINITY);
    if (p.has('e')) t.b_down[0] = std::nanf("");
    if (p.has('f')) t.b_up[0] = -INFINITY;
  }
  return t;
}

// Worst error of tokens that must be finite, in units of what rounding may do; infinite if a token
// is finite that must not be, or not finite that must be.
template <class T>
double compare(const Problem& p, const Tensors<T>& t) {
  const double step = sizeof(T) == 4 ? 6e-8 : std::is_same<T, Bf16>::value ? 4e-3 : 5e-4;
  double worst = 0;
  for (int token = 0; token < p.tokens; token++) {
    const float* gate = t.gate.data() + token / p.tokens_per_gate * p.adapters;
    bool must_be_finite = true, is_finite_row = true;
    std::vector<double> sums(size_t(p.h), 0.0), sizes(size_t(p.h), 0.0);
    for (int n = 0; n < p.units; n++) {
      const int e = t.adapter_of_unit[size_t(n)];
      if (gate[e] == 0) continue;
      double z = p.has('b') ? t.b_down[size_t(n)] : 0, size = std::abs(z);
      for (int k = 0; k < p.d; k++) {
        const double term = double(to_float(t.x[size_t(token) * p.d + k])) *
                            to_float(t.w_down[size_t(n) * p.d + k]);
        z += term;
        size += std::abs(term);
      }
      const double unit = exact_activation(z, p.activation) * gate[e];
      for (int c = 0; c < p.h; c++) {
        const double weight = to_float(t.w_up[size_t(n) * p.h + c]);
        sums[size_t(c)] += unit * weight;
        sizes[size_t(c)] += std::abs(weight * gate[e]) *
                            (step * std::abs(exact_activation(z, p.activation)) + 2e-7 * size);
      }
    }
    for (int c = 0; c < p.h; c++) {
      double& sum = sums[size_t(c)];
      if (p.has('b')) {
        for (int e = 0; e < p.adapters; e++) {
          if (gate[e] != 0) sum += double(gate[e]) * t.b_up[size_t(e) * p.h + c];
        }
      }
      const size_t at = size_t(token) * p.h + c;
      if (p.has('r')) sum += to_float(t.base[at]);
      const double found = to_float(t.out[at]);
      must_be_finite &= std::isfinite(sum);
      is_finite_row &= std::isfinite(found);
      if (std::isfinite(sum) && std::isfinite(found)) {
        const double bound = sizes[size_t(c)] + step * (std::abs(sum) + 1) + 1e-6;
        worst = std::max(worst, std::abs(found - sum) / bound);
      }
    }
    if (must_be_finite != is_finite_row) return INFINITY;
  }
  return worst;
}

template <class T>
uint64_t bits(const std::vector<T>& values) {  // FNV-1a
  uint64_t result = 1469598103934665603u;
  const auto* bytes = (const unsigned char*)values.data();
  for (size_t i = 0; i < values.size() * sizeof(T); i++)
    result = (result ^ bytes[i]) * 1099511628211u;
  return result;
}

template <class T>
void run(const Decode& call, const DecodePlan& plan, const std::vector<int>& order) {
  with_instance<T>(call, plan, [&](auto tokens, auto aligned) {
    run_grid(order, plan.cluster, plan.shared_bytes, [&] {
      decode_block<T, decltype(tokens)::value, decltype(aligned)::value>(call, plan,
                                                                         shared_memory());
    });
  });
}

template <class T>
int test(const Problem& p, Dtype dtype, unsigned seed) {
  const DecodePlan plan =
      plan_of({p.tokens, p.d, p.h, p.units, dtype}, {1, p.shared_bytes, 1}, p.cluster, p.slices);
  Tensors<T> t = draw<T>(p, seed);
  std::vector<float> workspace(plan.workspace_bytes / 4, std::nanf(""));
  std::vector<unsigned> tickets(size_t(plan.tickets), 0);
  Decode call{};
  call.tokens = p.tokens, call.d = p.d, call.h = p.h, call.units = p.units;
  call.adapters = p.adapters, call.tokens_per_gate = p.tokens_per_gate;
  call.x = t.x.data(), call.x_row = p.d;
  call.w_down = t.w_down.data(), call.w_up = t.w_up.data();
  if (p.has('b')) call.b_down = t.b_down.data(), call.b_up = t.b_up.data();
  if (p.has('r')) call.base = t.base.data(), call.base_row = p.h;
  call.gate = t.gate.data(), call.adapter_of_unit = t.adapter_of_unit.data();
  call.out = t.out.data();
  call.workspace = workspace.data(), call.tickets = tickets.data();
  call.activation = p.activation;
  std::vector<int> order;
  for (int s = 0; s < plan.slices; s++) order.push_back(s);
  run<T>(call, plan, order);
  const uint64_t first = bits(t.out);
  const double error = compare(p, t);
  // Whoever comes last adds up; the bits must not depend on it, and the counters are 0 again.
  std::reverse(order.begin(), order.end());
  std::fill(t.out.begin(), t.out.end(), from_float<T>(std::nanf("")));
  std::fill(workspace.begin(), workspace.end(), std::nanf(""));
  run<T>(call, plan, order);
  const bool same = bits(t.out) == first;
  const bool reset = std::all_of(tickets.begin(), tickets.end(), [](unsigned n) { return n == 0; });
  std::printf("%.3f %s %s\n", error, same ? "same" : "different", reset ? "reset" : "counting");
  return 0;
}

}  // namespace

int main(int, char** v) {
  const auto number = [&](int i) { return std::atoi(v[i]); };
  const Problem p{number(1), number(2), number(3), number(4),  number(5),
                  number(6), number(7), number(8), number(13), Activation(number(9)),
                  v[11]};
  const std::string dtype = v[10];
  const auto seed = unsigned(number(12));
  if (dtype == "f32") return test<float>(p, Dtype::f32, seed);
  if (dtype == "bf16") return test<Bf16>(p, Dtype::bf16, seed);
  return test<F16>(p, Dtype::f16, seed);
}
