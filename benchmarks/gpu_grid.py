# SPDX-License-Identifier: Apache-2.0
"""The grid that decides whether the GPU kernels reach their targets, as data, in order of priority.

All cells have what makes the operator most expensive: relu, biases, a gate per token, a base. Few
cells give a token only its best `top_k` adapters. Measured by `gpu_run.py` (`--suite grid --device
cuda`), judged by `gpu_targets.py`; the letters are those of `cases.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from cases import FORWARD, FROZEN, MODES, Case
from grid import GROUP, Cell, LeftOut

from pemt_fast.testing import MixtureInputs

OURS = "ours-triton"
# Who is measured, in this order, beside the bare matmuls.
CONTENDERS = ("loop", "stacked", "compiled", "grouped", "ours-torch", OURS)
DTYPE = "bf16"
SPARSE = "top "  # begins the group of the cases with few adapters per token

GRAPH_TOKENS = 64  # up to so many the host is slower than the device: timed in CUDA graphs too
HOST_TOKENS = 16  # where the time of the host is measured, which does not depend on the tokens
MEMORY_TOKENS = 16384
LOOP_TOKENS = 16384
COMPARED_TOKENS = 512  # with the oracle, of cells that have more


@dataclasses.dataclass(frozen=True)
class DeviceCase(Case):
    """A case whose inputs are drawn on the device: the largest have 2²⁸ elements a tensor.

    `top_k` adapters per token have a gate that is not 0, all if it is 0. `compiled` is measured
    where `compiles`.
    """

    top_k: int = 0
    compiles: bool = False

    def inputs(self, dtype: torch.dtype, device: str, *, seed: int = 0) -> MixtureInputs:
        """Random, of unit scale as in `make_inputs`; nothing requires grad yet."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=device)
            return values.mul_(scale).to(dtype)

        gate = draw(1, self.T, self.E, scale=(self.top_k or self.E) ** -0.5)
        if self.top_k:
            scores = torch.rand(gate.shape, generator=generator, device=device)
            kept = scores.topk(self.top_k, dim=-1).indices
            gate = torch.zeros_like(gate).scatter_(-1, kept, gate.gather(-1, kept))
        return MixtureInputs(
            x=draw(1, self.T, self.D),
            gate=gate,
            w_down=draw(self.E, self.R, self.D, scale=self.D**-0.5),
            w_up=draw(self.E, self.R, self.H, scale=self.R**-0.5),
            b_down=draw(self.E, self.R, scale=0.5),
            b_up=draw(self.E, self.H, scale=0.5),
            base=draw(1, self.T, self.H),
            grad_out=draw(1, self.T, self.H),
            activation=self.activation,
            ranks=None,
        )

    def flop(self, mode: str) -> int:
        """Of the adapters that a token uses."""
        used = super().flop(mode)
        return used * self.top_k // self.E if self.top_k else used


def modes_of(T: int) -> tuple[str, ...]:
    """One token is decoding, a few dozen the decoder beside frozen adapters, more is training."""
    return (FORWARD,) if T == 1 else (FORWARD, FROZEN) if T <= GRAPH_TOKENS else tuple(MODES)


def device_case(
    T: int, D: int, H: int, E: int, R: int, group: str = GROUP, *, compiles: bool = False
) -> DeviceCase:
    """The case of a shape; `group` is that of the grid, or `top k`."""
    top_k = int(group.removeprefix(SPARSE)) if group.startswith(SPARSE) else 0
    name = f"T{T} D{D} H{H} E{E} R{R}" + (f" top{top_k}" if top_k else "")
    # The other gradients of a sparse gate, of adapters without a part in the output, differ by
    # definition: a grouped form never computes them.
    modes = (FORWARD,) if top_k else modes_of(T)
    return DeviceCase(
        name, group, 1, T, E, R, D, H, "[B, S, E]", "relu", True, modes, devices=("cuda",),
        top_k=top_k, compiles=compiles,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a run: every combination of the first three, R units per adapter.

    `compiled` is measured for the combinations of `compiled_…` alone, the most interesting first,
    and `grouped` for the `sparse` (T, D, H, E, adapters per token).
    """

    tokens: tuple[int, ...]
    widths: tuple[tuple[int, int], ...]  # (D, H)
    adapters: tuple[int, ...]
    R: int
    compiled_tokens: tuple[int, ...] = ()
    compiled_widths: tuple[tuple[int, int], ...] = ()
    compiled_adapters: tuple[int, ...] = ()
    sparse: tuple[tuple[int, int, int, int, int], ...] = ()

    def _case(self, T: int, width: tuple[int, int], E: int) -> DeviceCase:
        chosen = T in self.compiled_tokens and width in self.compiled_widths
        compiles = chosen and E in self.compiled_adapters
        return device_case(T, *width, E, self.R, compiles=compiles)

    def rounds(self) -> Iterator[list[DeviceCase]]:
        """All combinations, in rounds that contain every pair of two sizes once at least."""
        for shift in range(len(self.adapters)):
            found = []
            for d in range(len(self.widths)):
                E = self.adapters[(shift + d) % len(self.adapters)]
                for t, T in enumerate(self.tokens):
                    found.append(self._case(T, self.widths[(t + d) % len(self.widths)], E))
            yield found

    def cells(self) -> list[Cell]:
        """What is measured first comes first, so that a run that ends early shows all regimes.

        A thin round over the whole grid, the cells with a compilation (all shapes in one mode
        before the next mode), the sparse ones, the rest.
        """
        first, *rest = (
            [(case, DTYPE, mode) for case in cases if not case.compiles for mode in case.modes]
            for cases in self.rounds()
        )
        compiled = [
            (self._case(T, width, E), DTYPE, mode)
            for mode in MODES
            for E in self.compiled_adapters
            for T in self.compiled_tokens
            for width in self.compiled_widths
        ]
        sparse = [
            (device_case(T, D, H, E, self.R, f"{SPARSE}{k}"), DTYPE, FORWARD)
            for T, D, H, E, k in self.sparse
        ]
        return [*first, *compiled, *sparse, *(cell for cells in rest for cell in cells)]


FULL = Plan(
    tokens=(1, 16, 64, 1024, 4096, 16384, 65536),
    widths=((512, 512), (768, 768), (1024, 1024), (2048, 2048), (4096, 4096), (3072, 768)),
    adapters=(1, 2, 3, 6, 8, 16),
    R=64,
    compiled_tokens=(16384, 1024),
    compiled_widths=((768, 768), (3072, 768)),
    compiled_adapters=(1, 6, 2, 16),
    sparse=tuple((T, 768, 768, E, k) for E in (16, 32) for k in (1, 2) for T in (16384, 1024)),
)
QUICK = Plan(
    tokens=(1, 16, 1024, 16384),
    widths=((768, 768), (3072, 768)),
    adapters=(1, 6),
    R=64,
    compiled_tokens=(16384,),
    compiled_widths=((768, 768),),
    compiled_adapters=(1,),
    sparse=((16384, 768, 768, 16, 1),),
)
# On the CPU, to try the suite where there is no GPU: all of its paths, next to no arithmetic.
DRY = Plan(
    tokens=(1, 16, 1024, 16384),
    widths=((32, 32), (48, 32)),
    adapters=(1, 2),
    R=16,
    compiled_tokens=(1024,),
    compiled_widths=((32, 32),),
    compiled_adapters=(1,),
    sparse=((1024, 32, 32, 4, 2),),
)


def select(*, dry_run: bool = False, quick: bool = False, only: str = "") -> list[Cell]:
    """The cells to measure, in their order; `only` is part of a case's name."""
    plan = DRY if dry_run else QUICK if quick else FULL
    return [cell for cell in plan.cells() if only in cell[0].name]


def _names(values: tuple[int, ...]) -> str:
    *most, last = map(str, sorted(values))
    return f"{', '.join(most)} and {last}"


LEFT_OUT = (
    LeftOut(
        "loop",
        lambda case: case.T > LOOP_TOKENS,
        f"not above {LOOP_TOKENS} tokens, a known loser",
    ),
    LeftOut(
        "compiled",
        lambda case: not case.compiles,
        "a compilation with max-autotune takes many seconds: only for T "
        f"{_names(FULL.compiled_tokens)}, "
        f"{' and '.join(f'D{D} H{H}' for D, H in FULL.compiled_widths)}, "
        f"N {_names(tuple(E * FULL.R for E in FULL.compiled_adapters))}",
    ),
    LeftOut(
        "grouped",
        lambda case: not case.top_k,
        "only where a token uses one or two adapters of many, without gradients",
    ),
    LeftOut("published", lambda case: True, "only in the operator's suite"),
)


def left_out(provider: str, case: Case) -> bool:
    """Whether this contender is not measured for this case."""
    return any(rule.provider == provider and rule.where(case) for rule in LEFT_OUT)
