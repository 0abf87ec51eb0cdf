# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast multitask`: one model for several tasks, by several methods, at equal size.

All methods get the same number of hidden units per adapted layer, or, where that is not what they
are made of, as many trained parameters as LoRA (`multi_task_methods.py`); the same scale α / r = 1,
rates, batches and steps. There is no validation: the last weights are tested. A finished run is
skipped, so the same command continues after a kill. `multi_task_report.py` makes the table and the
picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import set_seed

from pemt_fast.attach import get_model
from pemt_fast.data import LabelStyle, Prefix, Task, get_task
from pemt_fast.data.rows import Sources
from pemt_fast.data.style import require_style
from pemt_fast.methods.peml import PemlConfig
from pemt_fast.methods.task_config import TaskConfig
from pemt_fast.training.fit import (
    CHECKPOINTS,
    begin,
    environment,
    finish,
    finished,
    generation_length,
    write_json,
)
from pemt_fast.training.multi_task_data import (
    common,
    encode_tasks,
    load_tasks,
    require_different,
    score_tasks,
    source_length,
    trainer_data,
)
from pemt_fast.training.multi_task_methods import (
    COMMON,
    RANK,
    SIZED,
    SPECIFIC,
    config_of,
    rate_of,
    sized,
    trained,
    with_settings,
)
from pemt_fast.training.multi_task_report import (
    allocation,
    majority,
    save_allocation,
    write_summary,
)
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.peml_run import search_prefix
from pemt_fast.training.run import load_backbone
from pemt_fast.training.stages import Backbone, TaskData
from pemt_fast.training.trainer import AdapterTrainer, last_complete_checkpoint


@dataclass(frozen=True)
class MultiTaskRequest:
    """What to train; see `pemt-fast multitask --help`.

    Attributes:
        model: Directory or hub name of a T5.
        tasks: Tasks that are trained together, names or `Task` objects.
        methods: Names of `config_of`.
        data_dir: Folder of JSONL data sets; a mapping from a task's name to its own folder or to
            its rows by split (see `load_rows`); None: the hub.
        units: Hidden units per adapted layer; None: C-Poly's published sizes.
        target_modules: As in `LinearConfig`.
        seeds: One run per method and seed.
        temperature: Of the task sampling.
        options: Optimisation; the seed is that of the run.
        limit_train: Examples of a task at most.
        limit_eval: Test examples of a task at most.
        data_seed: Seed of the splits.
        settings: Fields of the methods' configs and their values.
        architecture_share: Part of the training rows that PEML's search trains the architecture on
            and nothing else (bi-level); 0: both on all of them.
        label_style: How labels are written, see `pemt_fast.data.style`.
        prefix: What stands in front of the sources, see `pemt_fast.data.style`.
    """

    model: str
    tasks: Sequence[str | Task]
    methods: Sequence[str] = ("lora", "moe_lora", "poly", "mhr", "c_poly")
    data_dir: Sources = None
    units: int | None = None
    target_modules: str | Sequence[str] | None = None
    seeds: Sequence[int] = (1, 2, 3)
    temperature: float = 2.0
    options: TrainOptions = field(default_factory=TrainOptions)
    limit_train: int | None = None
    limit_eval: int | None = None
    data_seed: int = 42
    settings: Mapping[str, Any] = field(default_factory=dict)
    architecture_share: float = 0.0
    label_style: LabelStyle = "name"
    prefix: Prefix = "colon"


def train_mixture(
    backbone: Backbone,
    tasks: Mapping[str, TaskData],
    config: TaskConfig,
    options: TrainOptions,
    directory: str | os.PathLike[str],
    *,
    temperature: float,
    label: str,
    budget: int | None = None,
    architecture_share: float = 0.0,
    prefix: Prefix = "colon",
) -> dict:
    """Train one model on all tasks and test it on each; skipped where it is finished already.

    Args:
        backbone: The frozen T5.
        tasks: By name, in the order of `task_ids`.
        config: The method.
        options: Optimisation.
        directory: The run directory: adapters and `results.json`.
        temperature: Of the task sampling, see `TaskSampler`.
        label: What is being trained, for results.
        budget: Choose the rank for so many trained parameters; None: that of the config. PEML
            first searches its architecture, then trains anew with what was found.
        architecture_share: As in `MultiTaskRequest`.
        prefix: As in `MultiTaskRequest`; the tasks' sources must have none.
    """
    folder = Path(directory)
    lengths = common({n: source_length(t, options) for n, t in tasks.items()})
    recorded = asdict(options) | {"max_source_length": lengths}
    request = {
        "backbone": backbone.name, "tasks": {n: len(t.splits.train) for n, t in tasks.items()},
        "config": config.to_dict(), "temperature": temperature,
        "options": {k: v for k, v in recorded.items() if k not in ("progress", "workers")},
        "label_style": common({n: t.label_style for n, t in tasks.items()}), "prefix": prefix,
        "data": {n: t.splits.digest() for n, t in tasks.items()},
    }  # fmt: skip
    if budget is not None:
        request["budget"] = budget
    if architecture_share:
        request["architecture_share"] = architecture_share
    # Earlier versions did not say which data it was: taken to be the same.
    earlier = {"label_style": "name", "prefix": "colon", "data": request["data"]}
    if (results := finished(folder, request, unrecorded=earlier)) is not None:
        return results
    tokenizer = backbone.tokenizer
    train, test = encode_tasks(tasks, tokenizer, options, prefix=prefix)
    length = generation_length([train, *test.values()])
    arguments = options.arguments(folder / CHECKPOINTS, length, evaluates=False)
    data = trainer_data(train, tokenizer, temperature)
    trained(config, backbone.make())  # nothing is written for what does not fit the model
    begin(folder, request)
    search = None
    if isinstance(config, PemlConfig) and config.searches:
        config, search = search_prefix(
            backbone, config, arguments, folder / "search", budget=budget,
            architecture_share=architecture_share, **data,
        )  # fmt: skip
    if budget is not None:
        config = sized(config, backbone.make(), budget)
    set_seed(options.seed)
    model: Any = get_model(backbone.make(), config, tokenizer)
    try:
        trainer = AdapterTrainer(model=model, args=arguments, **data)
        trainer.remove_callback(transformers.PrinterCallback)
        seconds = trainer.train_from(last_complete_checkpoint(folder / CHECKPOINTS))
        scores = score_tasks(
            model, tokenizer, tasks, test, batch_size=options.eval_batch_size, max_length=length
        )
        model.save_pretrained(folder)
        results = {
            "label": label, "method": config.method, "seed": options.seed, "scores": scores,
            "steps": trainer.state.global_step, "seconds": round(seconds, 1),
            "trainable_parameters": model.count_parameters()[0],
            "allocation": allocation(model), "request": request, "environment": environment(),
        }  # fmt: skip
        if search is not None:
            results["search"] = search
        return finish(folder, results)
    finally:
        model.unload()


def run_multi_task(
    request: MultiTaskRequest,
    directory: str | os.PathLike[str],
    *,
    report: Callable[[str], object] = lambda line: None,
) -> dict:
    """Train what is not trained yet; write `summary.json`, `summary.md` and `allocation.png`.

    Args:
        request: What to train.
        directory: Runs go to `<method>/seed<seed>` below it.
        report: Called with a line per run.

    Raises:
        ValueError: a name, a count or a label does not fit; before anything is trained.
    """
    require_style(request.label_style, request.prefix)
    names = [get_task(name).name for name in request.tasks]
    require_different(tasks=names, methods=request.methods, seeds=request.seeds)
    units = request.units or (COMMON + SPECIFIC * len(names)) * RANK
    configs = {
        method: with_settings(
            config_of(method, names, units, target_modules=request.target_modules),
            request.settings,
        )
        for method in request.methods
    }
    if not 0 <= request.architecture_share < 1:
        raise ValueError(
            f"architecture_share must be from 0 to below 1, got {request.architecture_share}"
        )
    make, tokenizer = load_backbone(request.model)
    tasks = load_tasks(
        request.tasks, request.data_dir, seed=request.data_seed, limit_train=request.limit_train,
        limit_eval=request.limit_eval, label_style=request.label_style,
    )  # fmt: skip
    backbone = Backbone(make, tokenizer, request.model)
    folder, budget = Path(directory), None
    if SIZED & configs.keys():
        lora = config_of("lora", names, units, target_modules=request.target_modules)
        budget = trained(lora, make())
    runs: dict[str, list[dict]] = {method: [] for method in configs}
    for seed in request.seeds:
        options = TrainOptions(**{**asdict(request.options), "seed": seed})
        for method, config in configs.items():
            report(f"{method}, seed {seed}")
            own = replace(options, learning_rate=rate_of(method, options.learning_rate))
            runs[method].append(
                train_mixture(
                    backbone,
                    tasks,
                    config,
                    own,
                    folder / method / f"seed{seed}",
                    temperature=request.temperature,
                    label=f"{method}, seed {seed}",
                    budget=budget if method in SIZED else None,
                    architecture_share=request.architecture_share,
                    prefix=request.prefix,
                )
            )
    summary = {
        "tasks": {
            name: {
                "train": len(task.splits.train), "test": len(task.splits.test),
                "majority": majority(task),
            }
            for name, task in tasks.items()
        },  # fmt: skip
        "units": units, "temperature": request.temperature,
        "label_style": request.label_style, "prefix": request.prefix,
        "options": asdict(request.options), "runs": runs, "environment": environment(),
    }  # fmt: skip
    write_json(folder / "summary.json", summary)
    write_summary(summary, folder / "summary.md")
    save_allocation(runs, names, folder / "allocation.png")
    return cast(dict, json.loads((folder / "summary.json").read_text()))
