// SPDX-License-Identifier: Apache-2.0
//
// bfloat16 products on AMX tiles, by way of the block products that torch exports.
#pragma once

namespace pemt_fast {

// Adds the instruction set "amx", and prefers it, where the machine has AMX. Elsewhere, where
// AVX-512 has bfloat16 products, the same code is "brgemm": there to be tested.
void add_amx_kernels();

}  // namespace pemt_fast
