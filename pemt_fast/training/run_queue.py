# SPDX-License-Identifier: Apache-2.0
"""A queue of runs in a directory, worked off by any number of processes that may be killed.

A run is a directory below the output; it is done when that holds `results.json`, which is written
last. Who trains a run holds a lock on `queue/<run>.lock`. It is the kernel's (`flock`, through the
package filelock), so it ends with the process however that ends, and the next worker goes on with
the run's checkpoints. `queue/<run>.json` says who has the run or with what it failed.

Between machines this needs a file system that passes the locks on: NFS 4, Lustre mounted with
`flock`, GPFS, CephFS. Where they hold on each machine alone two of them train the same run; the one
that ends second notices and stops.
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from pemt_fast.training.fit import RESULTS_FILE, tidy, write_json

QUEUE = "queue"
# Between two looks at the runs of others.
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """One run of a plan.

    Attributes:
        name: Its directory below the output.
        kind: What trains it.
        request: JSON-ready settings.
        needs: Names of runs that must be done before; they come earlier in the plan.
    """

    name: str
    kind: str
    request: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


class State(StrEnum):
    """Of a run: `interrupted` was begun by a worker that is no more, `blocked` needs a failed one.

    A worker takes what is waiting or interrupted as soon as what it needs is done.
    """

    done = "done"
    running = "running"
    interrupted = "interrupted"
    waiting = "waiting"
    failed = "failed"
    blocked = "blocked"


_OPEN = (State.waiting, State.interrupted)


def check_runs(runs: Sequence[Run]) -> None:
    """Raise a `ValueError` unless names differ, stay inside the output and needs come first."""
    known: set[str] = set()
    for run in runs:
        parts = Path(run.name).parts
        if not parts or Path(run.name).is_absolute() or ".." in parts or parts[0] == QUEUE:
            raise ValueError(f"a run must be named by a folder inside the output, got {run.name!r}")
        if run.name in known:
            raise ValueError(f"runs must have different names, got {run.name!r} twice")
        if missing := [name for name in run.needs if name not in known]:
            raise ValueError(f"{run.name!r} needs {missing[0]!r}, which is no earlier run")
        known.add(run.name)


class RunQueue:
    """The runs of a directory.

    Args:
        folder: The output.
        load: Returns the runs; asked again at each look, so that a plan may grow meanwhile.
    """

    def __init__(self, folder: Path, load: Callable[[], Sequence[Run]]) -> None:
        self.folder = folder
        self.load = load

    def states(self, runs: Sequence[Run] | None = None) -> dict[str, State]:
        """State by name, in the order of the plan."""
        found: dict[str, State] = {}
        for run in self.load() if runs is None else runs:
            found[run.name] = self._state(run, found)
        return found

    def _state(self, run: Run, others: Mapping[str, State]) -> State:
        if self._done(run.name):
            return State.done
        record = self.record(run.name)
        if record.get("state") == State.failed:
            return State.failed
        if any(others[name] in (State.failed, State.blocked) for name in run.needs):
            return State.blocked
        if record.get("state") != State.running:
            return State.waiting
        if (lock := self._lock(run.name)) is None:
            return State.running
        lock.release()
        return State.interrupted

    def record(self, name: str) -> dict[str, Any]:
        """What is known of the last attempt at a run; empty if there was none."""
        try:
            return json.loads(self._path(name, ".json").read_text())
        except FileNotFoundError:
            return {}

    def retry(self) -> list[str]:
        """Let failed runs wait again; returns their names. Also tidies up after killed workers."""
        runs = self.load()
        failed = [name for name, state in self.states(runs).items() if state is State.failed]
        for name in failed:
            self._path(name, ".json").unlink(missing_ok=True)
        for run in runs:
            if self._done(run.name) and (lock := self._lock(run.name)) is not None:
                tidy(self.folder / run.name)
                lock.release()
        return failed

    def claim(self) -> tuple[Claim | None, bool]:
        """The first run that can be trained now, and whether there is something to wait for."""
        runs = self.load()
        states = self.states(runs)
        ready = [
            run
            for run in runs
            if states[run.name] in _OPEN and all(states[n] is State.done for n in run.needs)
        ]
        for run in ready:
            if (lock := self._lock(run.name)) is None:
                continue
            # Another worker may have had it since the look.
            if self._done(run.name) or self.record(run.name).get("state") == State.failed:
                lock.release()
                continue
            return Claim(self, run, lock), True
        return None, bool(ready) or State.running in states.values()

    def _done(self, name: str) -> bool:
        return (self.folder / name / RESULTS_FILE).is_file()

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / QUEUE / f"{name}{suffix}"

    def _lock(self, name: str) -> BaseFileLock | None:
        """The lock of a run, held; None if another has it."""
        path = self._path(name, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
        return lock


class Claim:
    """A run that this process alone may train.

    Attributes:
        run: It.
        again: Whether a worker that is no more had begun it.
    """

    def __init__(self, queue: RunQueue, run: Run, lock: BaseFileLock) -> None:
        self.run = run
        self.again = queue.record(run.name).get("state") == State.running
        self._queue, self._lock = queue, lock
        self._record = {
            "state": State.running, "host": socket.gethostname(), "pid": os.getpid(),
            "claim": uuid.uuid4().hex, "started": time.time(),
        }  # fmt: skip
        self._write(self._record)

    def end(self, error: Exception | None = None) -> None:
        """Give the run back: done, or failed with an error.

        Raises:
            RuntimeError: somebody else had it too.
        """
        try:
            held = self._queue.record(self.run.name)
            if held.get("claim") != self._record["claim"]:
                raise RuntimeError(
                    f"{self.run.name} was also trained by process {held.get('pid')} on "
                    f"{held.get('host')}: the locks of this file system do not hold between "
                    "machines. Remove the run's directory and let one machine train"
                ) from error
            ended = {**self._record, "ended": time.time()}
            if error is None:
                self._write({**ended, "state": State.done})
            else:
                self._write({
                    **ended, "state": State.failed, "error": f"{type(error).__name__}: {error}",
                    "traceback": "".join(traceback.format_exception(error)),
                })  # fmt: skip
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Give the run back as if this process had been killed."""
        self._lock.release()

    def _write(self, record: Mapping[str, Any]) -> None:
        write_json(self._queue._path(self.run.name, ".json"), record)


def work(
    queue: RunQueue,
    train: Callable[[Run], object],
    *,
    report: Callable[[str], object] = lambda line: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Train runs until none is left that this process could take now or later.

    Waits while others train: what they leave undone is taken over, what they finish may be needed.

    Args:
        queue: The runs.
        train: Trains one and leaves its `results.json`; an exception marks it as failed.
        report: Called with a line per run.
        after: Called after each run.
    """
    while True:
        claim, more = queue.claim()
        if claim is None:
            if not more:
                return
            time.sleep(POLL_SECONDS)
            continue
        name = claim.run.name
        report(f"{name}: taken over" if claim.again else name)
        started = time.monotonic()
        try:
            train(claim.run)
        except Exception as error:
            claim.end(error)
            report(f"{name}: failed: {type(error).__name__}: {error}")
            after()
            require_device()
        except BaseException:
            claim.abandon()
            raise
        else:
            claim.end()
            report(f"{name}: done in {time.monotonic() - started:.0f} s")
            after()


def require_device() -> None:
    """Free the GPU's memory after an error; raises if the error has left the GPU unusable."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
