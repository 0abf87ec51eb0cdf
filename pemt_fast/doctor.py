# SPDX-License-Identifier: Apache-2.0
"""Compare the kernels with the float64 reference on the machine at hand (`pemt-fast doctor`).

The output and every gradient of a few calls of the mixture and of the Task Sparsity Loss, within
the error budget of the tests (`testing.assert_within_budget`), per implementation and dtype. What
kernels pass on a GPU is remembered (`ops/verified.py`); those that `impl="auto"` may take there it
takes from then on. Of `impl="cuda"` its own kernel is examined, which has no gradients.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops import (
    adapter_mixture,
    cuda_door,
    cuda_library,
    task_sparsity_loss,
    triton_door,
    verified,
)
from pemt_fast.ops.dispatch import unavailable_reasons
from pemt_fast.testing import (
    MixtureInputs,
    assert_within_budget,
    compare_with_oracle,
    make_inputs,
    share_of_budget,
)

IMPLS = ("cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One token; odd sizes with every tensor there is; adapters of unequal rank; PEMT's shape; enough
# tokens for the kernels of large calls. Leading sizes, and arguments of `make_inputs`.
_CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((1,), {"E": 2, "R": 8, "D": 64, "H": 64, "activation": "identity", "bias": False}),
    ((2, 63), {"E": 6, "R": 24, "D": 75, "H": 141, "activation": "gelu"}),
    ((130,), {"R": (8, 24, 32), "D": 96, "H": 60, "gate": "[B, S, E]", "activation": "silu"}),
    ((4, 128), {"E": 6, "R": 64, "D": 3072, "H": 768, "activation": "identity", "bias": False}),
    ((2, 2500), {"E": 2, "R": 64, "D": 512, "H": 768, "gate": "[B, S, E]", "activation": "relu"}),
)
# On a CPU, where the comparison itself takes its time in float64 and in 16 bits: as many blocks of
# tokens and units, of smaller size.
_CPU_CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    *_CASES[:3],
    ((2, 40), {"E": 6, "R": 64, "D": 1024, "H": 256, "activation": "identity", "bias": False}),
    ((2, 300), {"E": 2, "R": 64, "D": 256, "H": 128, "gate": "[B, S, E]", "activation": "relu"}),
)
# For the kernel of few tokens: every number of tokens that it has an instance for, PEMT's shape as
# well; one cluster, several, columns that no 8 divide.
_DECODE_CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    _CASES[0],
    ((2, 4), {"E": 6, "R": 24, "D": 75, "H": 141, "activation": "gelu"}),
    ((13,), {"R": (8, 24, 32), "D": 96, "H": 60, "gate": "[B, S, E]", "activation": "silu"}),
    ((16, 1), {"E": 6, "R": 64, "D": 3072, "H": 768, "activation": "identity", "bias": False}),
    ((64,), {"E": 8, "R": 64, "D": 512, "H": 768, "gate": "[B, E]", "activation": "gelu_tanh"}),
)
_MOST_TOKENS_INTERPRETED = 200

# The loss: unequal ranks with every tensor there is; PEMT's shape. Leading sizes, ranks, width.
_LOSS_CASES = (
    ((2, 31), (5, 24, 32), 75, True),
    ((4, 128), (64,) * 6, 768, False),
)
_CPU_LOSS_CASES = (_LOSS_CASES[0], ((2, 40), (64,) * 6, 256, False))
_LOSS_DRAWS = 8  # of each case: by luck one loss of the torch form can be exact


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one implementation in one dtype on one device."""

    device: str
    impl: str
    dtype: str
    passed: bool
    worst: float  # share of the error budget, 1 and below is right
    seconds: float
    reason: str = ""  # why not, in one line


def cases(
    impl: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[int], MixtureInputs]]:
    """Inputs by seed, of each case; without the large ones in Triton's interpreter."""
    interpreted = impl == "triton" and device.type == "cpu"
    found = _CPU_CASES if impl == "cpu" else _DECODE_CASES if impl == "cuda" else _CASES
    for lead, arguments in found:
        if interpreted and torch.Size(lead).numel() > _MOST_TOKENS_INTERPRETED:
            continue

        def make(
            seed: int, lead: tuple[int, ...] = lead, arguments: dict[str, Any] = arguments
        ) -> MixtureInputs:
            return make_inputs(*lead, dtype=dtype, device=device, seed=seed, **arguments)

        yield make


def examine(impl: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Run all cases with and without gradients; the first error ends it."""
    begin, worst, reason = time.perf_counter(), 0.0, ""
    try:
        for name, compared in _comparisons(impl, device, dtype):
            worst = max(worst, share_of_budget(*compared))
            assert_within_budget(name, *compared)
    except Exception as error:  # whatever a compiler or a driver raises is a finding
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds = time.perf_counter() - begin
    name = str(dtype).removeprefix("torch.")
    return Finding(str(device), impl, name, not reason, worst, seconds, reason)


def _comparisons(
    impl: str, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Name and result of `impl`, in float64, of the torch form in this dtype."""
    for make in cases(impl, device, dtype):
        if impl != "cuda":
            yield from compare_with_oracle(make, impl=impl).items()
        yield from _forward_only(make(0), impl)
    if impl != "cuda":
        yield from _losses(impl, device, dtype)


def _forward_only(
    inputs: MixtureInputs, impl: str
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Calls without gradients take another way, twice the same one: first and later calls."""

    def run(inputs: MixtureInputs, impl: str) -> Tensor:
        with torch.no_grad():
            return inputs.call(_decoded if impl == "cuda" else adapter_mixture, impl=impl)

    exact = run(inputs.to(torch.float64), "reference")
    for _ in range(2):
        yield "out", (run(inputs, impl), exact, run(inputs, "torch"))


def _decoded(*tensors: Any, activation: str, impl: str, **options: Any) -> Tensor:
    """A call of `adapter_mixture` that no other kernel may take."""
    behind = (options.get("base"), activation, impl, options.get("ranks"))
    arguments: tuple[Any, ...] = (*tensors, *behind)
    out = cuda_door.door(*arguments)
    if out is None:
        raise RuntimeError("the decode kernel does not take this call")
    return out


def _losses(
    impl: str, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """The loss and its gradients: of `impl`, in float64, of the torch form in this dtype."""
    interpreted = impl == "triton" and device.type == "cpu"
    found_cases = _CPU_LOSS_CASES if impl == "cpu" else _LOSS_CASES
    for lead, ranks, width, everything in found_cases:
        if interpreted and torch.Size(lead).numel() > _MOST_TOKENS_INTERPRETED:
            continue
        results: dict[str, list[tuple[Tensor, ...]]] = {}
        for seed in range(_LOSS_DRAWS):
            tensors = _loss_inputs(lead, ranks, width, everything, seed, device, dtype)
            exact = {
                name: t.double() if t.is_floating_point() else t for name, t in tensors.items()
            }
            found = (
                _loss_and_gradients(tensors, ranks, impl),
                _loss_and_gradients(exact, ranks, "torch"),
                _loss_and_gradients(tensors, ranks, "torch"),
            )
            for name in found[0]:
                results.setdefault(name, []).append(tuple(of[name] for of in found))
        for name, draws in results.items():
            actual, expected, eager = (torch.stack(of) for of in zip(*draws, strict=True))
            yield name, (actual, expected, eager)


def _loss_inputs(
    lead: tuple[int, int],
    ranks: tuple[int, ...],
    width: int,
    everything: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    units, adapters = sum(ranks), len(ranks)
    shapes = {
        "z": (*lead, width), "gate": (lead[0], adapters), "hidden": (*lead, units),
        "w_up": (units, width),
    }  # fmt: skip
    if everything:
        shapes |= {"b_up": (adapters, width), "residual": (*lead, width)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(*shape, generator=generator).to(device, dtype)
        for name, shape in shapes.items()
    }
    tensors["gate"] = tensors["gate"].softmax(-1)
    if everything:
        tensors["mask"] = (torch.arange(torch.Size(lead).numel()) % 3 > 0).view(lead).to(device)
    return tensors


def _loss_and_gradients(
    tensors: dict[str, Tensor], ranks: tuple[int, ...], impl: str
) -> dict[str, Tensor]:
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in tensors.items()
    }
    value = task_sparsity_loss(**leaves, ranks=ranks, impl=impl)  # type: ignore[arg-type]
    trained = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(value, [leaves[name] for name in trained])
    named = {f"d_{name}": grad for name, grad in zip(trained, grads, strict=True)}
    return {"loss": value.detach(), **named}


def default_devices() -> list[torch.device]:
    """The CPU and every GPU that torch sees."""
    return [torch.device("cpu")] + [
        torch.device("cuda", i) for i in range(torch.cuda.device_count())
    ]


def doctor(
    devices: list[torch.device] | None = None,
    report: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Examine every implementation that can run on the devices, and remember what passed on GPUs.

    Args:
        devices: None for `default_devices()`.
        report: Called with each finding as it is made.
    """
    findings = []
    for device in default_devices() if devices is None else devices:
        for impl in IMPLS:
            if unavailable_reasons(impl, device):
                continue
            found = []
            for dtype in DTYPES:
                found.append(examine(impl, device, dtype))
                report(found[-1])
            if impl in verified.VERIFIED and not (impl == "cuda" and cuda_library.is_emulated()):
                names = {f.dtype for f in found if f.passed}
                verified.remember(impl, device, [d for d in DTYPES if str(d)[6:] in names])
                triton_door.CALLS.clear()
            findings += found
    return findings
