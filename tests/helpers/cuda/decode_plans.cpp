// SPDX-License-Identifier: Apache-2.0
//
// The plan for a problem on a device, names and values in turn.
// Arguments: tokens d h units dtype processors shared_bytes max_cluster.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../../../csrc/cuda/decode.h"

using namespace pemt_fast::cuda;

int main(int, char** v) {
  const auto number = [&](int i) { return std::atoi(v[i]); };
  const Dtype dtype = std::string(v[5]) == "f32" ? Dtype::f32 : Dtype::bf16;
  const DecodeSizes sizes{number(1), number(2), number(3), number(4), dtype};
  const DecodePlan p = plan_decode(sizes, {number(6), number(7), number(8)});
  std::printf("cluster %d slices %d units %d columns %d pass %d tokens %d ", p.cluster, p.slices,
              p.units, p.columns, p.pass, p.tokens);
  std::printf("shared %zu workspace %zu tickets %d microseconds %.3f\n", p.shared_bytes,
              p.workspace_bytes, p.tickets, estimate(sizes, p));
}
