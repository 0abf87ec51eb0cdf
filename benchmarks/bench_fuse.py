# SPDX-License-Identifier: Apache-2.0
"""Measure what `fuse` makes of peft's adapters on T5-base: the same model, before and after.

    python benchmarks/bench_fuse.py [--device cuda] [--quick] [--only "LoRA"]

Run it as a path, not with `-m`. Outputs and gradients are compared before anything is timed, the
two forms take turns. Writes JSON and a page of tables, see `fuse_measure.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import fuse_measure
import peft
import torch
from cases import DTYPES
from fuse_measure import FORWARD, STEP, Subject, plain_t5, run_command, token_inputs
from t5_cases import SHAPES

PEFT = "peft"


@dataclasses.dataclass(frozen=True)
class FuseCase:
    """Adapters of rank 8 at q and v; `mixed` gives each sequence one of them, without gradients."""

    name: str
    adapters: int = 1
    mixed: bool = False
    poly: bool = False
    B: int = 8
    source: int = 128
    target: int = 16

    @property
    def modes(self) -> tuple[str, ...]:
        """peft refuses to train a mixed batch."""
        return (FORWARD,) if self.mixed else (FORWARD, STEP)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(DTYPES)


CASES = (
    FuseCase("LoRA, 1 adapter"),
    FuseCase("LoRA, 3 adapters", adapters=3),
    FuseCase("LoRA, 6 adapters", adapters=6),
    FuseCase("LoRA, 6 adapters, mixed batch", adapters=6, mixed=True),
    FuseCase("Poly, 8 skills", poly=True),
)


def subject_of(case: FuseCase, dtype: torch.dtype, device: str, layers: int) -> Subject:
    """The model of a case, in training mode."""
    torch.manual_seed(0)
    shape = SHAPES[1]
    model = _with_adapters(case, plain_t5(shape, layers))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
        parameter.data = parameter.data.bfloat16().float()  # one model for all dtypes
    model.to(device, dtype)
    # Poly's router draws numbers in training.
    model.train(not (case.mixed or case.poly))
    inputs = token_inputs(shape, case.B, case.source, case.target, device)
    if case.mixed:
        inputs["adapter_names"] = [f"a{i % case.adapters}" for i in range(case.B)]
    if case.poly:
        inputs["task_ids"] = torch.arange(case.B, device=device) % 4
    return Subject(model, inputs)


def _with_adapters(case: FuseCase, t5: Any) -> Any:
    options: dict[str, Any] = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM", "r": 8}
    if case.poly:
        return peft.get_peft_model(t5, peft.PolyConfig(n_tasks=4, n_skills=8, **options))
    model: Any = peft.get_peft_model(t5, peft.LoraConfig(**options), adapter_name="a0")
    for i in range(1, case.adapters):
        model.add_adapter(f"a{i}", peft.LoraConfig(**options))
    model.base_model.set_adapter([f"a{i}" for i in range(case.adapters)])
    return model


def measure(case: FuseCase, dtype: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a cell."""
    return fuse_measure.measure(case, dtype, mode, options, subject_of=subject_of, peer=PEFT)


if __name__ == "__main__":
    sys.exit(run_command(CASES, PEFT, measure))
