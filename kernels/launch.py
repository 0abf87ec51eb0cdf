# SPDX-License-Identifier: Apache-2.0
"""Launches that ask Triton once what to compile.

`kernel[grid](...)` looks at every argument of every call to find the compiled kernel; with forty of
them that takes longer than small calls run. A `Launcher` is made for tensors of one form, so that
all but the addresses is known, and keeps the compiled kernel.
"""

from __future__ import annotations

from typing import Any

import torch

_ALIGNED = 15  # address bits that must be zero for what Triton compiles for aligned tensors


class Launcher:
    """A kernel with its grid and the values of its `tl.constexpr` parameters.

    The integers it is called with must be the same at every call.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], **options: Any
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.constants, self.options = constants, options
        self.full_grid = (*grid, 1, 1)[:3]
        # Constants are the last parameters of our kernels, in any order by name.
        self.last = [constants[name] for name in kernel.arg_names if name in constants]
        self.compiled: Any = None
        self.tensors: list[int] = []

    def __call__(self, *arguments: Any) -> None:
        """Launch on the current stream of the current device; an argument may be None."""
        if self.compiled is not None and self._are_aligned(arguments):
            self.compiled[self.full_grid](*arguments, *self.last)
            return
        compiled = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        self.tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
        # None from the interpreter. On AMD GPUs what is compiled depends on sizes in bytes too.
        if self._are_aligned(arguments) and torch.version.hip is None:
            self.compiled = compiled

    def _are_aligned(self, arguments: tuple[Any, ...]) -> bool:
        bits = 0
        for i in self.tensors:
            bits |= arguments[i].data_ptr()
        return bits & _ALIGNED == 0
