# SPDX-License-Identifier: Apache-2.0
"""The command line: `pemt-fast demo`, `train`, …; more in `cli_multi_task.py`, `cli_machine.py`.

Arguments become calls of `pemt_fast.training`; results are printed as tables and written as JSON
beside PNG plots. Expected errors end in one line that names what is wrong, never in a traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pemt_fast import cli_convert, cli_data, cli_machine, cli_multi_task, cli_protocol
from pemt_fast.cli_data import (
    LabelStyleOption,
    MaxSourceLength,
    PrefixOption,
    RecordedLabelStyle,
    RecordedPrefix,
)
from pemt_fast.console import console, print_table, split_names

app = typer.Typer(
    name="pemt-fast",
    help="Mixtures of adapters on T5.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class SourceKind(StrEnum):
    """`--source-kind`."""

    lora = "lora"
    bottleneck = "bottleneck"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `pemt-fast`."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("pemt_fast").setLevel(logging.INFO)
    # No command downloads anything unless a hub name is given; keep the tokenizers quiet.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(args=None if arguments is None else list(arguments))
    except (ValueError, FileNotFoundError, TypeError, ImportError, RuntimeError) as error:
        if os.environ.get("PEMT_FAST_DEBUG"):
            raise
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _gate_table(title: str, gates: dict[str, list[float]], sources: Sequence[str]) -> None:
    console.print(title, style="bold", soft_wrap=True)
    table = Table()
    for column in ("layer", *sources):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer, weights in gates.items():
        best = max(weights)
        cells = (f"[bold]{w:.2f}[/bold]" if w == best else f"{w:.2f}" for w in weights)
        table.add_row(layer, *cells)
    console.print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("demo-results"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs per target and method.")] = 2,
    quick: Annotated[
        bool, typer.Option(help="A few steps only: shows that everything runs.")
    ] = False,
) -> None:
    """Train sources, adapt to few-shot targets, show what the gate chose; made-up text tasks."""
    from pemt_fast.training.demo import DemoConfig, run_demo

    changes: dict = {"seeds": tuple(range(1, seeds + 1)), "progress": sys.stderr.isatty()}
    if quick:
        changes |= {
            "backbone_steps": 20, "source_steps": 10, "target_steps": 10, "test_examples": 16,
            "timing_rounds": 2, "seeds": (1,),
        }  # fmt: skip
    results = run_demo(out, DemoConfig(**changes), report=console.print)
    for name, target in results["targets"].items():
        related = " then ".join(target["related"])
        rows: list[tuple[object, ...]] = [
            (method, scores["token_accuracy"], scores["accuracy"])
            for method, scores in target["scores"].items()
        ]
        print_table(
            f"\ntarget {name} ({target['examples']} examples, related to: {related}), test, %",
            ("method", "letters right", "strings right"),
            rows,
        )
        sources = list(target["gate"])
        _gate_table("gate weight per source", target["gates"], sources)
    times: list[tuple[object, ...]] = [
        (dtype, t["loop_ms"], t["ours_ms"], f"{t['speedup']:.2f}x")
        for dtype, t in results["operator"].items()
    ]
    print_table(
        "\noperator, T5-base feed-forward layer, 8 x 128 tokens, 6 sources, forward + backward",
        ("dtype", "published loop, ms", "adapter_mixture, ms", "speed-up"),
        times,
    )
    console.print(f"\nresults: {out / 'demo.json'}, gate maps below {out / 'targets'}")


@app.command()
def train(
    model: Annotated[str, typer.Option(help="T5 directory or hub name.")],
    out: Annotated[Path, typer.Option(help="Where runs go; finished ones are skipped.")],
    sources: Annotated[str, typer.Option(help="Source tasks, comma separated.")],
    target: Annotated[str, typer.Option(help="Target tasks, comma separated.")] = "",
    data: Annotated[
        Path | None, typer.Option(help="Folder of JSONL data sets; none: the hub.")
    ] = None,
    few_shot: Annotated[int | None, typer.Option(help="Target examples per class.")] = None,
    baseline: Annotated[bool, typer.Option(help="Also a single adapter and the plain T5.")] = False,
    source_kind: Annotated[SourceKind, typer.Option()] = SourceKind.lora,
    source_rank: Annotated[int, typer.Option(help="Bottleneck of a source.")] = 64,
    target_reduction: Annotated[int, typer.Option(help="d_model / target bottleneck.")] = 16,
    aux_weight: Annotated[float, typer.Option(help="Weight of the Task Sparsity Loss.")] = 0.1,
    published: Annotated[bool, typer.Option(help="The released code's defects too.")] = False,
    source_steps: Annotated[int | None, typer.Option(help="Default: 5 epochs.")] = None,
    target_steps: Annotated[
        int | None, typer.Option(help="Default: 20 epochs, MultiRC 10, MRQA 5.")
    ] = None,
    source_lr: Annotated[float, typer.Option()] = 5e-4,
    target_lr: Annotated[float, typer.Option()] = 3e-4,
    batch_size: Annotated[
        int | None, typer.Option(help="Default: as published for the task; few-shot: that.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps; default: each epoch.")] = None,
    max_source_length: MaxSourceLength = None,
    limit_train: Annotated[int | None, typer.Option(help="Source examples at most.")] = None,
    limit_eval: Annotated[int | None, typer.Option(help="Examples to evaluate at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of training.")] = 42,
    data_seed: Annotated[int, typer.Option(help="Of splits and few-shot draws.")] = 42,
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    label_style: LabelStyleOption = "name",
    prefix: PrefixOption = "none",
) -> None:
    """Both stages on real data: one run per source, then one per target."""
    from pemt_fast.training.options import TrainOptions
    from pemt_fast.training.run import TrainRequest, run_training

    def options(learning_rate: float, steps: int | None) -> TrainOptions:
        return TrainOptions(
            learning_rate=learning_rate, steps=steps, epochs=None, batch_size=batch_size,
            eval_every=eval_every, max_source_length=max_source_length, seed=seed, bf16=bf16,
            progress=sys.stderr.isatty(),
        )  # fmt: skip

    request = TrainRequest(
        model=model,
        sources=split_names(sources),
        targets=split_names(target),
        data_dir=data,
        few_shot=few_shot,
        baseline=baseline,
        source_kind=source_kind.value,
        source_rank=source_rank,
        target_reduction=target_reduction,
        aux_weight=aux_weight,
        published=published,
        source_options=options(source_lr, source_steps),
        target_options=options(target_lr, target_steps),
        limit_train=limit_train,
        limit_eval=limit_eval,
        data_seed=data_seed,
        label_style=label_style,
        prefix=prefix,
    )
    summary = run_training(request, out, report=console.print)
    _print_summary(summary)
    console.print(f"\nresults: {out / 'summary.json'}, {out / 'summary.md'}")


def _print_summary(summary: dict) -> None:
    rows = [
        (name, r["examples"]["train"], r["test"]["average"], r["seconds"])
        for name, r in summary["sources"].items()
    ]
    print_table("sources", ("task", "examples", "test, %", "seconds"), rows)
    for name, target in summary["targets"].items():
        scores = [
            (method, r["average"], r.get("seconds", 0.0)) for method, r in target["scores"].items()
        ]
        title = f"target {name}, {target['examples']} examples"
        print_table(title, ("method", "test, %", "seconds"), scores)
        _gate_table("gate weight per source", target["gates"], list(target["gate"]))


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="T5 directory or hub name.")],
    adapters: Annotated[Path, typer.Option(help="Directory of a trained source or target.")],
    task: Annotated[str, typer.Option(help="Task to evaluate on.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of JSONL data sets; none: the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples at most.")] = None,
    batch_size: Annotated[int, typer.Option()] = 64,
    max_source_length: MaxSourceLength = None,
    label_style: RecordedLabelStyle = None,
    prefix: RecordedPrefix = None,
) -> None:
    """Score saved adapters on the test part of a task."""
    from pemt_fast.training.run import evaluate_adapters

    scores = evaluate_adapters(
        model, adapters, task, data,
        limit=limit, batch_size=batch_size, max_source_length=max_source_length,
        label_style=label_style, prefix=prefix,
    )  # fmt: skip
    print_table(f"{task}, test", ("metric", "%"), list(scores.items()))


@app.command()
def pretrain(
    text: Annotated[Path, typer.Option(help="Folder of .txt files.")],
    out: Annotated[Path, typer.Option(help="Where the T5 and its tokenizer go.")],
    tasks: Annotated[str, typer.Option(help="Supervised tasks to mix in.")] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of JSONL data sets.")] = None,
    task_share: Annotated[float, typer.Option(help="Share of the updates spent on tasks.")] = 0.5,
    steps: Annotated[int | None, typer.Option(help="Number of updates.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Pretrain a small T5 from scratch on a folder of text, for work without a network."""
    from pemt_fast.training.pretrain import PretrainConfig
    from pemt_fast.training.pretrain import pretrain as run

    files = sorted(text.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"--text: {text} holds no .txt files")
    changes: dict = {"seed": seed, "task_share": task_share}
    if steps is not None:
        changes["steps"] = steps
    result = run(files, out, PretrainConfig(**changes), tasks=split_names(tasks), data_dir=data)
    console.print(f"pretrained in {result['seconds']:.0f} s: {out}")


cli_data.register(app)
cli_multi_task.register(app)
cli_protocol.register(app)
cli_machine.register(app)
cli_convert.register(app)


if __name__ == "__main__":
    main()
