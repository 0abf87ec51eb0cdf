# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast protocol`: the whole PEMT experiment as one command that may be killed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pemt_fast.cli_data import LabelStyleOption, PrefixOption
from pemt_fast.console import console, split_names

# Options that go with a plan that is there; all others make one.
_WITHOUT_PLAN = {"out", "workers", "threads", "plan", "join", "report"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(protocol)


def protocol(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Where runs go; finished ones are skipped.")],
    model: Annotated[
        str | None, typer.Option(help="T5 directory or hub name; none: go on with the plan in out.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of JSONL data sets; none: the hub.")
    ] = None,
    sources: Annotated[str, typer.Option(help="Default: the six published ones.")] = "",
    targets: Annotated[str, typer.Option(help="Default: the 17 published ones.")] = "",
    methods: Annotated[
        str,
        typer.Option(
            help="Also pemt_no_sparsity, pemt_frozen_norms, pemt_random_prompt, adapter, lora, "
            "prompt_tuning, full."
        ),
    ] = "pemt,single,plain",
    seeds: Annotated[str, typer.Option(help="Of training on the targets.")] = "1,2,3",
    few_shot: Annotated[
        str, typer.Option(help="Target examples per class, comma separated; all: full data.")
    ] = "4,16,32",
    workers: Annotated[int, typer.Option(help="Processes, each with its own GPU.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Of a worker; default: the cores, shared out.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the runs and train nothing.")] = False,
    join: Annotated[bool, typer.Option("--join", help="Only add workers to the plan.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Show the tables so far.")] = False,
    source_kind: Annotated[str, typer.Option(help="lora or bottleneck.")] = "lora",
    source_rank: Annotated[int, typer.Option(help="Bottleneck of a source.")] = 64,
    target_reduction: Annotated[int, typer.Option(help="d_model / target bottleneck.")] = 16,
    aux_weight: Annotated[float, typer.Option(help="Weight of the Task Sparsity Loss.")] = 0.1,
    published: Annotated[bool, typer.Option(help="The released code's defects too.")] = False,
    source_lr: Annotated[float, typer.Option()] = 5e-4,
    source_epochs: Annotated[float | None, typer.Option(help="Default: 5.")] = None,
    source_steps: Annotated[int | None, typer.Option(help="Updates instead of epochs.")] = None,
    source_warmup: Annotated[
        int | None, typer.Option(help="Updates; default: 500, a tenth of --source-steps at most.")
    ] = None,
    source_batch_size: Annotated[
        int | None, typer.Option(help="Default: 128, SQuAD and ReCoRD 256.")
    ] = None,
    source_seed: Annotated[int, typer.Option()] = 42,
    target_lr: Annotated[float, typer.Option()] = 3e-4,
    target_epochs: Annotated[
        float | None, typer.Option(help="Default: 20, with full data MultiRC 10, MRQA 5.")
    ] = None,
    target_steps: Annotated[int | None, typer.Option(help="Updates instead of epochs.")] = None,
    target_batch_size: Annotated[
        int | None, typer.Option(help="Default: the shots; with full data 32 to 100 by task.")
    ] = None,
    rate: Annotated[
        list[str] | None, typer.Option(help="Of one method, method=value; repeatable.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps; default: each epoch.")] = None,
    eval_batch_size: Annotated[int, typer.Option()] = 128,
    max_source_length: Annotated[int | None, typer.Option(help="Default: the task's.")] = None,
    limit_train: Annotated[
        int | None, typer.Option(help="Examples of sources and of full data at most.")
    ] = None,
    limit_eval: Annotated[int | None, typer.Option(help="Examples to evaluate at most.")] = None,
    data_seed: Annotated[int, typer.Option(help="Of splits and few-shot draws.")] = 42,
    label_style: LabelStyleOption = "name",
    prefix: PrefixOption = "none",
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Time for memory.")] = False,
) -> None:
    """PEMT's published experiment: sources, targets, baselines, seeds, shots, one table."""
    from pemt_fast.data import SOURCE_TASKS, TARGET_TASKS
    from pemt_fast.training.protocol_plan import ProtocolRequest, require_plan
    from pemt_fast.training.protocol_report import markdown, progress, write_report
    from pemt_fast.training.protocol_run import make_plan, run_protocol

    request = None
    if model is None or join or report:
        _require_no_settings(context)
    else:
        request = ProtocolRequest(
            model=_place(model),
            sources=split_names(sources) or SOURCE_TASKS,
            targets=split_names(targets) or TARGET_TASKS,
            methods=split_names(methods),
            seeds=[int(seed) for seed in split_names(seeds)],
            shots=[None if k == "all" else int(k) for k in split_names(few_shot)],
            data_dir=None if data is None else str(data.resolve()),
            source_kind=source_kind, source_rank=source_rank, target_reduction=target_reduction,
            aux_weight=aux_weight, published=published, source_lr=source_lr,
            source_epochs=source_epochs, source_steps=source_steps, source_warmup=source_warmup,
            source_batch_size=source_batch_size, source_seed=source_seed, target_lr=target_lr,
            target_epochs=target_epochs, target_steps=target_steps,
            target_batch_size=target_batch_size, rates=_rates(rate or []), eval_every=eval_every,
            eval_batch_size=eval_batch_size, max_source_length=max_source_length,
            limit_train=limit_train, limit_eval=limit_eval, data_seed=data_seed,
            label_style=label_style, prefix=prefix, bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
    if plan or report:
        found = make_plan(request, out) if request is not None else require_plan(out)
        if report:
            _print(markdown(write_report(out)))
            return
        rows, total = progress(out, found)
        # Not a table of the console's: it would cut the names of runs to the terminal's width.
        rows = [("run", "state", "needs", "updates", "seconds"), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            _print("  ".join(map(str.ljust, row, widths)).rstrip())
        _print(total)
        return
    results = run_protocol(out, request, workers=workers, threads=threads, join=join, report=_print)
    _print(markdown(results))
    _print(f"results: {out / 'results.md'}, .csv, .json")
    if left := [n for n, run in results["runs"].items() if run["state"] != "done"]:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise RuntimeError(
            f"{len(left)} runs are not done: {', '.join(left[:3])}{more}; errors with tracebacks "
            f"are in {out / 'queue'}, the same command tries again"
        )


def _print(text: str) -> None:
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _require_no_settings(context: typer.Context) -> None:
    """Settings of a plan that is there already would be ignored."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in _WITHOUT_PLAN:
            raise ValueError(
                f"--{name.replace('_', '-')} belongs to a new plan, which needs --model and "
                "neither --join nor --report"
            )


def _place(model: str) -> str:
    """A directory by its whole path, so that workers find it from anywhere; a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _rates(entries: list[str]) -> dict[str, Any]:
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--rate must be method=value, got {entry!r}") from None
    return found
