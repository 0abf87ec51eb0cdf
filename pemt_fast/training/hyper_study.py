# SPDX-License-Identifier: Apache-2.0
"""What `hyper_search.py` needs of optuna: storage, study, sampler, signs of life.

Not optuna's heartbeats: the journal has none, and their callbacks change names between its versions
4 and 6. A worker writes the time into a user attribute of the trial it runs, on any storage; a
running trial without a new one for `STALE_SECONDS` is failed and queued again. Clocks of machines
that share a storage must agree to less than that.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from pemt_fast.training.hyper_space import HyperSpace

PULSE_SECONDS = 20.0
STALE_SECONDS = 120.0
# The median of fewer complete trials, and the first value of a trial, say little.
PRUNING_STARTUP_TRIALS = 5
PRUNING_WARM_UP_REPORTS = 1

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# User attributes of a trial: the time of the last sign of life; the first trial with these values.
ALIVE, RETRY_OF = "alive", "retry_of"


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing below a warning from optuna meanwhile."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def open_storage(storage: str | os.PathLike[str]) -> BaseStorage:
    """The storage in a file, made if there is none, or at a URL; see `search_hyper_parameters`."""
    text = os.fspath(storage)
    path = Path(text).absolute()
    if "://" in text:
        return _relational(text)
    if path.suffix not in (".db", ".sqlite3", ".log", ".journal"):
        raise ValueError(
            "storage must be a path ending in .db or .sqlite3 (SQLite), in .log or .journal "
            f"(journal), or a URL, got {text!r}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".log", ".journal"):
        return JournalStorage(JournalFileBackend(str(path)))
    # Workers that start together would all create the tables.
    lock = JournalFileOpenLock(f"{path}.opening")
    lock.acquire()
    try:
        return _relational(f"sqlite:///{path}")
    finally:
        lock.release()


def _relational(url: str) -> RDBStorage:
    # SQLite waits 5 seconds for other writers unless told otherwise.
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    return RDBStorage(url, engine_kwargs=patience)


def open_study(
    storage: str | os.PathLike[str], name: str, space: HyperSpace, seed: int, prunes: bool
) -> Study:
    """The study `name`, made if there is none; one of another space or seed is an error."""
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if prunes:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=PRUNING_STARTUP_TRIALS)
    study = optuna.create_study(
        storage=open_storage(storage), study_name=name, direction="maximize",
        sampler=TrialSampler(seed), pruner=pruner, load_if_exists=True,
    )  # fmt: skip
    # Trials first: whoever starts one has stored space and seed before.
    begun = bool(study.get_trials(deepcopy=False))
    stored = study.user_attrs
    if "space" not in stored and begun:
        raise ValueError(f"name must be of a study of search_hyper_parameters, {name!r} is another")
    if "seed" in stored and stored["seed"] != seed:
        raise ValueError(f"seed must be {stored['seed']}, that of study {name!r}, got {seed}")
    own, theirs = space.to_dict(), stored.get("space", {})
    if theirs and own != theirs:
        differ = [key for key in {**theirs, **own} if own.get(key) != theirs.get(key)]
        raise ValueError(
            f"space must be that of study {name!r}, where "
            + ", ".join(f"{key} is {theirs.get(key)}" for key in differ)
            + "; got "
            + ", ".join(f"{key} {own.get(key)}" for key in differ)
        )
    study.set_user_attr("seed", seed)
    study.set_user_attr("space", own)
    return study


class TrialSampler(optuna.samplers.BaseSampler):
    """TPE with random numbers of its own for each trial, by the seed and the trial's number.

    So workers differ, a resumed study goes on as it would have, and a trial that runs again samples
    as it did. Trials that only repeat others are left out of the count.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._tpe = self._for_trial(0)

    def _for_trial(self, number: int) -> optuna.samplers.TPESampler:
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            # optuna 4 calls both options experimental; 5 has them by default.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Start the trial's random numbers."""
        first = _first(trial)
        trials = study.get_trials(deepcopy=False)
        repeats = sum(t.number < first and RETRY_OF in t.user_attrs for t in trials)
        self._tpe = self._for_trial(first - repeats)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """As in TPE."""
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As in TPE."""
        return self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """As in TPE."""
        return self._tpe.sample_independent(study, trial, name, distribution)


class Pulse:
    """While it is entered, signs of life of a trial from a thread."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._trial.set_user_attr(ALIVE, time.time())
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(PULSE_SECONDS):
            try:
                self._trial.set_user_attr(ALIVE, time.time())
            except Exception:
                # A busy storage: there is time for other attempts. A trial given up: the worker
                # notices when it is through.
                continue


def reporter(trial: Trial) -> Callable[[int, float], None]:
    """What an objective reports intermediate values with; raises `TrialPruned`."""
    reports = 0

    def report(step: int, value: float) -> None:
        nonlocal reports
        trial.report(value, step)
        reports += 1
        if reports > PRUNING_WARM_UP_REPORTS and trial.should_prune():
            raise optuna.TrialPruned(f"at step {step}")

    return report


def finish(study: Study, number: int, state: TrialState, value: float | None = None) -> bool:
    """End a running trial; False if it has ended already, for another worker gave it up."""
    try:
        study.tell(number, value, state=state)
    except (ValueError, RuntimeError):
        if not ended(study, number):
            raise
        return False
    return True


def ended(study: Study, number: int) -> bool:
    """Whether a trial runs no more."""
    return study.get_trials(deepcopy=False)[number].state.is_finished()


def run_again(study: Study, trial: FrozenTrial | Trial) -> None:
    """Queue a failed trial's values."""
    study.enqueue_trial(trial.params, user_attrs={RETRY_OF: _first(trial)})


def fail_stale(study: Study, first_seen: dict[int, float]) -> list[int]:
    """Fail running trials without signs of life and queue their values; returns their numbers.

    Args:
        study: Whose trials.
        first_seen: When this worker first saw a trial that never gave a sign; kept up here.
    """
    failed = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        last = trial.user_attrs.get(ALIVE) or first_seen.setdefault(trial.number, time.time())
        if time.time() - last >= STALE_SECONDS and finish(study, trial.number, TrialState.FAIL):
            run_again(study, trial)
            failed.append(trial.number)
    return failed


def is_surplus(trials: Sequence[FrozenTrial], number: int, wanted: int) -> bool:
    """Whether a trial just started is one too many, because two workers started one at a time.

    The earlier ones count, in any state but failed: each worker decides alike for itself. Also one
    too many is what two workers queued for the same stale trial.
    """
    earlier = [t for t in trials if t.number < number and t.state != TrialState.FAIL]
    own = trials[number]
    twice = RETRY_OF in own.user_attrs and any(_first(t) == _first(own) for t in earlier)
    return twice or len(earlier) >= wanted


def _first(trial: FrozenTrial | Trial) -> int:
    """Number of the trial whose values it has: its own, unless it is a repeat."""
    return trial.user_attrs.get(RETRY_OF, trial.number)
