// SPDX-License-Identifier: Apache-2.0
//
// The kernels for AVX-512 with products of bfloat16 pairs.
#if defined(__x86_64__)
// GCC 12 takes the undefined operand of unmasked intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kernels.h"

// NOTE: to the end of the file, so that templates are instantiated under it. Nothing of the
// standard library may be instantiated below: the linker could take that copy for all machines.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

// The same, where an intrinsic was inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define PEMT_ISA avx512_bf16
#define PEMT_ISA_NAME "avx512_bf16"
#define PEMT_ISA_LEVEL 3
#include "kernel_table.h"
#endif
