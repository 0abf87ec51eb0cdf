// SPDX-License-Identifier: Apache-2.0
//
// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kernels.h"

// NOTE: to the end of the file, so that templates are instantiated under it. Nothing of the
// standard library may be instantiated below: the linker could take that copy for all machines.
#pragma GCC target("avx2,fma,f16c")

#define PEMT_ISA avx2
#define PEMT_ISA_NAME "avx2"
#define PEMT_ISA_LEVEL 1
#include "kernel_table.h"
#endif
