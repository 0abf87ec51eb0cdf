# SPDX-License-Identifier: Apache-2.0
"""What Poly and MHR are measured on: single layers with T5-base's widths, and T5-base itself.

Letters: B sequences of S tokens, D → H the layer, K skills of rank R, P splits, M tasks.
"""

from __future__ import annotations

import dataclasses

FORWARD, STEP, GENERATE = "forward", "step", "generate"
LAYER_MODES = (FORWARD, STEP)
MODEL_MODES = (FORWARD, STEP, GENERATE)
# Contenders: the layer without skills, peft's, peft's arithmetic compiled, this library's.
PLAIN, PEFT, COMPILED, OURS = "plain", "peft", "compiled", "ours"
GENERATED = 32  # tokens
CPU_LAYERS = 3  # of encoder and decoder each
MANY = 32  # skills: from here on E is large


@dataclasses.dataclass(frozen=True)
class PolyCase:
    """One layer, or, with `target` tokens, a T5-base with adapters at q and v."""

    name: str
    B: int
    S: int
    K: int
    P: int = 1
    R: int = 8
    M: int = 8
    D: int = 768
    H: int = 768
    compiles: bool = False
    target: int = 0
    layers: int = 0


LAYERS = (
    PolyCase("one token", 8, 1, 4),
    PolyCase("one token, MHR, beams", 32, 1, 8, P=4, R=16),
    PolyCase("one token, 64 skills", 8, 1, 64, M=100),
    PolyCase("one token, 103 skills, rank 2", 8, 1, 103, R=2, M=100),
    PolyCase("16 tokens", 32, 16, 8, R=16),
    PolyCase("128 tokens", 8, 128, 4, compiles=True),
    PolyCase("128 tokens, MHR", 8, 128, 8, P=4, R=16),
    PolyCase("128 tokens, 64 skills", 8, 128, 64, M=100),
    PolyCase("128 tokens, 103 skills, rank 2", 8, 128, 103, R=2, M=100),
    PolyCase("128 tokens, d_model → d_ff", 8, 128, 8, R=16, H=3072),
    PolyCase("128 tokens, d_ff → d_model", 8, 128, 8, R=16, D=3072),
    PolyCase("512 tokens", 8, 512, 8, R=16),
)


def models(layers: int) -> tuple[PolyCase, ...]:
    """T5-base cut to so many layers of encoder and decoder each."""
    sizes = {"target": 16, "layers": layers}
    return (
        PolyCase("T5-base, Poly", 8, 128, 4, **sizes),
        PolyCase("T5-base, 64 skills", 8, 128, 64, M=100, **sizes),
    )
