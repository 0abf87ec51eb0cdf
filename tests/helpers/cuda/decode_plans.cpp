// SPDX-License-Identifier: Apache-2.0
//
// The plans for problems on a device, one in a line of the standard input: tokens d h units and the
// bytes of a value. Answers with names and values in turn. Arguments: processors shared_bytes
// max_cluster.
#include <cstdio>
#include <cstdlib>

#include "../../../csrc/cuda/decode.h"

using namespace pemt_fast::cuda;

int main(int, char** v) {
  const DecodeDevice device{std::atoi(v[1]), std::atoi(v[2]), std::atoi(v[3])};
  int tokens, d, h, units, bytes;
  while (std::scanf("%d %d %d %d %d", &tokens, &d, &h, &units, &bytes) == 5) {
    const DecodeSizes sizes{tokens, d, h, units, bytes == 4 ? Dtype::f32 : Dtype::bf16};
    const DecodePlan p = plan_decode(sizes, device);
    std::printf("cluster %d slices %d units %d columns %d pass %d tokens %d ", p.cluster, p.slices,
                p.units, p.columns, p.pass, p.tokens);
    std::printf("shared %zu workspace %zu tickets %d\n", p.shared_bytes, p.workspace_bytes,
                p.tickets);
  }
}
