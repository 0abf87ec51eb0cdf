# SPDX-License-Identifier: Apache-2.0
"""The floor: the time below which no implementation gets on a GPU whose rates are known.

`max(operations / rate of bf16 matmuls, bytes / rate of memory)`. The rates are what a matmul of
8192³ and a large copy reach, not the data sheet's; each run measures them again (`gpu_measure.py`)
and writes them beside its results.
"""

from __future__ import annotations

import dataclasses

from cases import DTYPES, Case


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations per second of 16-bit matmuls, bytes per second read and written."""

    flop_s: float
    byte_s: float


# Part of the device's name -> its rates.
RATES = {"H200": Rates(790e12, 4.3e12)}


def floor_us(case: Case, dtype: str, mode: str, gpu: str | None) -> float | None:
    """Microseconds; None for GPUs whose rates are not known, and for float32."""
    rates = next((rates for name, rates in RATES.items() if name in (gpu or "")), None)
    if rates is None or DTYPES[dtype].itemsize != 2:
        return None
    compute_s = case.flop(mode) / rates.flop_s
    return 1e6 * max(compute_s, case.traffic_bytes(mode, DTYPES[dtype]) / rates.byte_s)
