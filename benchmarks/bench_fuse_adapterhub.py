# SPDX-License-Identifier: Apache-2.0
"""Measure what `fuse` makes of AdapterHub's adapters on T5-base: the same model, before and after.

    PYTHONPATH=build/adapterhub python benchmarks/bench_fuse_adapterhub.py [--device cuda] [--quick]

`make bench-adapterhub` makes that folder, the library with the transformers that it needs, and runs
this. Outputs and gradients are compared before anything is timed, the two forms take turns in one
process. Writes JSON and a page of tables, see `fuse_measure.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import warnings
from typing import Any

import adapters
import fuse_measure
import torch
from adapters.composition import Average, Fuse, Stack
from cases import DTYPES
from fuse_measure import FORWARD, STEP, Subject, plain_t5, run_command, token_inputs
from t5_cases import SHAPES

ADAPTERS = "adapters"


@dataclasses.dataclass(frozen=True)
class HubCase:
    """Adapters of seq_bn under one composition; a step of Fuse trains its attention only."""

    name: str
    composition: type | None = None
    adapters: int = 6
    B: int = 8
    source: int = 128
    target: int = 16

    @property
    def modes(self) -> tuple[str, ...]:
        """Both."""
        return (FORWARD, STEP)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """In 16 bits the library's Average raises: its weights make float32 of the sum."""
        return tuple(name for name in DTYPES if self.composition is not Average or name == "fp32")


CASES = (
    HubCase("single", adapters=1),
    HubCase("Stack of 6", Stack),
    HubCase("Average of 6", Average),
    HubCase("Fuse of 6", Fuse),
)


def subject_of(case: HubCase, dtype: torch.dtype, device: str, layers: int) -> Subject:
    """The model of a case, in training mode, with the library's own choice of what is trained."""
    torch.manual_seed(0)
    shape = SHAPES[1]
    model = plain_t5(shape, layers)
    adapters.init(model)
    names = [f"a{i}" for i in range(case.adapters)]
    for name in names:
        # Not relu, for the reason that the feed-forward layer is not.
        model.add_adapter(name, config=adapters.SeqBnConfig(non_linearity="gelu"))
    setup = names[0] if case.composition is None else case.composition(*names)
    if case.composition is Fuse:
        model.add_adapter_fusion(setup)
        model.train_adapter_fusion(setup)
    else:
        model.train_adapter(setup)
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            torch.nn.init.normal_(parameter, std=0.02)
        parameter.data = parameter.data.bfloat16().float()  # one model for all dtypes
    inputs = token_inputs(shape, case.B, case.source, case.target, device)
    return Subject(model.to(device, dtype).train(), inputs)


def measure(case: HubCase, dtype: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a cell."""
    return fuse_measure.measure(case, dtype, mode, options, subject_of=subject_of, peer=ADAPTERS)


if __name__ == "__main__":
    # The library's remarks on its transformers, at every model.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.exit(run_command(CASES, ADAPTERS, measure))
