// SPDX-License-Identifier: Apache-2.0
#include "amx.h"

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pemt_fast {
namespace {

constexpr int64_t kWidePanel = 64;  // two pairs of tiles

// The processor has the tiles and their bfloat16 products, and the system lets this process use
// them.
bool has_amx() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned bits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bits) == bits && at::cpu::init_amx();
#else
  return false;
#endif
}

// One terms more than asked for where their number is odd: both sides have a zero there.
void multiply(const cpu::Product& p) {
  const int64_t terms = p.k + p.k % 2;
  if (terms == 0) return;
  const auto* b = (const at::BFloat16*)p.b;
  for (int64_t column = 0; column < p.n; column += kWidePanel, b += p.b_panel) {
    const int64_t left = std::min(kWidePanel, p.n - column);
    const int64_t columns = (left + cpu::kPanel - 1) / cpu::kPanel * cpu::kPanel;
    at::native::cpublas::brgemm(p.m, columns, terms, p.a_row, kWidePanel, p.c_row, p.accumulate,
                                (const at::BFloat16*)p.a, b, p.c + column, true);
  }
}

}  // namespace

void add_amx_kernels() {
#if defined(__x86_64__)
  for (const std::string& name : cpu::available_isas()) {
    if (name != "avx512_bf16") continue;
    cpu::Kernels kernels = cpu::avx512_bf16::make_kernels();
    const bool amx = has_amx();
    kernels.name = amx ? "amx" : "brgemm";
    kernels.panel_bf16 = kWidePanel;
    kernels.rows_at_once = 64;  // 16 KiB of sums for 64 columns
    kernels.panels_bf16 = multiply;
    kernels.release = [] { at::native::cpublas::brgemm_release(); };
    cpu::add_isa(kernels, amx);
    return;
  }
#endif
}

}  // namespace pemt_fast
