// SPDX-License-Identifier: Apache-2.0
#include "cpu_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>

namespace pemt_fast {

using at::Tensor;

namespace {

// From this many tokens on a weight that may not be kept is packed for a single call.
constexpr int64_t kPackForOneCall = 192;

// The gates as float32 with a column of zeros behind them, and whether one of them is 0.
std::pair<Tensor, bool> padded_gate(const Tensor& given, int64_t groups, int64_t adapters) {
  const Tensor source = given.to(at::kFloat).contiguous();
  const Tensor gate = at::empty({groups, adapters + 1}, at::kFloat);
  const float* from = source.const_data_ptr<float>();
  float* to = gate.mutable_data_ptr<float>();
  bool has_zero = false;
  for (int64_t g = 0; g < groups; g++, from += adapters, to += adapters + 1) {
    std::memcpy(to, from, (size_t)adapters * sizeof(float));
    to[adapters] = 0.f;
    for (int64_t e = 0; e < adapters; e++) has_zero |= from[e] == 0.f;
  }
  return {gate, has_zero};
}

// Adapters that some tokens use and others do not, or that share a panel with one in use: their
// values may meet a zero. True if one of them holds a value that is not finite.
bool poisons(const Call& call, const Parameters& p, bool skips_unused, Tensor& bad) {
  const int64_t e_count = call.adapters;
  std::vector<char> any((size_t)e_count), all((size_t)e_count, 1);
  const float* row = call.gate_data();
  for (int64_t g = 0; g < call.groups; g++, row += e_count + 1) {
    for (int64_t e = 0; e < e_count; e++) {
      any[(size_t)e] |= row[e] != 0.f;
      all[(size_t)e] &= row[e] != 0.f;
    }
  }
  bad = at::zeros({e_count}, at::kBool);
  bool* found = bad.mutable_data_ptr<bool>();
  const int32_t* of = call.adapter_of_unit.const_data_ptr<int32_t>();
  const auto not_finite = [](const Tensor& t) { return !at::isfinite(t).all().item<bool>(); };
  bool any_bad = false;
  int64_t unit = 0;
  for (int32_t e = 0; e < e_count; e++) {
    const int64_t first = unit;
    while (unit < call.n && of[unit] == e) unit++;
    if (all[(size_t)e]) continue;
    if (skips_unused && !any[(size_t)e] && first % cpu::kPanel == 0 && unit % cpu::kPanel == 0 &&
        cpu::kernels().panel_bf16 == cpu::kPanel && !p.b_up) {
      continue;  // never touched
    }
    bool finite = true;
    for (const Tensor* w : {&p.w_down, &p.w_up}) {
      const int64_t width = w->size(-1);
      const char* data = (const char*)w->const_data_ptr() + first * width * w->element_size();
      const std::vector<int32_t> zeros((size_t)(unit - first), 0);
      cpu::clear_if_not_finite(data, cpu_dtype(w->scalar_type()), width, width, zeros.data(),
                               unit - first, &finite);
    }
    if (p.b_down) finite &= !not_finite(p.b_down->reshape(-1).slice(0, first, unit));
    if (p.b_up) finite &= !not_finite((*p.b_up)[e]);
    found[e] = !finite;
    any_bad |= !finite;
  }
  return any_bad;
}

}  // namespace

Call::Call(at::ScalarType type_, int64_t tokens_, const Tensor& gate_, const Tensor& w_down,
           const Tensor& w_up, at::IntArrayRef ranks)
    : tokens(tokens_),
      d(w_down.size(-1)),
      h(w_up.size(-1)),
      n(c10::sum_integers(ranks.begin(), ranks.end())),
      adapters((int64_t)ranks.size()),
      groups(gate_.numel() / adapters),
      type(type_),
      bf16(type_ == at::kBFloat16 && cpu::kernels().bf16) {
  std::tie(gate, has_zero_gate) = padded_gate(gate_, groups, adapters);
  const int64_t padded = (n + cpu::kBlockColumns - 1) / cpu::kBlockColumns * cpu::kBlockColumns;
  adapter_of_unit = at::empty({padded}, at::kInt);
  int32_t* of = adapter_of_unit.mutable_data_ptr<int32_t>();
  for (int64_t e = 0; e < adapters; e++) of = std::fill_n(of, ranks[(size_t)e], (int32_t)e);
  std::fill_n(of, padded - n, (int32_t)adapters);
}

cpu::Dtype cpu_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return cpu::Dtype::f32;
    case at::kBFloat16:
      return cpu::Dtype::bf16;
    case at::kHalf:
      return cpu::Dtype::f16;
    default:
      TORCH_CHECK(false, "impl=\"cpu\" computes in float32, bfloat16 or float16, got ", type);
  }
}

cpu::Activation cpu_activation(std::string_view name) {
  if (name == "identity") return cpu::Activation::identity;
  if (name == "relu") return cpu::Activation::relu;
  if (name == "gelu") return cpu::Activation::gelu;
  if (name == "gelu_tanh") return cpu::Activation::gelu_tanh;
  TORCH_CHECK(name == "silu", "unknown activation ", name);
  return cpu::Activation::silu;
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

at::DimVector with_last(at::IntArrayRef sizes, int64_t last) {
  at::DimVector result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

Tensor as_rows(const Tensor& tensor, int64_t rows, int64_t width) {
  if (tensor.dim() == 2 && tensor.size(0) == rows && (tensor.stride(1) == 1 || width <= 1)) {
    return tensor;
  }
  const Tensor flat = tensor.reshape({rows, width});
  return width <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

Tensor linear(const Tensor& rows, const Tensor& weight, const OptionalTensor& bias,
              at::IntArrayRef sizes) {
  // The caller has cast what goes in.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = rows.scalar_type();
  const OptionalTensor used_bias = bias ? OptionalTensor(bias->to(type)) : std::nullopt;
  const Tensor out = at::linear(rows, weight.to(type), used_bias).contiguous();
  // Not a view: autograd refuses to change those in place.
  return at::_unsafe_view(out, with_last(sizes, weight.size(0)));
}

Parameters parameters(const Tensor& w_down, const Tensor& w_up, const OptionalTensor& b_down,
                      const OptionalTensor& b_up, bool training) {
  const auto dense = [](const Tensor& t) { return t.is_contiguous() ? t : t.contiguous(); };
  const auto readable = [&](const Tensor& t) {
    return dense(t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t);
  };
  Parameters p{readable(w_down), readable(w_up), b_down, b_up, false, false};
  if (b_up) p.b_up = readable(*b_up);
  const auto frozen = [&](const Tensor& given, const Tensor& used) {
    return given.is_same(used) && !(training && given.requires_grad());
  };
  p.down_is_frozen = frozen(w_down, p.w_down);
  p.up_is_frozen = frozen(w_up, p.w_up) && (!b_up || frozen(*b_up, *p.b_up));
  return p;
}

bool quarantine(Call& call, Parameters& p, bool skips_unused) {
  Tensor bad;
  if (!call.has_zero_gate || !poisons(call, p, skips_unused, bad)) return false;
  const Tensor unit_bad =
      bad.index_select(0, call.adapter_of_unit.slice(0, 0, call.n).to(at::kLong));
  const auto cleared = [&](const Tensor& w) {
    return w.detach().reshape({call.n, -1}).masked_fill(unit_bad.unsqueeze(1), 0).contiguous();
  };
  p.w_down = cleared(p.w_down);
  p.w_up = cleared(p.w_up);
  p.down_is_frozen = p.up_is_frozen = false;
  if (p.b_down) p.b_down = p.b_down->detach().reshape(-1).masked_fill(unit_bad, 0);
  if (p.b_up) p.b_up = p.b_up->detach().masked_fill(bad.unsqueeze(1), 0);
  const bool* is_bad = bad.const_data_ptr<bool>();
  float* row = call.gate_data();
  for (int64_t g = 0; g < call.groups; g++, row += call.adapters + 1) {
    for (int64_t e = 0; e < call.adapters; e++) {
      if (is_bad[e] && row[e] != 0.f) row[e] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  return true;
}

cpu::Operand operand(const Call& call, const Tensor& weight, const OptionalTensor& bias,
                     bool sums_over_width, bool frozen, Kept& kept) {
  const int64_t width = weight.size(-1);
  const WeightUse use{weight, bias ? &*bias : nullptr, call.n, width, sums_over_width, call.bf16};
  cpu::Operand result;
  result.dtype = call.bf16 ? cpu::Dtype::bf16 : cpu::Dtype::f32;
  const cpu::Kernels& kernels = cpu::kernels();
  const bool few = call.tokens <= cpu::kFewRows;
  const bool readable = !call.bf16 || weight.scalar_type() == at::kBFloat16;
  Panels panels;
  if (frozen && !(few && readable)) panels = packed_weight(kernels, use);
  if (!panels && (call.tokens >= kPackForOneCall || (call.bf16 && kernels.rows_bf16 == nullptr))) {
    panels = pack_weight(kernels, use);
  }
  if (panels) {
    result.data = panels->const_data_ptr();
    result.panels = true;
    kept.panels.push_back(std::move(panels));
    return result;
  }
  const auto keep = [&](const Tensor& tensor, at::ScalarType type) {
    kept.tensors.push_back(tensor.detach().to(type));
    return kept.tensors.back().const_data_ptr();
  };
  result.dtype = readable ? cpu_dtype(weight.scalar_type()) : cpu::Dtype::bf16;
  const at::ScalarType type = readable ? weight.scalar_type() : at::kBFloat16;
  if (bias) result.bias = keep(*bias, type);
  result.data = readable ? weight.const_data_ptr() : keep(weight, type);
  result.row = width;
  return result;
}

cpu::Operand bias_operand(const Call& call, const Parameters& p, Kept& kept) {
  Call bias_call = call;
  bias_call.n = call.adapters;
  return operand(bias_call, *p.b_up, {}, true, p.up_is_frozen, kept);
}

const float* unit_bias(const Call& call, const OptionalTensor& b_down, Kept& kept) {
  if (!b_down) return nullptr;
  const bool wide = b_down->scalar_type() == at::kDouble;
  const Tensor source = (wide ? b_down->to(at::kFloat) : *b_down).contiguous();
  const int64_t padded = call.adapter_of_unit.size(0);
  const Tensor bias = at::empty({padded}, at::kFloat);
  float* to = bias.mutable_data_ptr<float>();
  cpu::kernels().to_f32[(int)cpu_dtype(source.scalar_type())](source.const_data_ptr(), call.n, to);
  std::fill_n(to + call.n, padded - call.n, 0.f);
  kept.tensors.push_back(bias);
  return to;
}

cpu::Walk new_walk(const Call& call) {
  cpu::Walk walk;
  walk.tokens = call.tokens;
  walk.units = call.n;
  walk.adapters = call.adapters;
  walk.storage = cpu_dtype(call.type);
  walk.bf16 = call.bf16;
  walk.block.gate = call.gate_data();
  walk.block.gate_row = call.adapters + 1;
  walk.block.tokens_per_row = call.tokens_per_row();
  walk.block.adapter_of_unit = call.adapter_of_unit.const_data_ptr<int32_t>();
  return walk;
}

void set_input(cpu::Walk& walk, const Tensor& x, int64_t width) {
  walk.x = x.const_data_ptr();
  walk.x_row = x.size(0) > 1 ? x.stride(0) : width;
  walk.width_in = width;
}

}  // namespace pemt_fast
