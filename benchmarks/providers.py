# SPDX-License-Identifier: Apache-2.0
"""Who computes it: the baselines, this library, and the bare matmuls as a bound.

Every provider but the bound takes what `adapter_mixture` takes. The baselines are written here from
torch alone, so that no change of the library can move them. Checked before they are timed:
`checking.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from cases import FORWARD, TRAINABLE
from records import OURS_PREFIX
from torch import Tensor

from pemt_fast import adapter_mixture
from pemt_fast.ops.dispatch import AUTO_TABLE, IMPLS, unavailable_reasons
from pemt_fast.testing import MixtureInputs, adapter_mixture_loop

Mixture = Callable[..., Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def published(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str,
    base: Tensor | None = None,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """PEMT's published formulation: outputs of all experts stacked, then a matmul with the gate."""
    outputs = []
    for e in range(gate.shape[-1]):
        z = F.linear(x, w_down[e], None if b_down is None else b_down[e])
        up_bias = None if b_up is None else b_up[e]
        outputs.append(F.linear(_ACTIVATIONS[activation](z), w_up[e].t(), up_bias))
    rows = gate if gate.dim() == x.dim() else gate.unsqueeze(1)  # [B, S or 1, E]
    mixed = torch.matmul(torch.stack(outputs, -1), rows.unsqueeze(-1)).squeeze(-1)  # [B, S, H]
    return mixed if base is None else base + mixed


def stacked(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str,
    base: Tensor | None = None,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """The best plain torch form we know, under autograd: one MLP of width N, scaled by the gate."""
    e_count, r, d = w_down.shape
    n, h = e_count * r, w_up.shape[-1]
    z = F.linear(x, w_down.view(n, d), None if b_down is None else b_down.view(n))
    rows = gate if gate.dim() == x.dim() else gate.unsqueeze(1)  # [B, S or 1, E]
    hidden = _ACTIVATIONS[activation](z).view(*x.shape[:-1], e_count, r)
    gated = (hidden * rows.unsqueeze(-1)).view(-1, n)  # [T, N]
    if b_up is not None:
        bias = rows @ b_up
        base = bias.expand(*x.shape[:-1], h) if base is None else base + bias
    if base is None:
        return torch.mm(gated, w_up.view(n, h)).view(*x.shape[:-1], h)
    return torch.addmm(base.reshape(-1, h), gated, w_up.view(n, h)).view(*x.shape[:-1], h)


def grouped_mm_missing(device: torch.device) -> str | None:
    """Why torch has no grouped matmul, None if it has one."""
    return None if _grouped_mm() else f"torch {torch.__version__} has no grouped_mm"


def _grouped_mm() -> Callable[..., Tensor] | None:
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


Routing = tuple[Tensor, Tensor]  # [T, k] gate values, [T, k] their adapters


def routing_of(gate: Tensor, top_k: int) -> Routing:
    """The adapters that each token uses, which a router knows without looking at a dense gate."""
    rows = gate.view(-1, gate.shape[-1])
    experts = rows.abs().topk(top_k, dim=-1).indices
    return rows.gather(-1, experts), experts


def grouped(
    x: Tensor,
    gate: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str,
    base: Tensor | None = None,
    ranks: Sequence[int] | None = None,
    top_k: int,
    routing: Routing | None = None,
) -> Tensor:
    """As ScatterMoE does it: tokens sorted by adapter, grouped matmuls of each adapter's tokens.

    For a gate per token with `top_k` values that are not 0. Forward only.
    """
    e_count, h = gate.shape[-1], w_up.shape[-1]
    weights, experts = routing_of(gate, top_k) if routing is None else routing
    chosen, order = experts.flatten().sort(stable=True)  # [T·k]
    ends = torch.searchsorted(chosen, torch.arange(e_count, device=x.device), right=True).int()
    scale = weights.flatten()[order].unsqueeze(-1)
    matmul = _grouped_mm()
    z = matmul(x.view(-1, x.shape[-1])[order // top_k], w_down.transpose(1, 2), offs=ends)
    z = z if b_down is None else z + b_down[chosen]
    y = matmul(_ACTIVATIONS[activation](z) * scale, w_up, offs=ends)
    y = y if b_up is None else y + scale * b_up[chosen]
    mixed = torch.empty_like(y).index_copy_(0, order, y).view(-1, top_k, h).sum(1)
    out = mixed.view(*x.shape[:-1], h)
    return out if base is None else base + out


def compile_stacked(*, any_tokens: bool = False, mode: str | None = None) -> Mixture:
    """`torch.compile` of `stacked`, specialised to the shape; `mode` is the compiler's.

    With `any_tokens` one compilation serves all numbers of tokens, if the inputs went through
    `mark_tokens`; everything else stays specialised.
    """
    return torch.compile(stacked, dynamic=None if any_tokens else False, fullgraph=True, mode=mode)


def mark_tokens(inputs: MixtureInputs) -> MixtureInputs:
    """The same tensors; the compiler is told that the number of their tokens changes.

    That is the number of sequences or, as 1 is always special to it, the length of the only one.
    """
    dim = 0 if inputs.x.shape[0] > 1 else 1
    for tensor in (inputs.x, inputs.gate, inputs.base):
        # A gate per sequence has a row per sequence and no row per token.
        if tensor is not None and tensor.dim() > dim + 1 and tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
    return inputs


def compiler_missing(device: torch.device) -> str | None:
    """Why `torch.compile` cannot work, None if nothing speaks against it."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    if any(name and shutil.which(name) for name in compilers):
        return None
    return "no C++ compiler was found: set CXX or install g++"


@dataclasses.dataclass(frozen=True)
class Provider:
    """`build()` gives the function to call; `missing(device)` the reason why it cannot run.

    `exempt` from the error budget is what we do not write but replace; its formula is checked in
    float64 instead.
    """

    name: str
    build: Callable[[], Mixture]
    missing: Callable[[torch.device], str | None] = lambda device: None
    exempt: bool = False


def _ours(impl: str) -> Provider:
    return Provider(
        OURS_PREFIX + impl,
        lambda: functools.partial(adapter_mixture, impl=impl),
        lambda device: "; ".join(unavailable_reasons(impl, device)) or None,
    )


BASELINES = (
    # NOTE: its gate gradient, a matrix-vector product over H, can round worse than the budget.
    Provider("published", lambda: published, exempt=True),
    Provider("loop", lambda: adapter_mixture_loop),
    Provider("stacked", lambda: stacked),
    Provider("compiled", compile_stacked, compiler_missing),
)
# Whatever `dispatch.py` calls available on the device is measured.
PROVIDERS = (*BASELINES, *(_ours(impl) for impl in IMPLS if impl not in ("auto", "reference")))
BOUND = "matmuls"


def preferred(device: str) -> str:
    """The provider that `impl="auto"` means on this device."""
    return OURS_PREFIX + AUTO_TABLE[device]


def bare_matmuls(inputs: MixtureInputs, mode: str) -> Callable[[], object]:
    """Only the matmuls of the mode: no gate, activation, bias or base, and no autograd."""
    n = inputs.w_down.shape[0] * inputs.w_down.shape[1]
    x, d_out = (t.reshape(-1, t.shape[-1]) for t in (inputs.x, inputs.grad_out))
    w_down, w_up = inputs.w_down.view(n, -1), inputs.w_up.view(n, -1)

    def run() -> list[Tensor]:
        hidden = torch.mm(x, w_down.t())
        results = [torch.mm(hidden, w_up)]
        if mode != FORWARD:
            d_hidden = torch.mm(d_out, w_up.t())
            results.append(torch.mm(d_hidden, w_down))
        if mode == TRAINABLE:
            results += [torch.mm(d_hidden.t(), x), torch.mm(hidden.t(), d_out)]
        return results

    return run


def step(inputs: MixtureInputs, function: Mixture) -> Callable[[], object]:
    """One call: the output, and the gradients of whatever requires grad."""
    leaves = tuple(t for t in inputs.tensors().values() if t.requires_grad)
    arguments = (inputs.x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up)
    run = functools.partial(function, *arguments, activation=inputs.activation, base=inputs.base)

    def forward() -> object:
        with torch.no_grad():
            return run()

    def forward_backward() -> object:
        return torch.autograd.grad(run(), leaves, inputs.grad_out)

    return forward_backward if leaves else forward
