# SPDX-License-Identifier: Apache-2.0
"""Time every choice of blocks of the Triton kernels on a GPU (`pemt-fast tune`).

For each number of hidden units and of tokens at which the shipped table may change its choice, all
choices that fit the GPU are timed against each other; the fastest ones become rows that
`kernels/configs.py` takes instead of the shipped ones on this GPU. Nothing is tuned during a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pemt_fast.ops import triton_door
from pemt_fast.ops.dispatch import unavailable_reasons

WIDTH, RANK = 768, 64
UNITS = (64, 128, 256, 384, 1024)
TOKENS = (64, 1024, 4096, 16383, 65536)
# A choice must be so much faster than the shipped one to replace it: times vary.
_GAIN = 1.03
_MOST_CHUNKS = 4  # of units in one fused program: more do not fit and take minutes to compile

Measure = Callable[[Callable[[], object]], float]  # of a function without arguments, in µs


@dataclasses.dataclass(frozen=True)
class Timing:
    """The fastest choice for one size; `way` is forward, backward or weights."""

    way: str
    dtype: str
    N: int
    T: int
    shipped_us: float
    best_us: float
    best: Any  # Fused, Pair, or for weights Tile or None (the library's matmul)
    tried: int
    failed: int


def measure_on_gpu(run: Callable[[], object]) -> float:
    """Median over about 30 ms of device time, with cold caches."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(run, warmup=10, rep=30, return_mode="median"))


def _inputs(N: int, T: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return {
        "x": normal(T, WIDTH), "gate": normal(T, N // RANK or 1, dtype=torch.float32),
        "first": normal(N, WIDTH) / WIDTH**0.5, "second": normal(N, WIDTH) / N**0.5,
        "base": normal(T, WIDTH), "units": normal(T, N),
    }  # fmt: skip


def _walk(tensors: dict[str, Tensor], *, backward: bool) -> Any:
    """PEMT's call: relu and a base forward, frozen adapters backward."""
    from pemt_fast.kernels.walk import Walk

    x, N = tensors["x"], tensors["first"].shape[0]
    E = tensors["gate"].shape[1]
    return Walk(
        x=x, gate=tensors["gate"], first=tensors["first"], second=tensors["second"],
        ranks=(N // E,) * E, activation="relu", backward=backward, out=torch.empty_like(x),
        base=None if backward else tensors["base"], saved=tensors["units"], needs_gate=backward,
    )  # fmt: skip


def _walk_choices(element: int, backward: bool, N: int) -> list[Any]:
    """Every choice that some GPU has for this direction, for N units."""
    from pemt_fast.kernels import configs

    shipped = [
        row.choice
        for (kind, size, way), rows in configs.TABLE.items()
        if size == element and way == backward and "tuned" not in kind
        for row in rows
    ]
    more = configs.MORE if element == 2 else ()
    found = dict.fromkeys(configs.narrowed(choice, N) for choice in (*shipped, *more))
    return [c for c in found if not isinstance(c, configs.Fused) or N <= _MOST_CHUNKS * c.BN]


def _sum_choices() -> list[Any]:
    from pemt_fast.kernels import configs

    return [None, *configs.MORE_SUMS]


def _fastest(
    choices: Iterable[Any], shipped: Any, make: Callable[[Any], Callable[[], object]],
    measure: Measure,
) -> tuple[Any, float, float, int, int]:  # fmt: skip
    """The best choice, its µs and the shipped one's, how many were tried and how many failed."""
    times: dict[Any, float] = {}
    failed = 0
    for choice in choices:
        try:
            times[choice] = measure(make(choice))
        except Exception:  # does not fit this GPU; whatever its compiler or driver raises
            failed += 1
    if shipped not in times:
        raise RuntimeError(f"the shipped choice {shipped} does not run on this GPU")
    best = min(times, key=times.__getitem__)
    if times[shipped] < _GAIN * times[best]:
        best = shipped
    return best, times[best], times[shipped], len(times) + failed, failed


def _tune_walk(
    backward: bool, dtype: torch.dtype, N: int, T: int, device: torch.device, measure: Measure
) -> Timing:
    from pemt_fast.kernels import configs
    from pemt_fast.kernels.plans import plan_with

    walk = _walk(_inputs(N, T, dtype, device), backward=backward)
    kind = configs.device_facts(device)[0].partition(",")[0]
    shipped = configs.choose(kind, dtype.itemsize, backward, N, T)

    def make(choice: Any) -> Callable[[], object]:
        plan = plan_with(walk, choice)
        return lambda: plan(walk)

    choices = _walk_choices(dtype.itemsize, backward, N)
    best, best_us, shipped_us, tried, failed = _fastest(choices, shipped, make, measure)
    return Timing(
        "backward" if backward else "forward", str(dtype)[6:], N, T, shipped_us, best_us, best,
        tried, failed,
    )  # fmt: skip


def _tune_sums(
    dtype: torch.dtype, N: int, T: int, device: torch.device, measure: Measure
) -> Timing:
    from pemt_fast.kernels import configs
    from pemt_fast.kernels.weight_gradients import split_weight_gradients

    t = _inputs(N, T, dtype, device)
    units, x, d_out = t["units"], t["x"], t["base"]
    kind = configs.device_facts(device)[0].partition(",")[0]
    shipped = configs.choose_weight_gradient(kind, dtype.itemsize, N, T)

    def make(tile: Any) -> Callable[[], object]:
        if tile is None:
            return lambda: (torch.mm(units.t(), x), torch.mm(units.t(), d_out))
        return lambda: split_weight_gradients(units, x, units, d_out, tile)

    best, best_us, shipped_us, tried, failed = _fastest(_sum_choices(), shipped, make, measure)
    return Timing("weights", str(dtype)[6:], N, T, shipped_us, best_us, best, tried, failed)


def _rows(timings: Sequence[Timing], units: Sequence[int], tokens: Sequence[int]) -> tuple:
    """Rows of the table, from the smallest size on; what is larger than all takes the largest."""
    from pemt_fast.kernels.configs import ANY, Row

    best = {(t.N, t.T): t.best for t in timings}
    return tuple(
        Row(ANY if N == units[-1] else N, ANY if T == tokens[-1] else T, best[N, T])
        for N in units
        for T in tokens
    )


def tune(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    *,
    units: Sequence[int] = UNITS,
    tokens: Sequence[int] = TOKENS,
    measure: Measure = measure_on_gpu,
    report: Callable[[Timing], None] = lambda timing: None,
) -> Path:
    """Time all choices and write the fastest ones to the cache; returns its file.

    Args:
        device: The GPU; its model is what the rows are kept for.
        dtypes: One for each width of an element; the rows hold for every dtype of that width.
        units: Hidden units to time at, ascending; rows are for at most so many.
        tokens: The same for tokens.
        measure: µs of a function without arguments.
        report: Called with each size as it is done.

    Raises:
        RuntimeError: the Triton kernels cannot run on the device; the message says why.
    """
    if reasons := unavailable_reasons("triton", device):
        raise RuntimeError(f"impl='triton' cannot be tuned: {'; '.join(reasons)}")
    from pemt_fast.kernels import adapter_mixture, cache, configs

    tables: dict[tuple[int, bool | None], tuple] = {}
    for dtype in dtypes:
        for way in (False, True, None):
            found = []
            for N in units:
                for T in tokens:
                    if way is None:
                        found.append(_tune_sums(dtype, N, T, device, measure))
                    else:
                        found.append(_tune_walk(way, dtype, N, T, device, measure))
                    report(found[-1])
            tables[dtype.itemsize, way] = _rows(found, units, tokens)
    path = cache.save(configs.TUNED, device, configs.encode(tables))
    configs.device_facts.cache_clear()
    adapter_mixture.PLANS.clear()
    triton_door.CALLS.clear()
    return path
