// SPDX-License-Identifier: Apache-2.0
//
// The kernels in plain C++: every machine.

#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kernels.h"

#define PEMT_ISA plain
#define PEMT_ISA_NAME "plain"
#define PEMT_ISA_LEVEL 0
#include "kernel_table.h"
