# SPDX-License-Identifier: Apache-2.0
"""Every block size, warp and stage count of the Triton kernels, and the rule that chooses them.

A choice is a row of a table by kind of GPU, width of the dtype, direction, N and a bucket of T, so
that a call never tunes anything and other numbers of tokens compile nothing new. No row has been
timed yet: they are what compiles without spills (`docs/triton_resources.md`), the ones that read
least memory first. `pemt-fast tune` times the choices on a GPU; its rows (`tuned.py`) come first.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from pemt_fast.kernels import cache

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
    """`choice` for at most `units` hidden units and `tokens` tokens.

    A `Tile` is for `weight_gradient_kernel`, None for the library's matmul instead of it.
    """

    units: int
    tokens: int
    choice: Fused | Pair | Tile | None


@dataclasses.dataclass(frozen=True)
class LossRows:
    """`sparsity_loss_kernel`: tokens of a program, units and columns of z it takes at a time.

    Few neighbouring sizes compile without spills for every GPU, though none lacks registers.
    """

    tokens: int = 8
    units: int = 64
    columns: int = 128
    warps: int = 4


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

# What else `pemt-fast tune` tries.
MORE = (
    Fused(32, 64), Fused(32, 128), Fused(64, 64), Fused(64, 64, warps=8), Fused(64, 128, warps=8),
    Fused(128, 64, warps=8), Fused(128, 128, warps=8), Pair(_FLAT, _FLAT), Pair(_NARROW, _NARROW),
    Pair(_NARROW, _SQUARE), Pair(_SQUARE, _SQUARE), Pair(Tile(64, 64), Tile(64, 64)),
    Pair(_SQUARE, Tile(128, 256, warps=8)),
)  # fmt: skip
MORE_SUMS = (Tile(64, 64), Tile(64, 128), Tile(64, 256, warps=8), Tile(128, 128, warps=8))

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

# Kind of GPU, bytes of an element -> rows of the gradients of the weights. Our kernel where tokens
# are many and the result small; the library has more to choose from.
_LIBRARY = (Row(ANY, ANY, None),)
_SPLIT = (Row(128, 4095, None), Row(128, ANY, Tile(64, 128)), *_LIBRARY)
SUMS: dict[tuple[str, int], tuple[Row, ...]] = {
    ("hopper", 2): _SPLIT,
    ("ampere", 2): _SPLIT,
    ("other", 2): _LIBRARY,
    **{(kind, 4): _LIBRARY for kind in ("hopper", "ampere", "other")},
}
REDUCE_COLUMNS = 512

GATE_ROWS = 64  # rows of the gate that one program of `gate_gradient_kernel` finishes
MOST_SPANS = 8


def kind_of_gpu(shared_memory: int) -> str:
    """The kind of a GPU that grants one program so many bytes of shared memory."""
    return next(kind for kind, least in _SHARED.items() if shared_memory >= least)


@functools.cache
def device_facts(device: torch.device) -> tuple[str, int]:
    """Kind of GPU and number of multiprocessors; on a CPU, interpreted, those of an H200."""
    kind, processors = "hopper", 132
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind = kind_of_gpu(getattr(properties, "shared_memory_per_block_optin", 0))
        processors = properties.multi_processor_count
    tuned = cache.load(TUNED, device)
    if tuned is None:
        return kind, processors
    own = f"{kind}, tuned on {device}"
    for element in (2, 4):
        # Shipped rows behind: for those that only a pair of kernels can do.
        SUMS[own, element] = _decode(tuned, _key(element, None)) + SUMS[kind, element]
        for backward in (False, True):
            rows = _decode(tuned, _key(element, backward))
            TABLE[own, element, backward] = rows + TABLE[kind, element, backward]
    return own, processors


TUNED = "tuned"  # name of the file
_CHOICES = {choice.__name__: choice for choice in (Fused, Pair, Tile)}


def _key(element: int, backward: bool | None) -> str:
    way = {False: "forward", True: "backward", None: "weights"}[backward]
    return f"{8 * element} bits, {way}"


def encode(tables: dict[tuple[int, bool | None], tuple[Row, ...]]) -> dict[str, Any]:
    """Rows by bytes of an element and direction (None: weights), as JSON can hold them."""
    return {
        _key(*key): [
            {"units": row.units, "tokens": row.tokens, "choice": type(row.choice).__name__}
            | (dataclasses.asdict(row.choice) if row.choice else {})
            for row in rows
        ]
        for key, rows in tables.items()
    }


def _decode(tuned: dict[str, Any], key: str) -> tuple[Row, ...]:
    rows = []
    for entry in tuned.get(key, ()):
        fields = {k: Tile(**v) if isinstance(v, dict) else v for k, v in entry.items()}
        units, tokens, kind = (fields.pop(name) for name in ("units", "tokens", "choice"))
        rows.append(Row(units, tokens, _CHOICES[kind](**fields) if kind in _CHOICES else None))
    return tuple(rows)


def choose(kind: str, element: int, backward: bool, N: int, T: int) -> Fused | Pair:
    """The row of the table; blocks of units no wider than the units are many."""
    choice = _first(TABLE[kind, element, backward], N, T)
    assert isinstance(choice, Fused | Pair)
    return narrowed(choice, N)


def _first(rows: tuple[Row, ...], N: int, T: int) -> Fused | Pair | Tile | None:
    return next(row.choice for row in rows if row.units >= N and row.tokens >= T)


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
    tile = _first(SUMS[kind, element], N, T)
    assert tile is None or isinstance(tile, Tile)
    return tile


def choose_loss_rows(rank: int) -> LossRows:
    """Blocks of units no wider than the largest adapter."""
    return LossRows(units=min(LossRows.units, 1 << max(rank - 1, 0).bit_length()))


def splits_of(tile: Tile, tiles: int, T: int, processors: int) -> tuple[int, int]:
    """Into how many parts the tokens are split, and how many each has: two programs per processor.

    Depends on the GPU, so results may differ between GPUs in the last bits.
    """
    wanted = max(2 * processors // tiles, 1)
    span = -(-T // wanted)
    span = -(-span // tile.terms) * tile.terms
    return -(-T // span), span
