"""Bytes that Triton kernels ask memory for, counted in the interpreter."""

import contextlib
import dataclasses
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from pemt_fast.kernels import plans, weight_gradients

KERNELS = [
    (module, name)
    for module in (plans, weight_gradients)
    for name in vars(module)
    if name.endswith("_kernel")
]


@dataclasses.dataclass
class Traffic:
    """Of one kernel: its grid, and bytes by the name of the argument that they belong to."""

    grid: tuple[int, ...]
    programs: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    loaded: Counter[str] = dataclasses.field(default_factory=Counter)
    stored: Counter[str] = dataclasses.field(default_factory=Counter)


class _Counter:
    """Stands in for a kernel, counts what it does while it runs."""

    def __init__(self, kernel: Any, found: dict[str, Traffic]) -> None:
        self.kernel, self.found = kernel, found
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            traffic = self.found[self.kernel.fn.__name__] = Traffic(grid)
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}
            with _counting(traffic, tensors):
                self.kernel[grid](*args, **kwargs)

        return launch


def _owner(tensors: dict[str, torch.Tensor], address: int) -> str:
    for name, tensor in tensors.items():
        begin = tensor.untyped_storage().data_ptr()
        if begin <= address < begin + tensor.untyped_storage().nbytes():
            return name
    raise AssertionError(f"address {address:#x} is in none of {', '.join(tensors)}")


@contextlib.contextmanager
def _counting(traffic: Traffic, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(counter: Counter[str], pointers: Any, mask: Any) -> None:
        traffic.programs.add(interpreter_builder.grid_idx[: len(traffic.grid)])
        addresses = pointers.data[mask.data]
        if addresses.size:
            name = _owner(tensors, int(addresses.flat[0]))
            counter[name] += addresses.size * tensors[name].element_size()

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(traffic.loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(traffic.stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        unittest.mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        unittest.mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Traffic]]:
    """What the kernels that run inside of the block load and store, by the name of the kernel."""
    found: dict[str, Traffic] = {}
    with contextlib.ExitStack() as patches:
        for module, name in KERNELS:
            stand_in = _Counter(getattr(module, name), found)
            patches.enter_context(unittest.mock.patch.object(module, name, stand_in))
        yield found
