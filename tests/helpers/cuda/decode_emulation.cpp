// SPDX-License-Identifier: Apache-2.0
//
// The decode kernel on the host: a random problem against sums in double. Prints the worst error in
// units of its bound, whether the bits are the same with the slices in another order, and whether
// the ticket is 0 again. Arguments: tokens d h units adapters tokens_per_gate cluster slices
// activation dtype flags seed shared_bytes target_units. Flags: b biases, r base, n no gate,
// t ranks as a table, g gates and biases in float16,
// x w_up as [H, N], s a scale where there is no gate, 0 a gate of 0, and behind it what is not
// finite: u i in w_up, d in w_down, e in b_down, f in b_up.
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
  int tokens, d, h, units, adapters, tokens_per_gate, cluster, slices, shared_bytes, target_units;
  Activation activation;
  std::string flags;
  bool has(char flag) const { return flags.find(flag) != std::string::npos; }
  int rank() const { return std::max(units / adapters, 1); }
};

double exact_activation(double z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::gelu:
      return z * 0.5 * std::erfc(-z * std::sqrt(0.5));
    case Activation::gelu_tanh:
      return z * 0.5 *
             (1 + std::tanh(std::sqrt(2 / 3.14159265358979) * (z + 0.044715 * z * z * z)));
    case Activation::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

// Gates and biases, in float32 or float16.
struct Numbers {
  std::vector<float> values;
  std::vector<F16> halves;

  double operator[](size_t i) const { return halves.empty() ? values[i] : to_float(halves[i]); }
  Values read() const {
    if (values.empty()) return {nullptr, Dtype::f32};
    return halves.empty() ? Values{values.data(), Dtype::f32} : Values{halves.data(), Dtype::f16};
  }
};

template <class T>
struct Mixture {
  std::vector<T> w_down, w_up;
  Numbers b_down, b_up, gate;
  std::vector<int> adapter_of_unit;
  int adapters = 1, rank = 0, tokens_per_gate = 1;
  bool transposed = false;
  float scale = 1;
  Activation activation = Activation::identity;

  Adapters read() const {
    Adapters a{};
    a.units = int(adapter_of_unit.size()), a.adapters = adapters, a.rank = rank;
    a.w_down = w_down.data(), a.w_up = w_up.data(), a.transposed = transposed;
    a.b_down = b_down.read(), a.b_up = b_up.read();
    a.gate = gate.read(), a.tokens_per_gate = tokens_per_gate, a.scale = scale;
    a.activation = activation;
    return a;
  }
  double up(size_t unit, size_t column) const {
    const size_t units = adapter_of_unit.size(), columns = w_up.size() / units;
    return to_float(w_up[transposed ? column * units + unit : unit * columns + column]);
  }
};

template <class T>
struct Tensors {
  std::vector<T> x, base, out;
  Mixture<T> mixture, target;
};

template <class T>
struct Draw {
  std::mt19937 generator;
  std::normal_distribution<float> normal;

  std::vector<T> fill(int rows, int columns, float scale) {
    std::vector<T> values(size_t(rows) * size_t(columns));
    for (T& value : values) value = from_float<T>(normal(generator) * scale);
    return values;
  }
  Numbers numbers(int rows, int columns, bool half) {
    Numbers found;
    for (int i = 0; i < rows * columns; i++) found.values.push_back(normal(generator));
    if (half) {
      for (const float value : found.values) found.halves.push_back(from_float<F16>(value));
    }
    return found;
  }
  Mixture<T> mixture(const Problem& p, int d, int units, int adapters, int rank) {
    Mixture<T> m;
    m.w_down = fill(units, d, 1 / std::sqrt(float(d)));
    m.w_up = fill(units, p.h, 1);
    if (p.has('b')) m.b_down = numbers(1, units, p.has('g'));
    if (p.has('b')) m.b_up = numbers(adapters, p.h, p.has('g'));
    if (!p.has('n')) {
      m.gate = numbers(p.tokens / p.tokens_per_gate, adapters, p.has('g'));
      m.tokens_per_gate = p.tokens_per_gate;
    }
    for (int n = 0; n < units; n++) m.adapter_of_unit.push_back(std::min(n / rank, adapters - 1));
    m.adapters = adapters, m.rank = rank, m.activation = p.activation;
    m.transposed = p.has('x');
    m.scale = p.has('s') ? -0.7f : 1.f;
    return m;
  }
};

template <class T>
Tensors<T> draw(const Problem& p, unsigned seed) {
  Draw<T> from{std::mt19937(seed), {}};
  Tensors<T> t;
  t.x = from.fill(p.tokens, p.d, 1);
  if (p.has('r')) t.base = from.fill(p.tokens, p.h, 1);
  t.out.assign(size_t(p.tokens) * p.h, from_float<T>(std::nanf("")));
  // Unequal ranks: the last adapter gets the rest.
  t.mixture = from.mixture(p, p.d, p.units, p.adapters, p.rank());
  if (p.has('t')) t.mixture.rank = 0;
  if (p.target_units > 0) {
    t.target = from.mixture(p, p.h, p.target_units, 1, p.target_units);
    t.target.gate = Numbers();
  }
  if (p.has('0')) {  // adapter 0 is not used by the first row of gates
    Mixture<T>& m = t.mixture;
    m.gate.values[0] = 0;
    if (p.has('u'))
      m.w_up[p.has('x') ? size_t(p.h - 1) * size_t(p.units) : size_t(p.h - 1)] =
          from_float<T>(std::nanf(""));
    if (p.has('i')) m.w_up[0] = from_float<T>(-INFINITY);
    if (p.has('d')) m.w_down[0] = from_float<T>(INFINITY);
    if (p.has('e')) m.b_down.values[0] = std::nanf("");
    if (p.has('f')) m.b_up.values[0] = -INFINITY;
  }
  return t;
}

// A row of numbers, and how far rounding may have moved each.
struct Row {
  std::vector<double> values, bounds;
};

// base + mixture(x) of one token.
template <class T>
Row exact(const Mixture<T>& m, int token, const Row& x, const Row& base) {
  const double step = sizeof(T) == 4 ? 6e-8 : std::is_same<T, Bf16>::value ? 4e-3 : 5e-4;
  const size_t first_gate = size_t(token / m.tokens_per_gate) * size_t(m.adapters);
  const auto gate = [&](int e) {
    return m.gate.values.empty() ? double(m.scale) : m.gate[first_gate + size_t(e)];
  };
  Row out = base;
  for (size_t n = 0; n < m.adapter_of_unit.size(); n++) {
    const double g = gate(m.adapter_of_unit[n]);
    if (g == 0) continue;
    double z = m.b_down.values.empty() ? 0 : m.b_down[n], bound = 2e-7 * std::abs(z);
    for (size_t k = 0; k < x.values.size(); k++) {
      const double weight = to_float(m.w_down[n * x.values.size() + k]);
      z += x.values[k] * weight;
      bound += std::abs(weight) * (x.bounds[k] + 2e-7 * std::abs(x.values[k]));
    }
    const double unit = exact_activation(z, m.activation);
    bound = 1.2 * bound + step * std::abs(unit);  // no slope is above 1.13
    for (size_t c = 0; c < out.values.size(); c++) {
      const double weight = m.up(n, c);
      out.values[c] += unit * g * weight;
      out.bounds[c] += std::abs(weight * g) * bound;
    }
  }
  for (size_t c = 0; c < out.values.size(); c++) {
    for (int e = 0; e < m.adapters && !m.b_up.values.empty(); e++) {
      if (gate(e) != 0) out.values[c] += gate(e) * m.b_up[size_t(e) * out.values.size() + c];
    }
    out.bounds[c] += step * (std::abs(out.values[c]) + 1) + 1e-6;
  }
  return out;
}

template <class T>
Row row_of(const std::vector<T>& values, int row, int width) {
  Row found{std::vector<double>(size_t(width), 0.), std::vector<double>(size_t(width), 0.)};
  for (int i = 0; i < width && !values.empty(); i++) {
    found.values[size_t(i)] = to_float(values[size_t(row) * size_t(width) + size_t(i)]);
  }
  return found;
}

// Worst error of tokens that must be finite, in units of what rounding may do; infinite if a token
// is finite that must not be, or not finite that must be.
template <class T>
double compare(const Problem& p, const Tensors<T>& t, const Mixture<T>& m, int d,
               const std::vector<T>& x, const std::vector<T>& base) {
  double worst = 0;
  for (int token = 0; token < p.tokens; token++) {
    const Row sums = exact(m, token, row_of(x, token, d), row_of(base, token, p.h));
    const Row found = row_of(t.out, token, p.h);
    bool must_be_finite = true, is_finite_row = true;
    for (size_t c = 0; c < sums.values.size(); c++) {
      must_be_finite &= std::isfinite(sums.values[c]);
      is_finite_row &= std::isfinite(found.values[c]);
      if (std::isfinite(sums.values[c]) && std::isfinite(found.values[c])) {
        worst = std::max(worst, std::abs(found.values[c] - sums.values[c]) / sums.bounds[c]);
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
void run(const Decode& call, const DecodePlans& plans, const std::vector<int>& order) {
  with_instance<T>(call, plans, [&](auto tokens, auto aligned) {
    run_grid(order, plans.mixture.cluster, plans.shared_bytes(), [&] {
      decode_block<T, decltype(tokens)::value, decltype(aligned)::value>(call, plans,
                                                                         shared_memory());
    });
  });
}

template <class T>
int test(const Problem& p, Dtype dtype, unsigned seed) {
  const DecodePlans plans = plans_of({p.tokens, p.d, p.h, p.units, p.target_units, dtype},
                                     {1, p.shared_bytes, 1}, p.cluster, p.slices);
  Tensors<T> t = draw<T>(p, seed);
  std::vector<float> workspace(plans.mixture.workspace_bytes / 4, std::nanf(""));
  unsigned ticket = 0;
  Decode call{};
  call.tokens = p.tokens, call.d = p.d, call.h = p.h, call.dtype = dtype;
  call.x = t.x.data(), call.x_row = p.d;
  if (p.has('r')) call.base = {t.base.data(), dtype}, call.base_row = p.h;
  call.mixture = t.mixture.read(), call.target = t.target.read();
  if (p.has('t')) {
    for (int e = 0; e < p.adapters; e++) call.ends[e] = (e + 1) * p.rank();
    call.ends[p.adapters - 1] = p.units;
  }
  call.out = t.out.data();
  call.workspace = workspace.data(), call.ticket = &ticket;
  std::vector<int> order;
  for (int s = 0; s < plans.mixture.slices; s++) order.push_back(s);
  // What comes before the target adapter, then that on what came before it.
  call.target.units = 0;
  run<T>(call, plans, order);
  double error = compare(p, t, t.mixture, p.d, t.x, t.base);
  if (p.target_units > 0) {
    const std::vector<T> y = t.out;
    call.target = t.target.read();
    run<T>(call, plans, order);
    error = std::max(error, compare(p, t, t.target, p.h, y, y));
  }
  const uint64_t first = bits(t.out);
  bool reset = ticket == 0;
  // Whoever comes last adds up; the bits must not depend on it, and the counter is 0 again.
  std::reverse(order.begin(), order.end());
  std::fill(t.out.begin(), t.out.end(), from_float<T>(std::nanf("")));
  std::fill(workspace.begin(), workspace.end(), std::nanf(""));
  run<T>(call, plans, order);
  const bool same = bits(t.out) == first;
  reset &= ticket == 0;
  std::printf("%.3f %s %s\n", error, same ? "same" : "different", reset ? "reset" : "counting");
  return 0;
}

}  // namespace

int main(int, char** v) {
  const auto number = [&](int i) { return std::atoi(v[i]); };
  const Problem p{number(1),
                  number(2),
                  number(3),
                  number(4),
                  number(5),
                  number(6),
                  number(7),
                  number(8),
                  number(13),
                  number(14),
                  Activation(number(9)),
                  v[11]};
  const std::string dtype = v[10];
  const auto seed = unsigned(number(12));
  if (dtype == "f32") return test<float>(p, Dtype::f32, seed);
  if (dtype == "bf16") return test<Bf16>(p, Dtype::bf16, seed);
  return test<F16>(p, Dtype::f16, seed);
}
