# SPDX-License-Identifier: Apache-2.0
"""Every block size, warp and stage count of the Triton kernels, and the rule that chooses them.

A choice is a row of a table by kind of GPU, width of the dtype, direction, N and a bucket of T, so
that a call never tunes anything and other numbers of tokens compile nothing new. No row has been
timed yet: they are what compiles without spills (`docs/triton_resources.md`), the ones that read
least memory first.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

ANY = 1 << 62


@dataclasses.dataclass(frozen=True)
class Fused:
    """`fused_kernel`: BM tokens, BN units at a time, BK terms of a sum, BH columns of out."""

    BM: int
    BN: int
    BK: int = 64
    BH: int = 64
    warps: int = 4
    stages: int = 3
    stages_out: int = 2


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile `rows × columns` of one product, `terms` of the sum at a time."""

    rows: int
    columns: int
    terms: int = 64
    warps: int = 4
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class Pair:
    """`first_kernel` and `second_kernel`, with the units in memory between them."""

    first: Tile
    second: Tile


@dataclasses.dataclass(frozen=True)
class Row:
    """`choice` for at most `units` hidden units and `tokens` tokens."""

    units: int
    tokens: int
    choice: Fused | Pair


_SQUARE = Tile(128, 128, warps=8)
_NARROW = Tile(64, 128)
_FLAT = Tile(16, 64)

# Forward with 16-bit inputs on GPUs with 227 KB of shared memory: Hopper, data centre Blackwell.
_HOPPER_FORWARD = (
    Row(64, 64, Fused(16, 64)),
    Row(64, 4096, Fused(32, 64)),
    Row(64, 16383, Fused(64, 64)),
    Row(64, ANY, Fused(128, 64, warps=8)),
    Row(128, 64, Fused(16, 128)),
    Row(128, 4096, Fused(32, 128)),
    Row(128, 16383, Fused(64, 128)),
    Row(128, ANY, Fused(128, 128, warps=8)),
    Row(256, 64, Fused(16, 128)),
    Row(256, 4096, Pair(_NARROW, _NARROW)),
    Row(256, ANY, Fused(64, 128, warps=8)),
    Row(384, 64, Fused(16, 128)),
    Row(ANY, 64, Pair(_FLAT, _FLAT)),
    Row(ANY, 4096, Pair(_NARROW, _NARROW)),
    Row(ANY, ANY, Pair(_SQUARE, _SQUARE)),
)
_HOPPER_BACKWARD = (
    Row(64, 64, Fused(16, 64)),
    Row(64, 4096, Fused(32, 64)),
    Row(64, ANY, Fused(64, 64)),
    Row(128, 64, Fused(16, 128)),
    Row(128, 4096, Fused(32, 128, warps=8)),
    Row(128, ANY, Fused(64, 128, warps=8)),
    Row(ANY, 64, Pair(_FLAT, _FLAT)),
    Row(ANY, 4096, Pair(Tile(64, 64), _NARROW)),
    Row(ANY, ANY, Pair(Tile(64, 128, warps=8), _SQUARE)),
)


# As above in float32: without tensor cores for "ieee", the sums would not fit larger tiles.
_FLOAT_FORWARD = (
    Row(ANY, 64, Pair(Tile(16, 64, 32), Tile(16, 64, 32))),
    Row(ANY, ANY, Pair(Tile(64, 64, 32), Tile(64, 64, 32, warps=8))),
)
_FLOAT_BACKWARD = (
    Row(ANY, 64, Pair(Tile(16, 64, 32), Tile(16, 64, 32))),
    Row(ANY, ANY, Pair(Tile(64, 64, 32), Tile(64, 64, 32))),
)
# Ampere's data centre GPUs (163 KB): the first operand of a product comes from registers.
_AMPERE_FORWARD = (
    Row(64, 64, Fused(16, 64)),
    Row(64, 4096, Fused(32, 64)),
    Row(64, ANY, Fused(64, 64)),
    Row(128, 64, Fused(16, 128)),
    Row(128, 4096, Fused(32, 128)),
    Row(128, ANY, Fused(64, 128)),
    Row(ANY, 64, Pair(_FLAT, _FLAT)),
    Row(ANY, ANY, Pair(_NARROW, _NARROW)),
)
_AMPERE_BACKWARD = (
    Row(64, 64, Fused(16, 64)),
    Row(64, ANY, Fused(32, 64)),
    Row(ANY, 64, Pair(_FLAT, _FLAT)),
    Row(ANY, ANY, Pair(Tile(64, 64), _NARROW)),
)
# 64 KB of shared memory, which every GPU has that Triton compiles for.
_OTHER = (
    Row(64, ANY, Fused(32, 64, stages=2)),
    Row(ANY, 64, Pair(_FLAT, _FLAT)),
    Row(ANY, ANY, Pair(Tile(64, 64, stages=2), Tile(64, 64, stages=2))),
)

# Kind of GPU, bytes of an element, backward -> rows; the first one that fits is taken.
TABLE: dict[tuple[str, int, bool], tuple[Row, ...]] = {
    ("hopper", 2, False): _HOPPER_FORWARD,
    ("hopper", 2, True): _HOPPER_BACKWARD,
    ("ampere", 2, False): _AMPERE_FORWARD,
    ("ampere", 2, True): _AMPERE_BACKWARD,
    ("other", 2, False): _OTHER,
    ("other", 2, True): _OTHER,
    **{(kind, 4, False): _FLOAT_FORWARD for kind in ("hopper", "ampere", "other")},
    **{(kind, 4, True): _FLOAT_BACKWARD for kind in ("hopper", "ampere", "other")},
}

# Shared memory that one program may use, in bytes, from which on a GPU is of this kind.
_SHARED = {"hopper": 227 << 10, "ampere": 163 << 10, "other": 0}

# Gradients of the weights: from so many tokens on and up to so many units our kernel, else the
# library's matmul, which has more to choose from where the result is large.
_SUM = Tile(64, 128)
_SUM_TOKENS, _SUM_UNITS = 4096, 128
REDUCE_COLUMNS = 512

GATE_ROWS = 64  # rows of the gate that one program of `gate_gradient_kernel` finishes
MOST_SPANS = 8


def kind_of_gpu(shared_memory: int) -> str:
    """The kind of a GPU that grants one program so many bytes of shared memory."""
    return next(kind for kind, least in _SHARED.items() if shared_memory >= least)


@functools.cache
def device_facts(device: torch.device) -> tuple[str, int]:
    """Kind of GPU and number of multiprocessors; on a CPU, interpreted, those of an H200."""
    if device.type != "cuda":
        return "hopper", 132
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return kind_of_gpu(shared), properties.multi_processor_count


def choose(kind: str, element: int, backward: bool, N: int, T: int) -> Fused | Pair:
    """The row of the table; blocks of units no wider than the units are many."""
    rows = TABLE[kind, element, backward]
    choice = next(row.choice for row in rows if row.units >= N and row.tokens >= T)
    return narrowed(choice, N)


def narrowed(choice: Fused | Pair, N: int) -> Fused | Pair:
    """The choice with blocks of at most so many units, 16 at least: a product takes no fewer."""
    most = max(16, 1 << (N - 1).bit_length())
    if isinstance(choice, Fused):
        return dataclasses.replace(choice, BN=min(choice.BN, most))
    first, second = choice.first, choice.second
    return Pair(
        dataclasses.replace(first, columns=min(first.columns, most)),
        dataclasses.replace(second, terms=min(second.terms, most)),
    )


def choose_pair(kind: str, element: int, backward: bool, N: int, T: int) -> Pair:
    """The choice among pairs: for calls that need only the first product."""
    rows = TABLE[kind, element, backward]
    fitting = (row.choice for row in rows if row.tokens >= T and isinstance(row.choice, Pair))
    choice = narrowed(next(fitting), N)
    assert isinstance(choice, Pair)
    return choice


def columns_of_span(choice: Fused, T: int, width: int, processors: int) -> int:
    """Columns of the output that one program of `fused_kernel` computes.

    All of them, unless there are fewer tiles of tokens than multiprocessors.
    """
    tiles, blocks = -(-T // choice.BM), -(-width // choice.BH)
    spans = min(max(processors // tiles, 1), MOST_SPANS, blocks)
    return -(-blocks // spans) * choice.BH


def choose_weight_gradient(kind: str, element: int, N: int, T: int) -> Tile | None:
    """The tile of `weight_gradient_kernel`, None for the library's matmul."""
    if kind == "other" or element != 2 or T < _SUM_TOKENS or N > _SUM_UNITS:
        return None
    return _SUM


def splits_of(tile: Tile, tiles: int, T: int, processors: int) -> tuple[int, int]:
    """Into how many parts the tokens are split, and how many each has: two programs per processor.

    Depends on the GPU, so results may differ between GPUs in the last bits.
    """
    wanted = max(2 * processors // tiles, 1)
    span = -(-T // wanted)
    span = -(-span // tile.terms) * tile.terms
    return -(-T // span), span
