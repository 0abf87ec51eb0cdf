"""Memory between guards: what torch allocates starts as NaN and is watched on both sides."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_GUARD = 256  # bytes on either side; a multiple of the alignment that torch gives
_FILL = 0xFF  # NaN in every float dtype, -1 in the integers


class GuardedMemory(TorchDispatchMode):
    """Replaces the memory of `empty` and `zeros`, also inside our operators.

    A result that is left unwritten, or that was made of something read beyond an end, is NaN; what
    was written beyond an end is found by `overruns`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, list[int], torch.dtype]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "pemt_fast":
            with self:
                return func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
                )
        if func in (aten.empty.memory_format, aten.zeros.default):
            tensor = self._allocate(list(args[0]), kwargs.get("dtype") or torch.float32)
            return tensor.zero_() if func is aten.zeros.default else tensor
        return func(*args, **kwargs)

    def _allocate(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        end = -(-size // 64) * 64
        buffer = torch.full((_GUARD + end + _GUARD,), _FILL, dtype=torch.uint8)
        self.buffers.append((buffer, shape, dtype))
        return buffer[_GUARD : _GUARD + size].view(dtype).view(shape)

    def overruns(self) -> list[str]:
        """What was written outside of the tensors, one line for each."""
        found = []
        for buffer, shape, dtype in self.buffers:
            size = math.prod(shape) * dtype.itemsize
            for side, guard in (("before", buffer[:_GUARD]), ("behind", buffer[_GUARD + size :])):
                if bool((guard != _FILL).any()):
                    found.append(f"{side} the {dtype} tensor of shape {shape}")
        return found
