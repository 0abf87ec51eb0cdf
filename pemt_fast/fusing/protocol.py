# SPDX-License-Identifier: Apache-2.0
"""What `fuse` asks of a kind of module, and what it makes of one.

A kind recognises its modules and says what a call of one is in the operator's terms. For modules of
your own write one and pass it: `fuse(model, kinds=[MyKind(), *default_kinds()])`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pemt_fast.ops.adapter_mixture import adapter_mixture
from pemt_fast.ops.linear_mixture import linear_mixture


@dataclasses.dataclass
class StackedCall:
    """`base + Σ_e gate_e·(act(x·w_down[e]ᵀ + b_down[e])·w_up[e] + b_up[e])`, letters as there.

    Either `base [..., H]` or the `linear` that makes it from `x`.
    """

    x: Tensor
    gate: Tensor  # [E], [B, E] or [B, S, E]
    w_down: Tensor  # [N, D]
    w_up: Tensor  # [N, H]
    ranks: Sequence[int]
    activation: str = "identity"
    b_down: Tensor | None = None  # [N]
    b_up: Tensor | None = None  # [E, H]
    base: Tensor | None = None
    linear: nn.Linear | None = None
    dtype: torch.dtype | None = None  # of the result, if not that of x

    def run(self, impl: str) -> Tensor:
        """One call of the operator."""
        parameters = (self.gate, self.w_down, self.w_up, self.b_down, self.b_up)
        options: dict[str, Any] = {"activation": self.activation, "impl": impl}
        options["ranks"] = tuple(self.ranks)
        if self.linear is not None:
            weight, bias = self.linear.weight, self.linear.bias
            out = linear_mixture(self.x, weight, *parameters, bias=bias, **options)
        else:
            out = adapter_mixture(self.x, *parameters, base=self.base, **options)
        return out if self.dtype is None else out.to(self.dtype)


@functools.lru_cache(maxsize=1024)
def on_device(
    values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A gate or ids, made once: bringing them to a device waits for the host at every call."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@runtime_checkable
class FusedKind(Protocol):
    """A kind of module that `fuse` knows. Instances without attributes, of importable classes.

    What `call` computes is the module's `forward`, or the method whose name a kind gives as
    `method`, where its library cuts a module in parts.
    """

    name: str  # in the report

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one of these modules."""
        ...

    def why_not(self, module: nn.Module) -> str | None:
        """Why this one stays as it is, None if it can be fused."""
        ...

    def call(self, module: Any, impl: str, *args: Any, **kwargs: Any) -> Tensor | None:
        """The module's output; None for calls that its own method shall compute."""
        ...


class FusedModule:
    """Comes before the module's own class. Not instantiated: `fuse` sets `__class__`."""

    fused_kind: FusedKind
    fused_from: type[nn.Module]
    fused_impl: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The subclass cannot be imported; pickle and deepcopy make it anew.
        made_from = (self.fused_from, self.fused_kind, self.fused_impl)
        return _rebuild, made_from, self.__dict__


def replaced_method(kind: FusedKind) -> str:
    """The name of the method that `kind.call` computes."""
    return getattr(kind, "method", "forward")


def _through_operator(name: str) -> Callable[..., Any]:
    """A method that goes through the operator, or as the module itself does it."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = self.fused_kind.call(self, self.fused_impl, *args, **kwargs)
        return getattr(self.fused_from, name)(self, *args, **kwargs) if out is None else out

    method.__name__ = name
    return method


@functools.cache
def _subclass(of: type[nn.Module], kind_type: type, impl: str) -> type[nn.Module]:
    kind = kind_type()
    attributes = {"fused_kind": kind, "fused_from": of, "fused_impl": impl}
    attributes["__module__"] = of.__module__
    name = replaced_method(kind)
    attributes[name] = _through_operator(name)
    return type(f"Fused{of.__name__}", (FusedModule, of), attributes)


def fused_class(of: type[nn.Module], kind: FusedKind, impl: str) -> type[nn.Module]:
    """The subclass for modules of this class."""
    return _subclass(of, type(kind), impl)  # type: ignore[arg-type]


def _rebuild(of: type[nn.Module], kind: FusedKind, impl: str) -> nn.Module:
    made = fused_class(of, kind, impl)
    return made.__new__(made)
