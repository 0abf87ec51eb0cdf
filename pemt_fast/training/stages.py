# SPDX-License-Identifier: Apache-2.0
"""PEMT's two stages as runs: `train_source`, `train_target`, and `train_single` to compare with.

Every run has its directory and is skipped when it is already finished there. `fit.py` trains one
model, `gate_report.py` says what its gates chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase, set_seed

from pemt_fast.attach import get_model
from pemt_fast.data import LabelStyle, Prefix, Splits, Task
from pemt_fast.methods.pemt_config import PemtConfig
from pemt_fast.methods.task_config import TaskConfig
from pemt_fast.t5 import T5Model
from pemt_fast.training.fit import (
    encode,
    finish,
    finished,
    fit,
    generation_length,
    predict,
)
from pemt_fast.training.gate_report import mean_gates, mean_over_layers, save_gate_map
from pemt_fast.training.metrics import compute
from pemt_fast.training.options import TrainOptions

GATES_IMAGE = "gates.png"


@dataclass
class Backbone:
    """The frozen T5 of all runs.

    Attributes:
        make: Returns a fresh or reused T5 without adapters; called once per run.
        tokenizer: Its tokenizer.
        name: For the results.
    """

    make: Callable[[], T5Model]
    tokenizer: PreTrainedTokenizerBase
    name: str


@dataclass
class TaskData:
    """One task's examples and how it is scored.

    Attributes:
        name: Task name.
        description: The sentence behind the task prompt.
        splits: Train, validation and test examples.
        metrics: A known task or names of metrics, for `metrics.compute`.
        prompt_length: Prompt positions; None: the tokens of the description.
        label_style: How the targets of `splits` are written, for the results.
        prefix: What stands in front of the sources of `splits`, for the results.
    """

    name: str
    description: str
    splits: Splits
    metrics: Task | Sequence[str]
    prompt_length: int | None = None
    label_style: LabelStyle = "name"
    prefix: Prefix = "none"


def train_method(
    backbone: Backbone,
    task: TaskData,
    config: PemtConfig | TaskConfig,
    options: TrainOptions,
    directory: Path,
    label: str,
) -> dict:
    """Train any method on one task, or return what a finished run left.

    Args:
        backbone: The frozen T5.
        task: What to train on.
        config: The method.
        options: Optimisation; None becomes the task's own.
        directory: The run directory.
        label: What is being trained, for logs and results.
    """
    options = options.for_task(task.metrics, stage=getattr(config, "stage", 2))
    request = {
        "backbone": backbone.name,
        "task": task.name,
        "config": config.to_dict(),
        "options": {k: v for k, v in asdict(options).items() if k not in ("progress", "workers")},
        "examples": len(task.splits.train),
        "data": task.splits.digest(),
        "label_style": task.label_style,
        "prefix": task.prefix,
    }
    # Earlier versions did not say which data it was: taken to be the same.
    earlier = {"label_style": "name", "prefix": "none", "data": request["data"]}
    if (results := finished(directory, request, unrecorded=earlier)) is not None:
        return results
    set_seed(options.seed)
    model = get_model(backbone.make(), cast(PemtConfig, config), backbone.tokenizer)
    try:
        results = fit(
            model, backbone.tokenizer, task.splits, task.metrics, options, directory,
            label=label, request=request,
        )  # fmt: skip
        if isinstance(config, PemtConfig) and config.stage == 2:
            _, _, test = encode(task.splits, backbone.tokenizer, options)
            gates = mean_gates(model, backbone.tokenizer, test, batch_size=options.eval_batch_size)
            sources = list(cast(PemtConfig, model.adapter_config).sources)
            results["gates"] = gates
            results["gate"] = dict(zip(sources, mean_over_layers(gates), strict=True))
            save_gate_map(gates, sources, f"target: {task.name}", directory / GATES_IMAGE)
        return finish(directory, results)
    finally:
        model.unload()


def train_source(
    backbone: Backbone,
    task: TaskData,
    options: TrainOptions,
    directory: str | Path,
    *,
    rank: int = 64,
    kind: str = "lora",
    published: bool = False,
) -> dict:
    """Stage 1: one source adapter and its prompt."""
    config = PemtConfig(
        target=task.name, stage=1, source_rank=rank, source_kind=kind, published=published,
        description=task.description, prompt_length=task.prompt_length,
    )  # fmt: skip
    return train_method(backbone, task, config, options, Path(directory), f"source {task.name}")


def train_single(
    backbone: Backbone, task: TaskData, options: TrainOptions, directory: str | Path, *,
    rank: int = 64,
) -> dict:  # fmt: skip
    """The comparison: one low-rank adapter per layer and a prompt, trained on the target alone."""
    config = PemtConfig(
        target=task.name,
        stage=1,
        source_rank=rank,
        description=task.description,
        prompt_length=task.prompt_length,
    )
    label = f"single adapter {task.name}"
    return train_method(backbone, task, config, options, Path(directory), label)


def train_target(
    backbone: Backbone,
    task: TaskData,
    sources: Sequence[str | Path],
    options: TrainOptions,
    directory: str | Path,
    *,
    kind: str = "lora",
    target_reduction: int = 16,
    aux_weight: float = 0.1,
    published: bool = False,
) -> dict:
    """Stage 2: adapt to a target with the frozen sources.

    Args:
        backbone: The frozen T5.
        task: The target.
        sources: Directories that `train_source` wrote, in the order of the gate.
        options: Optimisation.
        directory: The run directory.
        kind: What the sources are, see `PemtConfig.source_kind`.
        target_reduction: See `PemtConfig`.
        aux_weight: Weight of the Task Sparsity Loss.
        published: See `PemtConfig`.
    """
    config = PemtConfig(
        sources=[str(s) for s in sources],
        target=task.name,
        source_kind=kind,
        target_reduction=target_reduction,
        aux_weight=aux_weight,
        published=published,
        description=task.description,
        prompt_length=task.prompt_length,
    )
    return train_method(backbone, task, config, options, Path(directory), f"PEMT {task.name}")


def score_untouched(backbone: Backbone, task: TaskData, options: TrainOptions) -> dict[str, float]:
    """Scores of the T5 without any adapter on the test part."""
    rows = encode(task.splits, backbone.tokenizer, options.for_task(task.metrics, stage=2))
    texts = predict(
        backbone.make(),
        backbone.tokenizer,
        rows[2],
        batch_size=options.eval_batch_size,
        max_length=generation_length(rows),
    )
    return compute(task.metrics, texts, list(task.splits.test))
