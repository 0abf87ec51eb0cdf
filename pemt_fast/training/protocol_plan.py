# SPDX-License-Identifier: Apache-2.0
"""What `pemt-fast protocol` trains: the published settings as a list of runs, kept in `plan.json`.

    sources/<task>                            stage 1, one run per source, needs nothing
    <method>/<shots>/<task>/seed<seed>        on a target; methods of stage 2 need all sources
    plain/<task>                              scores of the T5 without adapters

Settings are those of the released scripts (github JachinLin2022/PEMT, run_pemt_stage1.sh,
run_pemt_stage2.sh, run_pemt_stage2_few_shot.sh); `docs/protocol.md` says what is not known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from pemt_fast.data import SOURCE_TASKS, TARGET_TASKS, LabelStyle, Prefix, Task, get_task
from pemt_fast.training.fit import write_json
from pemt_fast.training.options import STAGE_ONE, STAGE_TWO, TrainOptions
from pemt_fast.training.protocol_methods import PLAIN, get_method
from pemt_fast.training.run_queue import QUEUE, Run, check_runs

PLAN_FILE = "plan.json"
FORMAT = 1
SOURCE, TARGET, SCORE = "source", "target", "score"

# Fields of a request that may grow in a directory.
_GROWING = ("targets", "methods", "seeds", "shots")


@dataclass(frozen=True)
class ProtocolRequest:
    """What to train; None stands for the published value of the task.

    Attributes:
        model: Directory or hub name of a T5.
        sources: Source tasks, in the order of the gate.
        targets: Target tasks.
        methods: Names of `METHODS`.
        seeds: Of training on the targets.
        shots: Target examples per class; None: the whole training part.
        data_dir: Folder of JSONL data sets; None: the hub.
        source_kind, source_rank, target_reduction, aux_weight, published: See `PemtConfig`.
        source_lr, source_epochs, source_batch_size: Of stage 1.
        source_steps: Updates instead of epochs.
        source_warmup: Updates of warm-up in stage 1; None: 500, with `source_steps` a tenth of them
            at most.
        source_seed: Seed of stage 1.
        target_lr, target_epochs, target_batch_size, target_steps: Of the targets.
        rates: Learning rates of single methods.
        eval_every: Updates between evaluations; None: once per epoch.
        eval_batch_size: Sequences per generation batch.
        max_source_length: Tokens of a text.
        limit_train: Examples of a source, and of a target without `shots`, at most.
        limit_eval: Validation and test examples at most.
        data_seed: Of splits and few-shot draws.
        label_style, prefix: How rows become text, see `load_splits`.
        bf16, gradient_checkpointing: See `TrainOptions`.
    """

    model: str
    sources: Sequence[str] = SOURCE_TASKS
    targets: Sequence[str] = TARGET_TASKS
    methods: Sequence[str] = ("pemt", "single", PLAIN)
    seeds: Sequence[int] = (1, 2, 3)
    shots: Sequence[int | None] = (4, 16, 32)
    data_dir: str | None = None
    source_kind: str = "lora"
    source_rank: int = 64
    target_reduction: int = 16
    aux_weight: float = 0.1
    published: bool = False
    source_lr: float = STAGE_ONE.learning_rate
    source_epochs: float | None = None
    source_steps: int | None = None
    source_warmup: int | None = None
    source_batch_size: int | None = None
    source_seed: int = STAGE_ONE.seed
    target_lr: float = STAGE_TWO.learning_rate
    target_epochs: float | None = None
    target_steps: int | None = None
    target_batch_size: int | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    eval_every: int | None = None
    eval_batch_size: int = 128
    max_source_length: int | None = None
    limit_train: int | None = None
    limit_eval: int | None = None
    data_seed: int = 42
    label_style: LabelStyle = "name"
    prefix: Prefix = "none"
    bf16: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("sources", "targets"):
            object.__setattr__(self, name, tuple(get_task(n).name for n in getattr(self, name)))
        for name in ("sources", *_GROWING):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must name different ones, at least one, got {values}")
        for method in (*self.methods, *self.rates):
            get_method(method)
        for shots in self.shots:
            if shots is not None and shots < 1:
                raise ValueError(f"shots must be at least 1, or None for all data, got {shots}")
        for name in ("limit_train", "limit_eval"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def pemt_settings(self) -> dict[str, Any]:
        """Fields of `PemtConfig` that all rows of PEMT share."""
        names = ("source_kind", "source_rank", "target_reduction", "aux_weight", "published")
        return {name: getattr(self, name) for name in names}


def source_options(request: ProtocolRequest, task: Task) -> TrainOptions:
    """Optimisation of stage 1."""
    warmup = request.source_warmup
    if warmup is None:
        warmup = STAGE_ONE.warmup_steps
        if request.source_steps is not None:
            warmup = min(warmup, request.source_steps // 10)
    return TrainOptions(
        learning_rate=request.source_lr,
        steps=request.source_steps,
        epochs=request.source_epochs,
        warmup_steps=warmup,
        batch_size=request.source_batch_size,
        seed=request.source_seed,
        **_common(request),
    ).for_task(task, stage=1)


def target_options(
    request: ProtocolRequest, task: Task, method: str, shots: int | None, seed: int
) -> TrainOptions:
    """Optimisation of a method on a target; with few shots the batch size is their number."""
    rate = request.rates.get(method) or get_method(method).learning_rate or request.target_lr
    return TrainOptions(
        learning_rate=rate,
        steps=request.target_steps,
        epochs=request.target_epochs,
        batch_size=request.target_batch_size,
        seed=seed,
        **_common(request),
    ).for_task(task, stage=2, few_shot=shots)


def _common(request: ProtocolRequest) -> dict[str, Any]:
    return {
        "max_source_length": request.max_source_length,
        "eval_every": request.eval_every, "eval_batch_size": request.eval_batch_size,
        "bf16": request.bf16, "gradient_checkpointing": request.gradient_checkpointing,
        "progress": False,
    }  # fmt: skip


def source_name(task: str) -> str:
    """Name of a source's run."""
    return f"sources/{task}"


def target_name(method: str, task: str, shots: int | None = None, seed: int | None = None) -> str:
    """Name of a run on a target; the plain model has neither shots nor seed."""
    if method == PLAIN:
        return f"{PLAIN}/{task}"
    return f"{method}/{shots_name(shots)}/{task}/seed{seed}"


def shots_name(shots: int | None) -> str:
    """`16-shot`, or `all`."""
    return "all" if shots is None else f"{shots}-shot"


def make_runs(request: ProtocolRequest) -> list[Run]:
    """All runs: sources, then seed by seed what makes a table complete."""
    sources = tuple(source_name(name) for name in request.sources)
    runs, asked = [], dict[str, Any]()
    for name in request.sources:
        asked = {
            "task": name, "shots": None, "options": asdict(source_options(request, get_task(name))),
        }  # fmt: skip
        runs.append(Run(source_name(name), SOURCE, asked))
    if PLAIN in request.methods:
        for name in request.targets:
            # Any shots would do: they change the training part, which is not used.
            options = target_options(request, get_task(name), PLAIN, None, seed=1)
            asked = {"task": name, "shots": None, "options": asdict(options)}
            runs.append(Run(target_name(PLAIN, name), SCORE, asked))
    trained = [name for name in request.methods if name != PLAIN]
    for seed in request.seeds:
        for shots in request.shots:
            for name in request.targets:
                for method in trained:
                    options = target_options(request, get_task(name), method, shots, seed)
                    asked = {
                        "task": name, "shots": shots, "method": method, "options": asdict(options),
                    }  # fmt: skip
                    needs = sources if get_method(method).stage == 2 else ()
                    runs.append(Run(target_name(method, name, shots, seed), TARGET, asked, needs))
    check_runs(runs)
    return runs


@dataclass(frozen=True)
class Plan:
    """What `plan.json` holds.

    Attributes:
        request: What was asked for.
        runs: What that means.
        updates: Updates of each run by its name, for estimates.
    """

    request: ProtocolRequest
    runs: tuple[Run, ...]
    updates: Mapping[str, int]


def read_plan(folder: Path) -> Plan | None:
    """The plan of a directory; None if it has none.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged") from error
    known = {f.name for f in fields(ProtocolRequest)}
    if values.get("format") != FORMAT or values["request"].keys() - known:
        raise ValueError(f"{path}: expected format {FORMAT}; written by another version?")
    runs = tuple(Run(**{**run, "needs": tuple(run["needs"])}) for run in values["runs"])
    return Plan(ProtocolRequest(**values["request"]), runs, values["updates"])


def require_plan(folder: Path) -> Plan:
    """The plan of a directory.

    Raises:
        FileNotFoundError: it has none.
    """
    if (plan := read_plan(folder)) is None:
        raise FileNotFoundError(f"{folder} holds no {PLAN_FILE}: say what to train")
    return plan


def write_plan(folder: Path, plan: Plan) -> None:
    """Write a plan; what the directory has planned already must stay as it is.

    Raises:
        ValueError: it holds another plan; the message says what differs.
    """
    (folder / QUEUE).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / QUEUE / "plan.lock"):
        if (old := read_plan(folder)) is not None:
            require_extension(folder, old, plan)
        values = {
            "format": FORMAT, "request": asdict(plan.request),
            "runs": [asdict(run) for run in plan.runs], "updates": dict(plan.updates),
        }  # fmt: skip
        write_json(folder / PLAN_FILE, values)


def require_extension(folder: Path, old: Plan, new: Plan) -> None:
    """Raise unless `new` is `old`, or adds targets, methods, seeds or shots to it."""
    before, now = _plain(asdict(old.request)), _plain(asdict(new.request))
    differ = []
    for name, value in before.items():
        if name in _GROWING:
            if missing := [v for v in value if v not in now[name]]:
                differ.append(f"{name} has {missing} there, which are not asked for")
        elif value != now[name]:
            differ.append(f"{name} is {value!r} there, got {now[name]!r}")
    requests = {run.name: run for run in new.runs}
    if not differ:
        # Only if another version of this package has other published values.
        differ = [
            f"{run.name} has other settings there"
            for run in old.runs
            if _plain(asdict(run)) != _plain(asdict(requests[run.name]))
        ][:3]
    if differ:
        raise ValueError(
            f"{folder / PLAN_FILE} holds another plan: {'; '.join(differ)}. Targets, methods, "
            "seeds and shots can be added to a plan; for anything else choose another directory"
        )


def _plain(values: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(values))


def updates_of(run: Run, examples: int) -> int:
    """Updates of a run on so many training examples; 0 where nothing is trained."""
    options = run.request["options"]
    if run.kind == SCORE:
        return 0
    if options["steps"] is not None:
        return options["steps"]
    return math.ceil(math.ceil(examples / options["batch_size"]) * options["epochs"])


def options_of(run: Run, *, progress: bool) -> TrainOptions:
    """Optimisation of a run."""
    return replace(TrainOptions(**run.request["options"]), progress=progress)
