// SPDX-License-Identifier: Apache-2.0
#include "sparsity_loss.h"

#include <algorithm>
#include <vector>

#include "threads.h"

namespace pemt_fast::cpu {
namespace {

constexpr int64_t kTokensAtOnce = 16;
// Below so many elements of all rows a second thread costs more than it takes over.
constexpr int64_t kWorthSharing = 1 << 16;

}  // namespace

void run(const Kernels& kernels, const SparsityLoss& loss, int threads) {
  const int64_t tokens = loss.tokens, adapters = loss.rows.adapters;
  const bool* mask = loss.rows.mask;
  const int64_t count = mask ? std::count(mask, mask + tokens, true) : tokens;
  std::vector<float> d_cosine((size_t)adapters);
  for (int64_t e = 0; e < adapters; e++) {
    d_cosine[(size_t)e] = -loss.share[e] * loss.scale / (float)std::max<int64_t>(count, 1);
  }
  const int64_t blocks = (tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  std::vector<double> cosines((size_t)(blocks * adapters));
  const bool shared = tokens * (loss.rows.h + 4 * loss.rows.n) >= kWorthSharing;
  const int team = shared ? (int)std::min<int64_t>(threads, blocks) : 1;
  Tasks tasks(blocks);
  parallel(team, [&](int thread) {
    if (thread >= team) return;
    for (int64_t block; tasks.next(block);) {
      LossRows rows = loss.rows;
      rows.begin = block * kTokensAtOnce;
      rows.end = std::min(tokens, rows.begin + kTokensAtOnce);
      rows.d_cosine = d_cosine.data();
      rows.cosines = cosines.data() + block * adapters;
      kernels.sparsity_loss[(int)loss.storage](rows);
    }
  });
  for (int64_t e = 0; e < adapters; e++) {
    double sum = 0.;
    for (int64_t block = 0; block < blocks; block++) sum += cosines[(size_t)(block * adapters + e)];
    loss.disagreement[e] = count > 0 ? (float)(1. - sum / (double)count) : 0.f;
  }
}

}  // namespace pemt_fast::cpu
