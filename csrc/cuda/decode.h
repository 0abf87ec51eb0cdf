// SPDX-License-Identifier: Apache-2.0
//
// The operator for few tokens in one launch (T <= 64, inference): generation is bound by launches,
// not by the bytes of the weights. What it computes: pemt_fast/ops/adapter_mixture.py; letters as
// there. No torch and no CUDA header here: the plan and its tests need neither.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pemt_fast::cuda {

enum class Dtype { f32, bf16, f16 };
enum class Activation { identity, relu, gelu, gelu_tanh, silu };

constexpr int kMaxTokens = 64;
constexpr int kMaxAdapters = 256;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 16;         // units of one tensor-core product
constexpr int kTileColumns = 64;  // columns of the output that one warp makes at a time

// What a plan depends on.
struct DecodeSizes {
  int tokens, d, h, units;
  int target_units;  // 0 without a target adapter
  Dtype dtype;
};
struct DecodeDevice {
  int processors;    // streaming multiprocessors
  int shared_bytes;  // that one block may have
  int max_cluster;   // blocks that can exchange hidden units; 1 where there are no clusters
};

// The grid is `cluster` x `slices` blocks. The blocks of a cluster share the hidden units of one
// slice: each computes its part of them for all tokens, all get all of them, and each makes its
// columns of the output. With more slices than one, sums of a slice go through a workspace, and the
// last cluster to arrive adds them up in the order of the slices.
struct DecodePlan {
  int cluster, slices;
  int units;    // of a slice, a multiple of `cluster` * kTile
  int columns;  // of a block, a multiple of 8
  int pass;     // columns whose sums lie in shared memory at a time
  int parts_d;  // warps that share one tile of units: parts of D
  int parts_n;  // warps that share one tile of columns: parts of the units
  int tokens;   // rounded up to what the products take: 8, 16, 32 or 64
  size_t shared_bytes, workspace_bytes;

  constexpr int own_units() const { return units / cluster; }
  // Floats of a unit or column: odd, so that neighbours lie in different banks of shared memory.
  constexpr int sums_row() const { return tokens + 1; }
  // Sums of both products lie in the same place, one after the other.
  constexpr size_t sums_bytes() const {
    const int down = parts_d * own_units(), up = parts_n * pass;
    return 4 * size_t(sums_row()) * size_t(down > up ? down : up);
  }
  constexpr int pass_tiles() const { return (pass + kTileColumns - 1) / kTileColumns; }
};

// The target adapter follows in the last cluster, with a plan of its own: one slice.
struct DecodePlans {
  DecodePlan mixture, target;

  constexpr size_t shared_bytes() const {
    return mixture.shared_bytes > target.shared_bytes ? mixture.shared_bytes : target.shared_bytes;
  }
};

// The plan with so many blocks in a cluster and so many slices (fewer if the units end before). It
// may need more shared memory than there is.
DecodePlans plans_of(const DecodeSizes& sizes, const DecodeDevice& device, int cluster, int slices);

// The plan whose estimated time is the shortest; deterministic. Without blocks if none fits. With
// more slices than one only if `may_slice`: they need a counter.
DecodePlans plan_decode(const DecodeSizes& sizes, const DecodeDevice& device, bool may_slice);

// Estimated microseconds of a call, on an H100 or H200.
double estimate(const DecodeSizes& sizes, const DecodePlans& plans);

// Numbers that are read one by one, in a dtype of their own.
struct Values {
  const void* data;
  Dtype dtype;
};

// A mixture of adapters, from some width to H.
struct Adapters {
  int units, adapters;
  int rank;                   // of each adapter; 0 where they differ
  const void *w_down, *w_up;  // [N, width], [N, H], dtype of x, dense
  bool transposed;            // w_up is [H, N]
  Values b_down, b_up;        // [N], [E, H]; or null
  Values gate;                // [G, E]; null where all are `scale`
  int tokens_per_gate;        // T / G
  float scale;
  Activation activation;
};

// One call: y = base + mixture(x), and with a target adapter out = y + target(y), else out = y.
struct Decode {
  int tokens, d, h;
  Dtype dtype;
  const void* x;  // [T, D], rows dense
  int64_t x_row;
  Values base;  // [T, H], rows dense; or null
  int64_t base_row;
  Adapters mixture;
  Adapters target;             // its units are 0 where there is none; its ranks are equal
  void* out;                   // [T, H], dense
  float* workspace;            // [slices, T, H]; or null
  unsigned* ticket;            // counter, 0 between calls; or null
  int32_t ends[kMaxAdapters];  // unit behind the last one of each adapter, where ranks differ
};

// Whether 8 values of 16 bits may be read at a time, from any row.
bool is_aligned(const Decode& call);

}  // namespace pemt_fast::cuda
