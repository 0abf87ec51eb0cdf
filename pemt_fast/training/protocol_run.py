# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast protocol`: checks a plan, then works it off with one or several processes.

`protocol_plan.py` says what is trained, `run_queue.py` who trains it, `protocol_report.py` what
came out. Everything that can be wrong with names, files, labels, lengths or settings is found
before `plan.json` is written.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

import torch

from pemt_fast.attach import get_model
from pemt_fast.methods.pemt_config import PemtConfig
from pemt_fast.methods.task_config import TaskConfig
from pemt_fast.training.fit import environment, finish
from pemt_fast.training.protocol_methods import get_method, method_config
from pemt_fast.training.protocol_plan import (
    SCORE,
    SOURCE,
    TARGET,
    Plan,
    ProtocolRequest,
    make_runs,
    options_of,
    read_plan,
    require_extension,
    require_plan,
    updates_of,
    write_plan,
)
from pemt_fast.training.protocol_report import write_report
from pemt_fast.training.run import TrainRequest, check_task, load_backbone, load_task
from pemt_fast.training.run_queue import Run, RunQueue, State, work
from pemt_fast.training.stages import Backbone, TaskData, score_untouched, train_method

Report = Callable[[str], object]


def make_plan(request: ProtocolRequest, folder: Path) -> Plan:
    """The plan of a request; nothing is written. What was planned before is not checked again.

    Raises:
        ValueError: something about the request or its data does not fit, or the directory holds
            another plan.
        FileNotFoundError: there is no such model.
    """
    runs = make_runs(request)
    old = read_plan(folder)
    plan = Plan(request, tuple(runs), {} if old is None else old.updates)
    if old is not None:
        require_extension(folder, old, plan)
    new = [run for run in runs if run.name not in plan.updates]
    return Plan(request, tuple(runs), {**plan.updates, **_check(request, new)}) if new else plan


def _check(request: ProtocolRequest, runs: Sequence[Run]) -> dict[str, int]:
    """Try everything that runs need except training; returns their updates."""
    make, tokenizer = load_backbone(request.model)
    backbone = Backbone(make, tokenizer, request.model)
    sources = [f"source-{i}" for i in range(len(request.sources))]
    _check_method(backbone, "sources", _source_config(request, "t", "t"))
    for name in request.methods:
        if (method := get_method(name)).stage:
            config = method_config(method, "t", "t", sources, **request.pemt_settings)
            _check_method(backbone, name, config)
    sizes: dict[tuple[str, int | None, bool], int] = {}
    wrong: dict[str, str] = {}
    for run in runs:
        key = (run.request["task"], run.request["shots"], run.kind == SOURCE)
        if key in sizes or run.request["task"] in wrong:
            continue
        try:
            sizes[key] = _check_task(request, run, backbone)
        except (ValueError, FileNotFoundError) as error:
            wrong[run.request["task"]] = str(error)
    if wrong:
        raise ValueError("\n".join(f"{name}: {text}" for name, text in wrong.items()))
    return {
        run.name: updates_of(
            run, sizes[run.request["task"], run.request["shots"], run.kind == SOURCE]
        )
        for run in runs
    }


def _check_method(backbone: Backbone, name: str, config: Any) -> None:
    try:
        get_model(backbone.make(), config, backbone.tokenizer).unload()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_task(request: ProtocolRequest, run: Run, backbone: Backbone) -> int:
    """Number of training examples."""
    task = _load(request, run)
    check_task(task, options_of(run, progress=False), backbone.tokenizer, backbone.make())
    return len(task.splits.train)


def _load(request: ProtocolRequest, run: Run) -> TaskData:
    shots = run.request["shots"]
    asked = TrainRequest(
        request.model, request.sources, data_dir=request.data_dir, limit_eval=request.limit_eval,
        data_seed=request.data_seed, label_style=request.label_style, prefix=request.prefix,
    )  # fmt: skip
    return load_task(
        run.request["task"], asked, few_shot=shots,
        limit_train=request.limit_train if shots is None else None,
    )  # fmt: skip


def _source_config(request: ProtocolRequest, task: str, description: str) -> PemtConfig:
    return PemtConfig(
        target=task, stage=1, source_rank=request.source_rank, source_kind=request.source_kind,
        published=request.published, description=description,
    )  # fmt: skip


def train_run(folder: Path, plan: Plan, run: Run, *, progress: bool = False) -> dict:
    """Train or score one run of a plan; its directory holds `results.json` afterwards."""
    request, directory = plan.request, folder / run.name
    make, tokenizer = _backbone(request.model)
    backbone = Backbone(make, tokenizer, request.model)
    task, options = _load(request, run), options_of(run, progress=progress)
    if run.kind == SCORE:
        directory.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            make().to("cuda")
        started = time.perf_counter()
        scores = score_untouched(backbone, task, options)
        return finish(directory, {
            "label": f"plain model {task.name}", "test": scores,
            "examples": {"test": len(task.splits.test)}, "trainable_parameters": 0,
            "seconds": round(time.perf_counter() - started, 1), "environment": environment(),
        })  # fmt: skip
    config: PemtConfig | TaskConfig
    if run.kind == SOURCE:
        config, label = _source_config(request, task.name, task.description), "source"
    else:
        assert run.kind == TARGET, run.kind
        method = get_method(run.request["method"])
        sources, label = [str(folder / name) for name in run.needs], method.title
        config = method_config(
            method, task.name, task.description, sources, **request.pemt_settings
        )
    return train_method(backbone, task, config, options, directory, f"{label} {task.name}")


# One T5 per process; runs take their adapters off again.
_backbone = cache(load_backbone)


def run_protocol(
    directory: str | os.PathLike[str],
    request: ProtocolRequest | None = None,
    *,
    workers: int = 1,
    threads: int | None = None,
    join: bool = False,
    report: Report = lambda line: None,
) -> dict:
    """Train what is not trained yet; the tables are written after each run.

    Args:
        directory: The output.
        request: What to train; None: what its `plan.json` says.
        workers: Processes on this machine, each with a GPU of its own where there are as many.
        threads: Of each worker; None: all cores shared out evenly, torch's own for one worker.
        join: Only add workers: failed runs stay failed.
        report: Called with a line per run.

    Returns:
        What `results.json` holds; its `runs` say what failed and what was not run.

    Raises:
        ValueError: see `make_plan`; or a count is not positive.
        FileNotFoundError: `request` is None and there is no plan.
    """
    folder = Path(directory).resolve()
    for name, count in (("workers", workers), ("threads", threads)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if request is not None:
        write_plan(folder, make_plan(request, folder))
    else:
        require_plan(folder)
    queue = open_queue(folder)
    if not join:
        for name in queue.retry():
            report(f"{name}: failed before, tried again")
    write_report(folder)
    if workers == 1 and torch.cuda.device_count() < 2:
        if threads is not None:
            torch.set_num_threads(threads)
        _work(folder, report, progress=sys.stderr.isatty())
    elif any(state is not State.done for state in queue.states().values()):
        _start_workers(folder, workers, threads, report)
    return write_report(folder)


def open_queue(folder: Path) -> RunQueue:
    """The runs of a directory that has a plan."""
    return RunQueue(folder, lambda: require_plan(folder).runs)


def _work(folder: Path, report: Report, *, progress: bool = False) -> None:
    def train(run: Run) -> None:
        train_run(folder, require_plan(folder), run, progress=progress)

    work(open_queue(folder), train, report=report, after=lambda: write_report(folder))


# --- several processes ---------------------------------------------------------------------------


def _start_workers(folder: Path, workers: int, threads: int | None, report: Report) -> None:
    """Start workers and wait for them."""
    threads = threads or max(_cores() // workers, 1)
    gpus = _gpus()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=_worker, name=f"worker {i + 1}",
            args=(folder, i + 1, threads, gpus[i % len(gpus)] if gpus else None),
        )
        for i in range(workers)
    ]  # fmt: skip
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in wait(list(running)):
                process = running.pop(cast(int, sentinel))
                process.join()
                if process.exitcode:
                    report(f"{process.name} ended with exit code {process.exitcode}")
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` has to be for each of the GPUs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def _worker(folder: Path, number: int, threads: int, gpu: str | None) -> None:
    """A process of `_start_workers`; ends with the process that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)

    # Not through a queue to the parent: its lock would stay with a worker that is killed.
    def report(line: str) -> None:
        print(f"worker {number}: {line}", flush=True)

    try:
        _work(folder, report)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
