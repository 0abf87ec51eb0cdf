// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <unistd.h>

#include <atomic>
#include <deque>

namespace pemt_fast::cpu {
namespace {

struct Registry {
  std::deque<Kernels> tables;  // a deque: references to its elements stay valid
  std::atomic<const Kernels*> in_use{nullptr};

  Registry() {
    tables.push_back(plain::make_kernels());
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) tables.push_back(avx2::make_kernels());
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) tables.push_back(avx512::make_kernels());
    if (avx512 && __builtin_cpu_supports("avx512bf16")) {
      tables.push_back(avx512_bf16::make_kernels());
    }
#endif
    in_use = &tables.back();
  }
};

Registry& registry() {
  static Registry instance;
  return instance;
}

int64_t cache_size(int name, int64_t otherwise) {
  const long size = sysconf(name);
  return size > 0 ? size : otherwise;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels& table : registry().tables) names.emplace_back(table.name);
  return names;
}

const Kernels& kernels() { return *registry().in_use.load(std::memory_order_relaxed); }

bool use_isa(const std::string& name) {
  for (const Kernels& table : registry().tables) {
    if (name == table.name) {
      registry().in_use = &table;
      return true;
    }
  }
  return false;
}

void add_isa(const Kernels& kernels, bool best) {
  registry().tables.push_back(kernels);
  if (best) registry().in_use = &registry().tables.back();
}

const Caches& caches() {
  // Where the system does not tell, what most machines have.
  static const Caches sizes{cache_size(_SC_LEVEL1_DCACHE_SIZE, 32 << 10),
                            cache_size(_SC_LEVEL2_CACHE_SIZE, 512 << 10)};
  return sizes;
}

}  // namespace pemt_fast::cpu
