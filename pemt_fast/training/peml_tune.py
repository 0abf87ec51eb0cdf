# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast tune-peml`: PEML's sizes and rates for several tasks, by validation scores.

A trial searches its architecture, is scored in the middle and at the end of it, and may end there
(pruned); then it trains anew with what was found and is scored again: that is its value. The best
values are searched, trained and tested as `pemt-fast multitask` does it. The study is a file in the
run directory: the same command goes on after a kill, and several share the trials.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, set_seed

from pemt_fast.attach import get_model
from pemt_fast.data import LabelStyle, Prefix, Task, get_task
from pemt_fast.data.rows import Sources
from pemt_fast.data.style import require_style
from pemt_fast.methods.peml import PemlConfig
from pemt_fast.training.fit import environment, generation_length, write_json
from pemt_fast.training.hyper_search import HyperResult, HyperSpace, search_hyper_parameters
from pemt_fast.training.multi_task import train_mixture
from pemt_fast.training.multi_task_data import (
    common,
    encode_tasks,
    load_tasks,
    require_different,
    score_tasks,
    trainer_data,
)
from pemt_fast.training.multi_task_report import SCORE, means
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.peml_run import search_prefix
from pemt_fast.training.run import load_backbone
from pemt_fast.training.stages import Backbone, TaskData
from pemt_fast.training.trainer import AdapterTrainer

STUDY_FILE, REQUEST_FILE, RESULT_FILE = "study.log", "request.json", "tuning.json"
# Steps of a trial's reports; the first one never ends it.
_HALF, _SEARCHED = 0, 1


@dataclass(frozen=True, kw_only=True)
class PemlTuneRequest:
    """What to tune; see `pemt-fast tune-peml --help`.

    Attributes:
        model: Directory or hub name of a T5.
        tasks: Tasks that are trained together, names or `Task` objects.
        space: What is tried; of its values `r` sets α = r as well.
        trials: Complete and pruned ones.
        data_dir: Folder of JSONL data sets; a mapping from a task's name to its own folder or to
            its rows by split (see `load_rows`); None: the hub.
        target_modules: As in `LinearConfig`.
        temperature: Of the task sampling.
        options: Optimisation; the learning rate is the space's.
        limit_train: Examples of a task at most.
        limit_eval: Validation and test examples of a task at most.
        data_seed: Seed of the splits.
        seeds: Of the runs with the best values; trials have the first one.
        label_style: As in `MultiTaskRequest`.
        prefix: As in `MultiTaskRequest`.
    """

    model: str
    tasks: Sequence[str | Task]
    space: HyperSpace = field(default_factory=HyperSpace)
    trials: int = 20
    data_dir: Sources = None
    target_modules: str | Sequence[str] | None = None
    temperature: float = 2.0
    options: TrainOptions = field(default_factory=TrainOptions)
    limit_train: int | None = None
    limit_eval: int | None = None
    data_seed: int = 42
    seeds: Sequence[int] = (1, 2, 3)
    label_style: LabelStyle = "name"
    prefix: Prefix = "colon"


def tune_peml(
    request: PemlTuneRequest,
    directory: str | os.PathLike[str],
    *,
    only_trials: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Run the trials that are missing, then train and test the best; writes `tuning.json`.

    Args:
        request: What to tune.
        directory: The study, and `best/seed<seed>`.
        only_trials: Stop after the trials, as further processes of the same study should.
        report: Called with a line per trial and run.

    Raises:
        ImportError: optuna is not installed.
        ValueError: an argument does not fit, or the study is of another space or seed.
        RuntimeError: no trial was complete.
    """
    require_style(request.label_style, request.prefix)
    names = [get_task(name).name for name in request.tasks]
    require_different(tasks=names, seeds=request.seeds)
    make, tokenizer = load_backbone(request.model)
    tasks = load_tasks(
        request.tasks, request.data_dir, seed=request.data_seed, limit_train=request.limit_train,
        limit_eval=request.limit_eval, label_style=request.label_style,
    )  # fmt: skip
    trials = _Trials(Backbone(make, tokenizer, request.model), tasks, request)
    folder = Path(directory)
    _claim(folder, request, names)
    found = search_hyper_parameters(
        trials.run, request.space, storage=folder / STUDY_FILE, name="peml",
        trials=request.trials, seed=request.seeds[0], report=report,
    )  # fmt: skip
    runs = [] if only_trials else _best_runs(found, trials, folder, report)
    result = {
        "tasks": names, "space": request.space.to_dict(), "study": found.to_dict(),
        "options": asdict(request.options), "runs": runs, "means": means(runs),
        "environment": environment(),
    }  # fmt: skip
    if not only_trials:
        write_json(folder / RESULT_FILE, result)
    return result


def _claim(folder: Path, request: PemlTuneRequest, names: Sequence[str]) -> None:
    """Say what the study in a folder is of: scores of anything else may not join it."""
    known = [get_task(task) for task in request.tasks]
    lengths = {t.name: request.options.max_source_length or t.max_source_length for t in known}
    options = asdict(request.options) | {"max_source_length": common(lengths)}
    for changing in ("progress", "workers", "learning_rate", "seed"):
        del options[changing]
    own = {
        "model": request.model, "tasks": list(names), "options": options,
        "target_modules": request.target_modules, "temperature": request.temperature,
        "limit_train": request.limit_train, "limit_eval": request.limit_eval,
        "data_seed": request.data_seed, "seed": request.seeds[0],
        "label_style": request.label_style, "prefix": request.prefix,
    }  # fmt: skip
    path = folder / REQUEST_FILE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, own)
    # Studies of earlier versions do not say: they had no other style and prefix.
    before = {"label_style": "name", "prefix": "colon"} | json.loads(path.read_text())
    if other := [name for name, value in own.items() if before.get(name) != _plain(value)]:
        raise ValueError(
            f"{folder}: holds a study with another value of {other[0]}: {before.get(other[0])}, "
            f"not {own[other[0]]}; choose another output directory or remove it"
        )


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))


def _best_runs(
    found: HyperResult, trials: _Trials, folder: Path, report: Callable[[str], object]
) -> list[dict[str, Any]]:
    config, options = trials.applied(found.best_values)
    runs = []
    for seed in trials.request.seeds:
        report(f"best values, seed {seed}")
        runs.append(
            train_mixture(
                trials.backbone, trials.tasks, config, replace(options, seed=seed),
                folder / "best" / f"seed{seed}", temperature=trials.request.temperature,
                label=f"tuned peml, seed {seed}", prefix=trials.request.prefix,
            )
        )  # fmt: skip
    return runs


class _Scores(TrainerCallback):
    """Reports what the mixture of a search scores."""

    def __init__(self, score: Callable[[Any], float], report: Callable[[int, float], None]) -> None:
        self.score = score
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In the middle."""
        if state.global_step == state.max_steps // 2:
            self.report(_HALF, self.score(kwargs["model"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end."""
        self.report(_SEARCHED, self.score(kwargs["model"]))


class _Trials:
    """What all trials share."""

    def __init__(
        self, backbone: Backbone, tasks: dict[str, TaskData], request: PemlTuneRequest
    ) -> None:
        self.backbone = backbone
        self.tasks = tasks
        self.request = request
        self.train, self.validation = encode_tasks(
            tasks, backbone.tokenizer, request.options, "validation", prefix=request.prefix
        )
        self.length = generation_length([self.train, *self.validation.values()])

    def applied(self, values: dict[str, Any]) -> tuple[PemlConfig, TrainOptions]:
        """The config and the options with a trial's values."""
        known = {f.name for f in fields(PemlConfig)}
        config = PemlConfig(
            num_tasks=len(self.tasks), task_names=tuple(self.tasks),
            target_modules=self.request.target_modules, alpha=float(values["r"]),
            **{name: value for name, value in values.items() if name in known},
        )  # fmt: skip
        options = replace(
            self.request.options, learning_rate=values["learning_rate"], seed=self.request.seeds[0]
        )
        return config, options

    def run(self, values: dict[str, Any], report: Callable[[int, float], None]) -> float:
        """The mean validation score of values: an objective of `search_hyper_parameters`."""
        config, options = self.applied(values)
        data = trainer_data(self.train, self.backbone.tokenizer, self.request.temperature)
        with tempfile.TemporaryDirectory() as folder:  # trainers want one, nothing is saved
            arguments = options.arguments(Path(folder), self.length, evaluates=False, saves=False)
            return self._trained(config, arguments, data, report)

    def _trained(
        self,
        config: PemlConfig,
        arguments: Any,
        data: dict[str, Any],
        report: Callable[[int, float], None],
    ) -> float:
        if config.searches:
            config, _ = search_prefix(
                self.backbone, config, arguments, None,
                callbacks=[_Scores(self.score, report)], **data,
            )  # fmt: skip
        set_seed(arguments.seed)
        model: Any = get_model(self.backbone.make(), config, self.backbone.tokenizer)
        try:
            trainer = AdapterTrainer(model=model, args=arguments, **data)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            return self.score(model)
        finally:
            model.unload()

    def score(self, model: Any) -> float:
        """Mean over the tasks on their validation part, %."""
        scores = score_tasks(
            model, self.backbone.tokenizer, self.tasks, self.validation, part="validation",
            batch_size=self.request.options.eval_batch_size, max_length=self.length,
        )  # fmt: skip
        return statistics.mean(own[SCORE] for own in scores.values())
