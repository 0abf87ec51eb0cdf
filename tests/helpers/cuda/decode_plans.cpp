// SPDX-License-Identifier: Apache-2.0
//
// The plans for problems on a device, one in a line of the standard input: tokens d h units, units
// of the target adapter, the bytes of a value. Answers with names and values in turn, of the
// mixture, then of the target adapter. Arguments: processors shared_bytes max_cluster may_slice.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../../../csrc/cuda/decode.h"

using namespace pemt_fast::cuda;

int main(int, char** v) {
  const DecodeDevice device{std::atoi(v[1]), std::atoi(v[2]), std::atoi(v[3])};
  const bool may_slice = std::atoi(v[4]) != 0;
  int tokens, d, h, units, target, bytes;
  while (std::scanf("%d %d %d %d %d %d", &tokens, &d, &h, &units, &target, &bytes) == 6) {
    const DecodeSizes sizes{tokens, d, h, units, target, bytes == 4 ? Dtype::f32 : Dtype::bf16};
    const DecodePlans plans = plan_decode(sizes, device, may_slice);
    for (const DecodePlan& p : {plans.mixture, plans.target}) {
      std::printf("cluster %d slices %d units %d columns %d pass %d tokens %d ", p.cluster,
                  p.slices, p.units, p.columns, p.pass, p.tokens);
      std::printf("shared %zu workspace %zu ", p.shared_bytes, p.workspace_bytes);
    }
    std::printf("\n");
  }
}
