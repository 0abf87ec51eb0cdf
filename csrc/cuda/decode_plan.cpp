// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "decode.h"

namespace pemt_fast::cuda {
namespace {

int round_up(int value, int step) { return (value + step - 1) / step * step; }
int divided(int value, int by) { return (value + by - 1) / by; }
size_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Per microsecond, of one block: 64 bytes a clock from the second cache.
constexpr double kBlockBytes = 1e5;
// Of the whole device: 4.3 TB/s from memory.
constexpr double kDeviceBytes = 4.3e6;
// Microseconds: waiting for the blocks of a cluster; a workspace written, counted and read.
constexpr double kClusterWait = 1.0, kWorkspaceWait = 2.0;

// Of the mixture, or of the target adapter as if it were one.
DecodePlan plan_of(const DecodeSizes& z, const DecodeDevice& device, int cluster, int slices) {
  DecodePlan p{};
  p.cluster = cluster;
  p.units = round_up(divided(z.units, slices), cluster * kTile);
  p.slices = divided(z.units, p.units);
  p.columns = round_up(divided(z.h, cluster), 8);
  p.tokens = 8;
  while (p.tokens < z.tokens) p.tokens *= 2;
  const size_t tokens = size_t(p.tokens);
  size_t hidden = tokens * size_t(p.units + 8) * bytes_of(z.dtype);
  hidden += (tokens + size_t(p.units)) * 4 + 16;
  // As many warps as there is room for their sums.
  const auto warps_for = [&](int rows) {
    const size_t all = size_t(device.shared_bytes), room = all > hidden ? all - hidden : 0;
    return std::max(1, std::min(kWarps, int(room / (4 * size_t(rows * p.sums_row())))));
  };
  const int down_warps = warps_for(kTile), up_warps = warps_for(kTileColumns);
  p.parts_d = std::max(1, std::min(down_warps / (p.own_units() / kTile), divided(z.d, 32)));
  p.pass = std::min(p.columns, up_warps * kTileColumns);
  p.parts_n = std::max(1, std::min(up_warps / p.pass_tiles(), p.units / kTile));
  p.shared_bytes = p.sums_bytes() + hidden;
  const bool summed = p.slices > 1;
  p.workspace_bytes = summed ? size_t(p.slices) * size_t(z.tokens) * size_t(z.h) * 4 : 0;
  return p;
}

double estimate_of(const DecodeSizes& z, const DecodePlan& p) {
  const double size = double(bytes_of(z.dtype));
  const double weights = size * z.units * (double(z.d) + z.h);
  double block = size * (double(p.own_units()) * z.d + double(p.units) * p.columns);
  block += size * z.tokens * z.d * std::max(1, p.own_units() / kTile / kWarps);
  double time = std::max(block / kBlockBytes, weights / kDeviceBytes);
  if (p.cluster > 1) time += kClusterWait;
  if (p.slices > 1) {
    time += kWorkspaceWait + 4. * p.slices * z.tokens * p.columns / kBlockBytes;
  }
  return time;
}

DecodeSizes target_of(const DecodeSizes& z) {
  return {z.tokens, z.h, z.h, z.target_units, 0, z.dtype};
}

}  // namespace

DecodePlans plans_of(const DecodeSizes& z, const DecodeDevice& device, int cluster, int slices) {
  DecodePlans plans{plan_of(z, device, cluster, slices), {}};
  if (z.target_units > 0) plans.target = plan_of(target_of(z), device, cluster, 1);
  return plans;
}

bool is_aligned(const Decode& c) {
  const auto fits = [](const void* p) { return (uintptr_t)p % 16 == 0; };
  const auto all_fit = [&](const Adapters& a) {
    return fits(a.w_down) && fits(a.w_up) && (!a.transposed || a.units % 8 == 0);
  };
  const bool target = c.target.units == 0 || (all_fit(c.target) && fits(c.out));
  return all_fit(c.mixture) && target && fits(c.x) && c.x_row % 8 == 0 && c.d % 8 == 0 &&
         c.h % 8 == 0;
}

double estimate(const DecodeSizes& z, const DecodePlans& plans) {
  const double mixture = estimate_of(z, plans.mixture);
  return z.target_units > 0 ? mixture + estimate_of(target_of(z), plans.target) : mixture;
}

DecodePlans plan_decode(const DecodeSizes& z, const DecodeDevice& device, bool may_slice) {
  DecodePlans best{};
  double shortest = 0;
  const int most = may_slice ? divided(z.units, kTile) : 1;
  for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
    if (cluster > 1 && cluster * 8 > z.h) break;
    for (int slices = 1; slices <= most && slices * cluster <= device.processors; slices++) {
      const DecodePlans plans = plans_of(z, device, cluster, slices);
      if (plans.mixture.slices != slices || plans.shared_bytes() > size_t(device.shared_bytes)) {
        continue;
      }
      const double time = estimate(z, plans);
      if (best.mixture.cluster == 0 || time < shortest) {
        best = plans;
        shortest = time;
      }
    }
  }
  return best;
}

}  // namespace pemt_fast::cuda
