"""What the GPU tests share: the device, sizes for both kinds of kernels, graphs, random calls."""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pemt_fast import adapter_mixture
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.testing import GATE_FORMS, MixtureInputs, make_inputs

DEVICE = "cuda"
IMPLS = ["torch", "triton", "cuda"]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FORM_IDS = ["percall", "persequence", "pertoken"]
BITWISE = {"rtol": 0, "atol": 0}

# D is a multiple of every block and H of none. With few units a program keeps them to itself, many
# go through memory. Tests that need no other sizes take these: each new one is compiled anew.
WIDTHS = {"D": 192, "H": 200}
SIZES: dict[str, dict[str, Any]] = {
    "few-units": {"E": 4, "R": 16, **WIDTHS},
    "many-units": {"E": 16, "R": 16, **WIDTHS},
}
# The same for tests of more than one dtype.
ODD_SIZES: dict[str, Any] = {"E": 6, "D": 96, "R": 24, "H": 60}
UNEQUAL_RANKS = (24, 8, 32)


def gpu_inputs(size: str, *lead: int, **changes: Any) -> MixtureInputs:
    """Inputs of one of `SIZES` on the device, bfloat16 unless told otherwise."""
    options = {"dtype": torch.bfloat16, "device": DEVICE, **SIZES[size], **changes}
    return make_inputs(*lead, **options)


def everything(inputs: MixtureInputs, impl: str) -> dict[str, Tensor]:
    """The output without gradients, the output with them, and all gradients."""
    with torch.no_grad():
        inference = inputs.call(adapter_mixture, impl=impl)
    return {"inference": inference, **inputs.gradients(impl=impl)}


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `function` after three calls on another stream, and the results it rewrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


class Layer(nn.Module):
    """A projection with a mixture of `ODD_SIZES` beside it, gated per sequence."""

    def __init__(self, impl: str):
        super().__init__()
        self.impl = impl
        inputs = make_inputs(1, **ODD_SIZES)
        self.projection = nn.Linear(ODD_SIZES["D"], ODD_SIZES["H"])
        self.router = nn.Linear(ODD_SIZES["D"], ODD_SIZES["E"])
        for name in ("w_down", "w_up", "b_down", "b_up"):
            self.register_parameter(name, nn.Parameter(getattr(inputs, name).detach()))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.router(x.mean(1)).softmax(-1)
        return adapter_mixture(
            x, gate, self.w_down, self.w_up, self.b_down, self.b_up,
            activation="gelu", base=self.projection(x), impl=self.impl,
        )  # fmt: skip


# --- random calls --------------------------------------------------------------------------------

# E and R, or unequal ranks: N from 16 to 1024, blocks of units exactly full and with a tail.
ADAPTERS: list[dict[str, Any]] = [
    {"E": 1, "R": 16}, {"E": 1, "R": 300}, {"E": 2, "R": 8}, {"E": 3, "R": 40}, {"E": 5, "R": 13},
    {"E": 6, "R": 64}, {"E": 8, "R": 8}, {"E": 8, "R": 64}, {"E": 12, "R": 5}, {"E": 16, "R": 64},
    {"R": (64, 32, 32)}, {"R": (1, 24, 64)}, {"R": (7, 7, 7, 11)}, {"R": (5, 300)},
    {"R": (3,) * 15 + (40,)},
]  # fmt: skip
# Both the published widths and those that no block divides.
D_AND_H = [(768, 768), (3072, 768), (33, 60), (255, 96), (96, 130)]
# Below, at and above the numbers of tokens where the table changes, so that two of one line take
# the same kernels.
TOKENS = [
    (1, 15, 16, 17, 31, 63, 64),
    (65, 127, 129, 257, 1000, 2049, 4095),
    (4097, 5001, 6007),
]


@dataclasses.dataclass(frozen=True)
class RandomCall:
    """Arguments of `make_inputs`, and whether backward computes the hidden units again."""

    lead: tuple[int, ...]
    options: dict[str, Any]
    recompute: bool

    def __str__(self) -> str:
        o = self.options
        dtype = next(name for name, dtype in DTYPES.items() if dtype == o["dtype"])
        rank = "-".join(map(str, sorted(set(o["R"])))) if isinstance(o["R"], tuple) else o["R"]
        form = FORM_IDS[GATE_FORMS.index(o["gate"])]
        extras = "-bias" * o["bias"] + "-base" * o["base"] + "-recompute" * self.recompute
        experts = o.get("E", len(o["R"]) if isinstance(o["R"], tuple) else 0)
        tokens = "x".join(map(str, self.lead))
        return (f"{dtype}-T{tokens}-E{experts}-D{o['D']}-R{rank}-H{o['H']}-{form}"
                f"-{o['activation']}{extras}")  # fmt: skip


def _dealt(deck: list[Any], rng: random.Random) -> Iterator[Any]:
    """The deck in random order, again and again: every card comes before one comes twice."""
    while True:
        yield from rng.sample(deck, len(deck))


def _lead(tokens: int, gate: str, rng: random.Random) -> tuple[int, ...]:
    """So many tokens as `[T]`, or as sequences of equal length."""
    divisors = [b for b in range(1, 65) if tokens % b == 0]
    sequences = (b := rng.choice(divisors), tokens // b)
    return sequences if gate == "[B, S, E]" or rng.random() < 0.7 else (tokens,)


def random_calls(seed: int = 0) -> list[RandomCall]:
    """Two calls for each dtype and activation; everything else dealt at random."""
    rng = random.Random(seed)
    adapters, widths = _dealt(ADAPTERS, rng), _dealt(D_AND_H, rng)
    extras = _dealt([(True, True), (True, False), (False, True), (False, False)], rng)
    forms, tokens = _dealt(list(GATE_FORMS), rng), _dealt(TOKENS, rng)
    calls = []
    for dtype in DTYPES.values():
        for activation in ACTIVATIONS:
            (D, H), (bias, base) = next(widths), next(extras)
            shared = {**next(adapters), "D": D, "H": H, "bias": bias, "base": base,
                      "dtype": dtype, "activation": activation}  # fmt: skip
            recompute = rng.random() < 0.25
            for T in rng.sample(next(tokens), 2):
                gate = next(forms)
                lead = _lead(T, gate, rng)
                assert math.prod(lead) == T
                calls.append(RandomCall(lead, {**shared, "gate": gate}, recompute))
    return calls
