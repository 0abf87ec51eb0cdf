# SPDX-License-Identifier: Apache-2.0
"""`fuse` and `unfuse`: which modules of a model are fused, which are not, and why."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from pemt_fast.fusing.adapterhub import AdapterHub
from pemt_fast.fusing.peft_lora import PeftLora
from pemt_fast.fusing.peft_poly import PeftPoly
from pemt_fast.fusing.protocol import FusedKind, FusedModule, fused_class, replaced_method
from pemt_fast.ops.dispatch import IMPLS


@dataclasses.dataclass(frozen=True)
class Site:
    """One module with adapters. `reason` says why it stays as it is; empty where it is fused."""

    name: str
    kind: str
    reason: str = ""

    @property
    def fused(self) -> bool:
        """Whether the operator computes it now."""
        return not self.reason


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """What `fuse` found, in the order of the model's modules."""

    sites: tuple[Site, ...]

    @property
    def fused(self) -> list[Site]:
        """Those that the operator computes now."""
        return [site for site in self.sites if site.fused]

    @property
    def skipped(self) -> list[Site]:
        """Those that stay as they are, with the reason."""
        return [site for site in self.sites if not site.fused]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.sites)} modules with adapters are fused"]
        lines += [f"  {site.name} ({site.kind}): {site.reason}" for site in self.skipped]
        return "\n".join(lines)


def default_kinds() -> list[FusedKind]:
    """What `fuse` knows by itself, of the libraries that are installed."""
    known: dict[str, list[FusedKind]] = {
        "adapters": [AdapterHub()], "peft": [PeftLora(), PeftPoly()]
    }  # fmt: skip
    return [kind for name in known if _is_installed(name) for kind in known[name]]


def _is_installed(name: str) -> bool:
    # Once imported, `adapters` is a module without a spec, of which `find_spec` raises.
    return name in sys.modules or importlib.util.find_spec(name) is not None


def fuse(
    model: nn.Module, *, kinds: Sequence[FusedKind] | None = None, impl: str = "auto"
) -> FuseReport:
    """Compute the adapters that a model already has by `adapter_mixture` and `skill_mixture`.

    Nothing is copied and no module is replaced: each site becomes an instance of a subclass of its
    own class, with the same parameters, hooks and `state_dict`. Outputs and gradients are those of
    the modules' own `forward` up to rounding, which still computes what the operator cannot (a
    call with dropout, disabled or merged adapters, a composition set later). A second call changes
    nothing but `impl`, and asks again of sites that were not fused; `unfuse` undoes it. Copies,
    pickled ones too, stay fused.

    Args:
        model: Any model with adapters of peft, or a T5 with those of AdapterHub's `adapters`, or
            with modules of `kinds`.
        kinds: What to look for; None for `default_kinds()`.
        impl: Implementation of the operators. The attention of AdapterHub's Fuse is torch's.

    Returns:
        Every module with adapters, fused or with the reason why not. `print` it.

    Raises:
        ValueError: `impl` is no implementation, or the model has no adapters that anything here
            knows: a model that silently runs unfused helps nobody.

    Example:
        >>> model = get_peft_model(t5, peft_config)  # doctest: +SKIP
        >>> print(pemt_fast.fuse(model))  # doctest: +SKIP
        48 of 48 modules with adapters are fused
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    known = list(default_kinds() if kinds is None else kinds)
    sites = [
        site
        for name, module in model.named_modules()
        if (site := _fuse_module(name, module, known, impl)) is not None
    ]
    if not sites:
        names = ", ".join(kind.name for kind in known) or "none: neither peft nor adapters is there"
        raise ValueError(f"the model has no adapters to fuse; kinds that are known: {names}")
    return FuseReport(tuple(sites))


def _fuse_module(
    name: str, module: nn.Module, kinds: Sequence[FusedKind], impl: str
) -> Site | None:
    if isinstance(module, FusedModule):
        fused: Any = module
        fused.__class__ = fused_class(fused.fused_from, fused.fused_kind, impl)
        return Site(name, fused.fused_kind.name)
    found = next((kind for kind in kinds if kind.matches(module)), None)
    if found is None:
        return _foreign_site(name, module)
    reason = found.why_not(module)
    if reason is None and (method := replaced_method(found)) in vars(module):
        reason = f"something has replaced its {method}, such as a hook of accelerate"
    if reason is None:
        module.__class__ = fused_class(type(module), found, impl)
    return Site(name, found.name, reason or "")


def _foreign_site(name: str, module: nn.Module) -> Site | None:
    """A layer of peft of which there is no fused form."""
    if not type(module).__module__.startswith("peft.tuners."):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return None
    of = f"{type(module).__module__.split('.')[2]}.{type(module).__name__}"
    return Site(name, f"peft {of}", f"there is no fused form of {of}")


def unfuse(model: nn.Module) -> int:
    """Give every fused module of `model` its own class back; returns how many there were."""
    count = 0
    for module in model.modules():
        if isinstance(module, FusedModule):
            fused: Any = module
            fused.__class__ = fused.fused_from
            count += 1
    return count
