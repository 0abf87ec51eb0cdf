# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast train`: all sources, then all targets, on data sets of the hub's schema.

Everything that can be wrong is found before the first step: names, files, labels, lengths. A run
that is finished is skipped, so the same command continues after a kill.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from pemt_fast.attach import load
from pemt_fast.checkpoint import replace_file
from pemt_fast.data import LabelStyle, Prefix, Task, get_task, load_splits, tokenize
from pemt_fast.data.rows import Sources, source_of
from pemt_fast.methods.pemt_config import PemtConfig
from pemt_fast.t5 import T5Model, max_positions
from pemt_fast.training import multi_task_data
from pemt_fast.training.fit import (
    encode,
    environment,
    generation_length,
    predict,
    read_results,
    write_json,
)
from pemt_fast.training.metrics import compute
from pemt_fast.training.options import STAGE_ONE, STAGE_TWO, TrainOptions
from pemt_fast.training.stages import (
    Backbone,
    TaskData,
    score_untouched,
    train_single,
    train_source,
    train_target,
)

logger = logging.getLogger("pemt_fast")


@dataclass(frozen=True)
class TrainRequest:
    """What to train; see `pemt-fast train --help` and `PemtConfig`.

    Attributes:
        model: Directory or hub name of a T5.
        sources: Source tasks, names or `Task` objects.
        targets: Target tasks; empty for stage 1 only.
        data_dir: Folder of JSONL data sets; a mapping from a task's name to its own folder or to
            its rows by split (see `load_rows`); None: the hub.
        few_shot: Target examples per class; None: the whole training part.
        baseline: Also train a single adapter and score the plain T5.
        source_kind: See `PemtConfig`.
        source_rank: See `PemtConfig`.
        target_reduction: See `PemtConfig`.
        aux_weight: See `PemtConfig`.
        published: See `PemtConfig`.
        source_options: Optimisation of stage 1.
        target_options: Optimisation of stage 2.
        limit_train: Source examples at most.
        limit_eval: Validation and test examples at most.
        data_seed: Seed of splits and few-shot draws.
        label_style: How labels are written, see `pemt_fast.data.style`.
        prefix: What stands in front of the sources, see `pemt_fast.data.style`.
    """

    model: str
    sources: Sequence[str | Task]
    targets: Sequence[str | Task] = ()
    data_dir: Sources = None
    few_shot: int | None = None
    baseline: bool = False
    source_kind: str = "lora"
    source_rank: int = 64
    target_reduction: int = 16
    aux_weight: float = 0.1
    published: bool = False
    source_options: TrainOptions = STAGE_ONE
    target_options: TrainOptions = STAGE_TWO
    limit_train: int | None = None
    limit_eval: int | None = None
    data_seed: int = 42
    label_style: LabelStyle = "name"
    prefix: Prefix = "none"


def load_backbone(name: str) -> tuple[Callable[[], T5Model], PreTrainedTokenizerBase]:
    """One T5, loaded once, and its tokenizer.

    Raises:
        FileNotFoundError: neither a directory with a model nor a name that the hub knows.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSeq2SeqLM.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"model: {name!r} is neither a directory with a T5 nor a hub name that can be loaded: "
            f"{error}"
        ) from error
    return lambda: model, tokenizer


def load_task(
    name: str | Task, request: TrainRequest, *, few_shot: int | None, limit_train: int | None
) -> TaskData:
    """Examples of a known task."""
    return multi_task_data.load_task(
        name,
        request.data_dir,
        few_shot=few_shot,
        seed=request.data_seed,
        limit_train=limit_train,
        limit_eval=request.limit_eval,
        label_style=request.label_style,
        prefix=request.prefix,
    )


def _options(request: TrainRequest, task: TaskData, stage: int) -> TrainOptions:
    """Those of a stage, with what they leave to the task."""
    if stage == 1:
        return request.source_options.for_task(task.metrics, stage=1)
    return request.target_options.for_task(task.metrics, stage=2, few_shot=request.few_shot)


def check_task(
    task: TaskData, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, model: T5Model
) -> None:
    """Raise a `ValueError` if a task's texts, labels or description do not fit."""
    encode(task.splits, tokenizer, options)
    length, limit = len(tokenizer(task.description)["input_ids"]), max_positions(model)
    if length > limit:
        raise ValueError(
            f"the description of {task.name!r} has {length} tokens: a prompt may have at most "
            f"{limit}, the positions of this model"
        )


def _check(
    request: TrainRequest,
    sources: dict[str, TaskData],
    targets: dict[str, TaskData],
    tokenizer: PreTrainedTokenizerBase,
    model: T5Model,
) -> None:
    """Everything about the tasks that can be wrong, before the first step of the first run."""
    for stage, tasks in ((1, sources), (2, targets)):
        for task in tasks.values():
            check_task(task, _options(request, task, stage), tokenizer, model)
    # Builds the config once, so that a bad choice is found now.
    PemtConfig(
        sources=list(sources), source_kind=request.source_kind, source_rank=request.source_rank,
        target_reduction=request.target_reduction, aux_weight=request.aux_weight,
    )  # fmt: skip


def run_training(
    request: TrainRequest,
    directory: str | os.PathLike[str],
    *,
    report: Callable[[str], object] = lambda line: None,
) -> dict:
    """Train what is not trained yet; write `summary.json` and `summary.md`.

    Args:
        request: What to train.
        directory: Runs go to `sources/<task>`, `targets/<task>` and `single/<task>` below it.
        report: Called with a line per run.
    """
    folder = Path(directory)
    chosen = [[get_task(n) for n in names] for names in (request.sources, request.targets)]
    if not request.sources:
        raise ValueError("sources must name at least one task, got none")
    make, tokenizer = load_backbone(request.model)
    sources = {
        t.name: load_task(t, request, few_shot=None, limit_train=request.limit_train)
        for t in chosen[0]
    }
    targets = {
        t.name: load_task(t, request, few_shot=request.few_shot, limit_train=None)
        for t in chosen[1]
    }
    _check(request, sources, targets, tokenizer, make())
    backbone = Backbone(make, tokenizer, request.model)
    summary: dict = {"sources": {}, "targets": {}}
    for name, task in sources.items():
        report(f"stage 1: {name}, {len(task.splits.train)} examples")
        summary["sources"][name] = train_source(
            backbone, task, _options(request, task, 1), folder / "sources" / name,
            rank=request.source_rank, kind=request.source_kind, published=request.published,
        )  # fmt: skip
    for name, task in targets.items():
        report(f"stage 2: {name}, {len(task.splits.train)} examples")
        summary["targets"][name] = _adapt(request, backbone, task, folder, list(sources))
    summary |= {
        "label_style": request.label_style, "prefix": request.prefix, "environment": environment(),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    text = markdown(summary)
    replace_file(folder / "summary.md", lambda path: path.write_text(text))
    return summary


def _adapt(
    request: TrainRequest, backbone: Backbone, task: TaskData, folder: Path, sources: Sequence[str]
) -> dict:
    options = _options(request, task, 2)
    pemt = train_target(
        backbone, task, [folder / "sources" / s for s in sources], options,
        folder / "targets" / task.name, kind=request.source_kind,
        target_reduction=request.target_reduction, aux_weight=request.aux_weight,
        published=request.published,
    )  # fmt: skip
    scores = {"PEMT": {**pemt["test"], "seconds": pemt["seconds"]}}
    if request.baseline:
        single = train_single(
            backbone, task, options, folder / "single" / task.name, rank=request.source_rank
        )
        scores["single adapter"] = {**single["test"], "seconds": single["seconds"]}
        scores["untouched model"] = score_untouched(backbone, task, options)
    return {
        "examples": len(task.splits.train),
        "tested": len(task.splits.test),
        "scores": scores,
        "gate": pemt["gate"],
        "gates": pemt["gates"],
    }


def markdown(summary: dict) -> str:
    """The summary as Markdown tables."""
    lines = ["| source | train | test | score, % | seconds |", "|---|---|---|---|---|"]
    for name, r in summary["sources"].items():
        e = r["examples"]
        score, seconds = r["test"]["average"], r["seconds"]
        lines.append(f"| {name} | {e['train']} | {e['test']} | {score:.1f} | {seconds:.0f} |")
    for name, target in summary["targets"].items():
        lines += ["", f"Target `{name}`: {target['examples']} examples, {target['tested']} tested."]
        lines += ["", "| method | score, % | seconds |", "|---|---|---|"]
        for method, r in target["scores"].items():
            seconds = f"{r['seconds']:.0f}" if "seconds" in r else "–"
            lines.append(f"| {method} | {r['average']:.1f} | {seconds} |")
        lines += ["", "| layer | " + " | ".join(target["gate"]) + " |"]
        lines.append("|---" * (len(target["gate"]) + 1) + "|")
        rows = {**target["gates"], "mean": list(target["gate"].values())}
        for layer, weights in rows.items():
            lines.append(f"| {layer} | " + " | ".join(f"{w:.2f}" for w in weights) + " |")
    environment = ", ".join(f"{k} {v}" for k, v in summary["environment"].items() if v)
    return "\n".join([*lines, "", f"_{environment}_", ""])


def evaluate_adapters(
    model: str,
    adapters: str | os.PathLike[str],
    task_name: str | Task,
    data_dir: Sources,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    max_source_length: int | None = None,
    label_style: LabelStyle | None = None,
    prefix: Prefix | None = None,
) -> dict[str, float]:
    """Scores of saved adapters on the test part of a task.

    `data_dir` is as in `TrainRequest`, `task_name` may be a `Task` object.
    `label_style` and `prefix` are those of the adapters' run unless given; adapters without
    `results.json` are taken to have been trained with the default of `TrainRequest`.
    """
    task = get_task(task_name)
    recorded = _recorded_style(adapters, task.name)
    label_style, prefix = label_style or recorded[0], prefix or recorded[1]
    logger.info("%s: label style %r, prefix %r", task.name, label_style, prefix)
    splits = load_splits(
        task, source_of(data_dir, task), limit_eval=limit, label_style=label_style, prefix=prefix
    )  # fmt: skip
    make, tokenizer = load_backbone(model)
    length = max_source_length or task.max_source_length
    rows = tokenize(splits.test, tokenizer, max_source_length=length)
    adapted = load(make(), adapters)
    texts = predict(
        adapted, tokenizer, rows, batch_size=batch_size, max_length=generation_length([rows])
    )
    return compute(task, texts, list(splits.test))


def _recorded_style(adapters: str | os.PathLike[str], task_name: str) -> tuple[LabelStyle, Prefix]:
    """What the run that left these adapters wrote its texts in."""
    request = (read_results(adapters) or {}).get("request", {})
    # Runs of several tasks have always had a prefix, also before it was recorded.
    prefix = request.get("prefix", "colon" if "tasks" in request else "none")
    style = request.get("label_style", "name")
    return (style.get(task_name, "name") if isinstance(style, dict) else style), prefix
