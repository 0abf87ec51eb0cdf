// SPDX-License-Identifier: Apache-2.0
#include "decode_mixture.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

#include "cuda_library.h"

namespace pemt_fast {
namespace {

// Far below what the sums of sizes in the plans can hold.
constexpr int64_t kMostWidth = 1 << 20, kMostUnits = 1 << 20;
constexpr size_t kMostPlans = 4096;

std::optional<cuda::Dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return cuda::Dtype::f32;
    case at::kBFloat16:
      return cuda::Dtype::bf16;
    case at::kHalf:
      return cuda::Dtype::f16;
    default:
      return std::nullopt;
  }
}

cuda::Activation activation_of(std::string_view name) {
  if (name == "relu") return cuda::Activation::relu;
  if (name == "gelu") return cuda::Activation::gelu;
  if (name == "gelu_tanh") return cuda::Activation::gelu_tanh;
  if (name == "silu") return cuda::Activation::silu;
  TORCH_CHECK_VALUE(name == "identity", "no activation has the name ", std::string(name));
  return cuda::Activation::identity;
}

// Dense numbers that are read one by one; null for what is not there.
bool read_values(const OptionalTensor& t, cuda::Values& values) {
  if (!t) return true;
  const auto dtype = dtype_of(t->scalar_type());
  if (!dtype || !t->is_contiguous()) return false;
  values = {t->const_data_ptr(), *dtype};
  return true;
}

// The distance of rows [T, width] that are dense along the last dimension, or nothing.
std::optional<int64_t> row_of(const at::Tensor& t, int64_t width) {
  if (t.is_contiguous()) return width;
  if (t.stride(-1) != 1 && width != 1) return std::nullopt;
  std::optional<int64_t> row;
  int64_t next = 0;
  for (int64_t i = t.dim() - 2; i >= 0; i--) {
    if (t.size(i) == 1) continue;
    if (row && t.stride(i) != next) return std::nullopt;
    if (!row) row = t.stride(i);
    next = t.stride(i) * t.size(i);
  }
  return row.value_or(width);
}

// w_up: dense, or the transpose of what is dense.
bool read_up(const at::Tensor& w_up, int64_t units, cuda::Adapters& adapters) {
  adapters.w_up = w_up.const_data_ptr();
  if (w_up.is_contiguous()) return true;
  adapters.transposed = true;
  const bool single = w_up.dim() == 2 || w_up.size(0) == 1;
  return single && w_up.stride(-2) == 1 && w_up.stride(-1) == units;
}

bool read_mixture(const MixtureTensors& m, const at::Tensor& x, int64_t width, int64_t tokens,
                  bool may_differ, cuda::Adapters& a, cuda::Decode& call) {
  const int64_t adapters = (int64_t)m.ranks.size(), h = call.h;
  const int64_t units = m.w_down->numel() / width;
  if (adapters > cuda::kMaxAdapters || units > kMostUnits || m.w_up->numel() != units * h ||
      m.w_down->scalar_type() != x.scalar_type() || m.w_up->scalar_type() != x.scalar_type() ||
      !m.w_down->is_contiguous() || !read_up(*m.w_up, units, a) ||
      !read_values(m.b_down, a.b_down) || !read_values(m.b_up, a.b_up)) {
    return false;
  }
  a.units = (int)units;
  a.adapters = (int)adapters;
  a.w_down = m.w_down->const_data_ptr();
  a.activation = activation_of(m.activation);
  a.scale = (float)m.scale;
  a.tokens_per_gate = 1;
  if (m.gate != nullptr) {
    const int64_t gates = m.gate->numel() / adapters;
    if (gates == 0 || !read_values(*m.gate, a.gate)) return false;
    a.tokens_per_gate = (int)(tokens / gates);
  }
  const auto& ranks = m.ranks;
  if (std::all_of(ranks.begin(), ranks.end(), [&](int64_t r) { return r == ranks[0]; })) {
    a.rank = (int)ranks[0];
    return true;
  }
  int64_t end = 0;
  for (size_t e = 0; e < ranks.size(); e++) call.ends[e] = (int32_t)(end += ranks[e]);
  return may_differ;
}

// Of all calls from now on, in the place of what the plans say; 0 blocks for those.
struct Grid {
  int cluster = 0, slices = 0;
} forced;

// Weighing all forms of the grid takes longer than a launch: once for each problem.
cuda::DecodePlans planned(const cuda::Decode& c, const cuda::DecodeDevice& device, bool may_slice) {
  using Key = std::array<int, 10>;
  static std::mutex mutex;
  static std::map<Key, cuda::DecodePlans> plans;
  const cuda::DecodeSizes sizes{c.tokens, c.d, c.h, c.mixture.units, c.target.units, c.dtype};
  if (forced.cluster > 0) {
    cuda::DecodePlans wanted =
        cuda::plans_of(sizes, device, forced.cluster, may_slice ? forced.slices : 1);
    const bool fits = wanted.shared_bytes() <= (size_t)device.shared_bytes;
    if (!fits || forced.cluster > device.max_cluster) wanted.mixture.cluster = 0;
    return wanted;
  }
  const Key key{device.processors, device.shared_bytes, device.max_cluster, c.tokens,      c.d, c.h,
                c.mixture.units,   c.target.units,      int(c.dtype),       int(may_slice)};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans[key] = cuda::plan_decode(sizes, device, may_slice);
}

}  // namespace

void use_decode_grid(int cluster, int slices) {
  const bool is_none = cluster == 0 && slices == 0;
  const bool is_power = cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8;
  TORCH_CHECK_VALUE(is_none || (is_power && slices > 0),
                    "a grid has clusters of 1, 2, 4 or 8 blocks and at least one slice, or 0 and 0 "
                    "for what the plans say; got ",
                    cluster, " and ", slices);
  forced = {cluster, slices};
}

std::array<int, 2> decode_grid(int index, int tokens, int d, int h, int units, int target_units,
                               at::ScalarType type) {
  const cuda::DecodeDevice* device = cuda_device(index);
  const auto dtype = dtype_of(type);
  TORCH_CHECK(device != nullptr && dtype, "the decode kernel does not run there");
  const auto plans = cuda::plan_decode({tokens, d, h, units, target_units, *dtype}, *device, true);
  return {plans.mixture.cluster, plans.mixture.slices};
}

std::optional<at::Tensor> decode_mixture(const at::Tensor& x, const MixtureTensors& mixture,
                                         const MixtureTensors* target, const OptionalTensor& base,
                                         void* stream) {
  const int64_t d = x.size(-1), h = mixture.w_up->size(-1);
  const int64_t tokens = d == 0 ? 0 : x.numel() / d;
  const int index = std::max<int>(x.get_device(), 0);
  const auto dtype = dtype_of(x.scalar_type());
  if (tokens < 1 || tokens > cuda::kMaxTokens || h < 1 || d > kMostWidth || h > kMostWidth ||
      !dtype) {
    return std::nullopt;
  }
  const auto x_row = row_of(x, d);
  const auto base_row = base ? row_of(*base, h) : 0;
  const cuda::DecodeDevice* device = cuda_device(index);
  if (!x_row || !base_row || device == nullptr) return std::nullopt;
  cuda::Decode call{};
  call.tokens = (int)tokens, call.d = (int)d, call.h = (int)h, call.dtype = *dtype;
  call.x = x.const_data_ptr(), call.x_row = *x_row;
  if (base) {
    const auto base_dtype = dtype_of(base->scalar_type());
    if (!base_dtype) return std::nullopt;
    call.base = {base->const_data_ptr(), *base_dtype}, call.base_row = *base_row;
  }
  if (!read_mixture(mixture, x, d, tokens, true, call.mixture, call)) return std::nullopt;
  if (target && !read_mixture(*target, x, h, tokens, false, call.target, call)) return std::nullopt;

  const c10::DeviceGuard guard(x.device());
  cuda::DecodePlans plans = planned(call, *device, true);
  if (plans.mixture.slices > 1) {
    call.ticket = cuda_library()->ticket(index, stream);
    if (call.ticket == nullptr) plans = planned(call, *device, false);
  }
  if (plans.mixture.cluster == 0) return std::nullopt;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.push_back(h);
  at::Tensor out = at::empty(sizes, x.options()), workspace;
  if (plans.mixture.workspace_bytes > 0) {
    const auto count = (int64_t)(plans.mixture.workspace_bytes / sizeof(float));
    workspace = at::empty({count}, x.options().dtype(at::kFloat));
    call.workspace = workspace.mutable_data_ptr<float>();
  }
  call.out = out.mutable_data_ptr();
  const char* error = cuda_library()->decode(index, call, plans, stream);
  TORCH_CHECK(error == nullptr, "the launch of pemt_fast's decode kernel on ", x.device(),
              " failed: ", error);
  return out;
}

}  // namespace pemt_fast
