# SPDX-License-Identifier: Apache-2.0
"""The command that compares methods on several tasks: `pemt-fast multitask`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pemt_fast.console import console, print_table, split_names


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(multitask)


def multitask(
    model: Annotated[str, typer.Option(help="T5 directory or hub name.")],
    out: Annotated[Path, typer.Option(help="Where runs go; finished ones are skipped.")],
    tasks: Annotated[str, typer.Option(help="Tasks trained together, comma separated.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Comma separated; also mtl_lora, multi_lora, prompt_tuning, lora_prefix, peml."
        ),
    ] = "lora,moe_lora,poly,mhr,c_poly",
    data: Annotated[
        Path | None, typer.Option(help="Folder of JSONL data sets; none: the hub.")
    ] = None,
    units: Annotated[
        int | None, typer.Option(help="Hidden units per layer; default: C-Poly's 2·(3 + tasks).")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Layers, or all-linear; default: query and value.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Of training, comma separated.")] = "1,2,3",
    steps: Annotated[int | None, typer.Option(help="Default: one epoch.")] = None,
    lr: Annotated[float, typer.Option(help="Of adapters; routers have their own.")] = 1e-3,
    batch_size: Annotated[int, typer.Option()] = 32,
    temperature: Annotated[float, typer.Option(help="Of the task sampling.")] = 2.0,
    max_source_length: Annotated[int, typer.Option()] = 256,
    limit_train: Annotated[int | None, typer.Option(help="Examples of a task at most.")] = None,
    limit_eval: Annotated[int | None, typer.Option(help="Examples to test at most.")] = None,
    data_seed: Annotated[int, typer.Option(help="Of the splits.")] = 42,
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the methods' configs, name=value; repeatable."),
    ] = None,
    architecture_share: Annotated[
        float, typer.Option(help="PEML: part of the rows for a bi-level search's architecture.")
    ] = 0.0,
) -> None:
    """Compare C-Poly, PEML, LoRA mixtures and others on several tasks, at equal size."""
    from pemt_fast.methods.linear_config import ALL_LINEAR
    from pemt_fast.training.multi_task import MultiTaskRequest, run_multi_task
    from pemt_fast.training.multi_task_report import table
    from pemt_fast.training.options import TrainOptions

    options = TrainOptions(
        learning_rate=lr, steps=steps, epochs=1, batch_size=batch_size, bf16=bf16,
        max_source_length=max_source_length, progress=sys.stderr.isatty(),
    )  # fmt: skip
    layers = targets if targets == ALL_LINEAR else split_names(targets) or None
    request = MultiTaskRequest(
        model, split_names(tasks), split_names(methods), data, units, layers,
        [int(seed) for seed in split_names(seeds)], temperature, options, limit_train, limit_eval,
        data_seed, _settings(settings or []), architecture_share,
    )  # fmt: skip
    summary = run_multi_task(request, out, report=console.print)
    columns, rows = table(summary)
    print_table("scores, %", columns, rows)
    console.print(f"\nresults: {out / 'summary.json'}, {out / 'summary.md'}")


def _settings(entries: Sequence[str]) -> dict[str, Any]:
    """`name=value` as a dictionary: values in JSON, or text where they are none."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"--set must be name=value, got {entry!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
