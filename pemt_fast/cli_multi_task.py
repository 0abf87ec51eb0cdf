# SPDX-License-Identifier: Apache-2.0
"""The commands that train several tasks together: `pemt-fast multitask` and `tune-peml`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pemt_fast.cli_data import (
    LabelStyleOption,
    MaxSourceLength,
    NaturalInstructions,
    PositiveExamples,
    PrefixOption,
    with_natural_instructions,
)
from pemt_fast.console import console, print_table, split_names

_Model = Annotated[str, typer.Option(help="T5 directory or hub name.")]
_Tasks = Annotated[str, typer.Option(help="Tasks trained together, comma separated.")]
_Data = Annotated[Path | None, typer.Option(help="Folder of JSONL data sets; none: the hub.")]
_Targets = Annotated[str, typer.Option(help="Layers, or all-linear; default: query and value.")]
_Seeds = Annotated[str, typer.Option(help="Of training, comma separated.")]
_Steps = Annotated[int | None, typer.Option(help="Default: one epoch.")]
_Temperature = Annotated[float, typer.Option(help="Of the task sampling.")]
_LimitTrain = Annotated[int | None, typer.Option(help="Examples of a task at most.")]
_LimitEval = Annotated[int | None, typer.Option(help="Examples to test at most.")]
_DataSeed = Annotated[int, typer.Option(help="Of the splits.")]
_Bf16 = Annotated[bool, typer.Option(help="Autocast to bfloat16.")]
_Number = Annotated[int, typer.Option()]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(multitask)
    app.command(name="tune-peml")(tune_peml)


def multitask(
    model: _Model,
    out: Annotated[Path, typer.Option(help="Where runs go; finished ones are skipped.")],
    tasks: _Tasks,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma separated; also mtl_lora, multi_lora, prompt_tuning, lora_prefix, peml."
        ),
    ] = "lora,moe_lora,poly,mhr,c_poly",
    data: _Data = None,
    units: Annotated[
        int | None, typer.Option(help="Hidden units per layer; default: C-Poly's 2·(3 + tasks).")
    ] = None,
    targets: _Targets = "",
    seeds: _Seeds = "1,2,3",
    steps: _Steps = None,
    lr: Annotated[float, typer.Option(help="Of adapters; routers have their own.")] = 1e-3,
    batch_size: _Number = 32,
    temperature: _Temperature = 2.0,
    max_source_length: MaxSourceLength = None,
    limit_train: _LimitTrain = None,
    limit_eval: _LimitEval = None,
    data_seed: _DataSeed = 42,
    bf16: _Bf16 = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the methods' configs, name=value; repeatable."),
    ] = None,
    architecture_share: Annotated[
        float, typer.Option(help="PEML: part of the rows for a bi-level search's architecture.")
    ] = 0.0,
    label_style: LabelStyleOption = "name",
    prefix: PrefixOption = "colon",
    natural_instructions: NaturalInstructions = None,
    positive_examples: PositiveExamples = 0,
) -> None:
    """Compare C-Poly, PEML, LoRA mixtures and others on several tasks, at equal size."""
    from pemt_fast.training.multi_task import MultiTaskRequest, run_multi_task
    from pemt_fast.training.multi_task_report import table
    from pemt_fast.training.options import TrainOptions

    options = TrainOptions(
        learning_rate=lr, steps=steps, epochs=1, batch_size=batch_size, bf16=bf16,
        max_source_length=max_source_length, progress=sys.stderr.isatty(),
    )  # fmt: skip
    chosen, source = with_natural_instructions(
        split_names(tasks), data, natural_instructions, positive_examples
    )
    request = MultiTaskRequest(
        model, chosen, split_names(methods), source, units, _layers(targets),
        [int(seed) for seed in split_names(seeds)], temperature, options, limit_train, limit_eval,
        data_seed, _settings(settings or []), architecture_share, label_style, prefix,
    )  # fmt: skip
    summary = run_multi_task(request, out, report=console.print)
    columns, rows = table(summary)
    print_table("scores, %", columns, rows)
    console.print(f"\nresults: {out / 'summary.json'}, {out / 'summary.md'}")


def tune_peml(
    model: _Model,
    out: Annotated[Path, typer.Option(help="The study and the runs; goes on where it stopped.")],
    tasks: _Tasks,
    space: Annotated[
        str, typer.Option(help="What is tried, JSON or a file of it; missing: HyperSpace's.")
    ] = "{}",
    trials: Annotated[int, typer.Option(help="Complete and pruned ones, of all processes.")] = 20,
    only_trials: Annotated[
        bool, typer.Option("--only-trials", help="For further processes of the same study.")
    ] = False,
    data: _Data = None,
    targets: _Targets = "all-linear",
    seeds: _Seeds = "1,2,3",
    steps: _Steps = None,
    batch_size: _Number = 32,
    temperature: _Temperature = 2.0,
    max_source_length: MaxSourceLength = None,
    limit_train: _LimitTrain = None,
    limit_eval: _LimitEval = None,
    data_seed: _DataSeed = 42,
    bf16: _Bf16 = False,
    label_style: LabelStyleOption = "name",
    prefix: PrefixOption = "colon",
) -> None:
    """Find PEML's sizes and rates for several tasks by validation scores, then test the best."""
    from pemt_fast.training.hyper_search import HyperSpace
    from pemt_fast.training.options import TrainOptions
    from pemt_fast.training.peml_tune import PemlTuneRequest
    from pemt_fast.training.peml_tune import tune_peml as run

    options = TrainOptions(
        steps=steps, epochs=1, batch_size=batch_size, bf16=bf16,
        max_source_length=max_source_length, progress=sys.stderr.isatty(),
    )  # fmt: skip
    request = PemlTuneRequest(
        model=model, tasks=split_names(tasks), space=HyperSpace.from_dict(_json("--space", space)),
        trials=trials, data_dir=data, temperature=temperature, options=options,
        target_modules=_layers(targets),
        limit_train=limit_train, limit_eval=limit_eval, data_seed=data_seed,
        seeds=[int(seed) for seed in split_names(seeds)], label_style=label_style, prefix=prefix,
    )  # fmt: skip
    result = run(request, out, only_trials=only_trials, report=console.print)
    values, value = result["study"]["values"], result["study"]["value"]
    if values is not None:
        rows = [(name, str(chosen)) for name, chosen in values.items()]
        print_table(f"best of {len(result['study']['trials'])}, validation {value:.1f} %",
                    ("", "value"), rows)  # fmt: skip
    if not only_trials:
        scores = ", ".join(f"{score:.1f}" for score in result["means"])
        console.print(f"\ntest, mean of the tasks by seed, %: {scores}")
        console.print(f"results: {out / 'tuning.json'}, {out / 'best'}")


def _layers(targets: str) -> str | list[str] | None:
    """`target_modules` of a config."""
    from pemt_fast.methods.linear_config import ALL_LINEAR

    return targets if targets == ALL_LINEAR else split_names(targets) or None


def _json(option: str, text: str) -> dict[str, Any]:
    """A JSON object, as it is or in a file."""
    words = text if text.lstrip().startswith("{") else Path(text).read_text()
    try:
        found = json.loads(words)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} must be a JSON object or a file of one: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{option} must be a JSON object, got {type(found).__name__}")
    return found


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
