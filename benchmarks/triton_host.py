# SPDX-License-Identifier: Apache-2.0
"""What a call of `impl="triton"` costs on the host, without a GPU: all but the driver's launch.

    python benchmarks/triton_host.py

Triton gets a driver that launches nothing and kernels that were not compiled, so that a call does
everything else: rules, form, allocation, Triton's launcher in Python. A launch itself takes 2 to 3
µs more. `impl="torch"` and `impl="cpu"` beside it do compute; on T = 1 that is little. On a GPU
`make bench-gpu` measures the whole (T = 16, host µs).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)

import torch
from measure import one_thread
from providers import step
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pemt_fast.ops import adapter_mixture, dispatch, extension
from pemt_fast.testing import make_inputs
from pemt_fast.timing import interleave

CALLS = 200  # per measurement


class NoDriver:
    """A driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Whatever; nothing is compiled for it."""
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> object:
        """As the real driver's."""
        return torch.cuda


class NoKernel(CompiledKernel):
    """Launches nothing, by the way of a compiled kernel."""

    name, src, function, packed_metadata = "none", None, 0, ()
    run = staticmethod(lambda *arguments: None)

    def __init__(self) -> None:
        pass

    def _init_handles(self) -> None:
        pass


def _compile_nothing(kernel: JITFunction, key: str, *arguments: object) -> NoKernel:
    cache = kernel.device_caches[0][0]
    return cache.setdefault(key, NoKernel())


def _repeated(run: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            run()

    return calls


def main() -> None:
    """Print µs per call, minimum and median over interleaved rounds."""
    driver.set_active(NoDriver())
    JITFunction._do_compile = _compile_nothing
    dispatch._TRITON_INTERPRETED = True  # lets CPU tensors through
    impls = ["torch", "triton"] + (["cpu"] if extension.load() else [])
    print("| gradients | impl | min µs | median µs |\n|---|---|---|---|")
    for trains, name in (((), "none"), (("x", "gate"), "forward, of x and gate")):
        inputs = make_inputs(
            1, 1, E=6, D=64, R=8, H=64, dtype=torch.bfloat16, activation="relu",
            requires_grad=trains,
        )  # fmt: skip
        runs = {}
        for impl in impls:
            ours = functools.partial(adapter_mixture, impl=impl)
            runs[impl] = functools.partial(inputs.call, ours) if trains else step(inputs, ours)
        with one_thread():
            seconds = interleave({impl: _repeated(run) for impl, run in runs.items()})
        for impl, values in seconds.items():
            values = sorted(1e6 * value / CALLS for value in values)
            print(f"| {name} | {impl} | {values[0]:.1f} | {values[len(values) // 2]:.1f} |")


if __name__ == "__main__":
    main()
