# SPDX-License-Identifier: Apache-2.0
"""`search_hyper_parameters`: PEML's discrete hyper-parameters and learning rates, by optuna.

TPE with pruning in a storage that outlives the process: the same call goes on after a kill, and
several processes with the same storage share the trials. The architecture inside a trial is
searched by gradients (`search.py`). The space is in `hyper_space.py`, what touches optuna in
`hyper_study.py`.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from pemt_fast.methods.peml import PemlConfig
from pemt_fast.training.hyper_space import HyperSpace, suggest

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

__all__ = ["HyperResult", "HyperSpace", "HyperTrial", "search_hyper_parameters", "suggest"]

POLL_SECONDS = 2.0

Objective = Callable[[dict[str, Any], Callable[[int, float], None]], float]


@dataclass(frozen=True, kw_only=True)
class HyperTrial:
    """One trial.

    Attributes:
        number: In the order of the starts, from 0.
        state: `complete`, `pruned`, `fail`, `running` or `waiting`. Interrupted trials have failed;
            what runs again is a trial of its own.
        values: By name.
        value: The score; of a pruned trial the last one reported.
        seconds: From start to end.
        last_step: The last step reported.
    """

    number: int
    state: str
    values: dict[str, Any]
    value: float | None
    seconds: float | None
    last_step: int | None


@dataclass(frozen=True, kw_only=True)
class HyperResult:
    """What a search has found.

    Attributes:
        values: Of the best complete trial, by name; None without any.
        value: Its score.
        trials: All trials of the study by number.
    """

    values: dict[str, Any] | None
    value: float | None
    trials: tuple[HyperTrial, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "trials": [asdict(trial) for trial in self.trials]}

    def best_config(self, base: PemlConfig) -> PemlConfig:
        """`base` with the best values of its fields; `other_values` has the rest.

        Raises:
            RuntimeError: no trial is complete.
        """
        known = {f.name for f in fields(base)}
        return replace(base, **{k: v for k, v in self.best_values.items() if k in known})

    @property
    def other_values(self) -> dict[str, Any]:
        """The best values that are not fields of `PemlConfig`, such as the learning rate.

        Raises:
            RuntimeError: no trial is complete.
        """
        known = {f.name for f in fields(PemlConfig)}
        return {k: v for k, v in self.best_values.items() if k not in known}

    @property
    def best_values(self) -> dict[str, Any]:
        """`values`.

        Raises:
            RuntimeError: no trial is complete.
        """
        if self.values is None:
            raise RuntimeError("no trial is complete: there are no best values yet")
        return self.values


def search_hyper_parameters(
    objective: Objective,
    space: HyperSpace,
    *,
    storage: str | os.PathLike[str],
    name: str,
    trials: int,
    seed: int = 0,
    prunes: bool = True,
    timeout: float | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> HyperResult:
    """Search the values with the highest validation score.

    Any number of processes may make the same call at the same time. Each returns when `trials` have
    finished, its own or others'. One process alone tries the same values each time, resumed or not,
    if the objective returns the same scores.

    What an interruption (Ctrl-C, `SystemExit`) ends runs again in the next call, with the same
    values. After a kill it does so once the trial has given no sign of life for two minutes.

    Args:
        objective: Called with the values by name and with `report(step, value)` for intermediate
            scores, which ends a trial worse than the median by raising `optuna.TrialPruned`; steps
            must mean the same in all trials. Returns the score; NaN counts as pruned.
        space: What is searched.
        storage: A file: `*.db` or `*.sqlite3` for SQLite, `*.log` or `*.journal` for optuna's
            journal (for network file systems); or the URL of a database.
        name: Of the study; a storage holds any number.
        trials: Complete and pruned trials of the study, altogether over all calls.
        seed: Of the sampler.
        prunes: Whether trials end early.
        timeout: Seconds after which this call starts no trial any more, and waits for none.
        report: Called with a line per event.

    Returns:
        The study so far.

    Raises:
        ImportError: optuna is not installed.
        ValueError: an argument does not fit, or the study is of another space or seed.
        Exception: what the objective raises; its trial has failed and does not run again.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "search_hyper_parameters needs optuna: pip install pemt_fast[search]"
        ) from error
    from pemt_fast.training import hyper_study

    for argument, value, least in (("trials", trials, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{argument} must be an integer of at least {least}, got {value!r}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    with hyper_study.quiet():
        study = hyper_study.open_study(storage, name, space, seed, prunes)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        _Worker(study, objective, space, trials, report).work(deadline)
        return _result(study)


class _Worker:
    """One process's part of a study."""

    def __init__(
        self,
        study: Study,
        objective: Objective,
        space: HyperSpace,
        trials: int,
        report: Callable[[str], object],
    ) -> None:
        self.study = study
        self.objective = objective
        self.space = space
        self.trials = trials
        self.report = report
        self.first_seen: dict[int, float] = {}

    def work(self, deadline: float) -> None:
        """Run trials until enough have finished; wait for those that others run."""
        from pemt_fast.training.hyper_study import FINISHED, TrialState, fail_stale

        waits = False
        while True:
            for number in fail_stale(self.study, self.first_seen):
                self.report(f"trial {number} gave no sign of life any more: it runs again")
            states = Counter(t.state for t in self.study.get_trials(deepcopy=False))
            finished, running = sum(states[s] for s in FINISHED), states[TrialState.RUNNING]
            if finished >= self.trials or time.monotonic() >= deadline:
                return
            if finished + running < self.trials:
                self.run_trial()
                waits = False
                continue
            if not waits:
                self.report(f"waiting for trials of other workers: {running}")
                waits = True
            time.sleep(POLL_SECONDS)

    def run_trial(self) -> None:
        """Run a queued trial or a new one."""
        from pemt_fast.training import hyper_study
        from pemt_fast.training.hyper_study import TrialState

        trial = self.study.ask()
        if hyper_study.is_surplus(self.study.get_trials(deepcopy=False), trial.number, self.trials):
            hyper_study.finish(self.study, trial.number, TrialState.FAIL)
            return
        with hyper_study.Pulse(trial):
            try:
                value = self.score(trial)
                state = TrialState.PRUNED if value is None else TrialState.COMPLETE
                kept = hyper_study.finish(self.study, trial.number, state, value)
            except BaseException as error:
                kept = hyper_study.finish(self.study, trial.number, TrialState.FAIL)
                if kept and not isinstance(error, Exception):
                    hyper_study.run_again(self.study, trial)
                    self.report(f"trial {trial.number} was interrupted: it runs again")
                # With a RuntimeError storages refuse what is reported for a trial given up.
                if kept or not isinstance(error, RuntimeError):
                    raise
        if kept:
            self.report(self.line(trial.number))
        else:
            self.report(f"trial {trial.number} was given up meanwhile: its result is dropped")

    def score(self, trial: Trial) -> float | None:
        """What the objective returns; None if the trial is pruned."""
        from optuna import TrialPruned

        from pemt_fast.training.hyper_study import reporter

        try:
            score = self.objective(suggest(trial, self.space), reporter(trial))
        except TrialPruned:
            return None
        try:
            value = float(score)
        except (TypeError, ValueError) as error:
            raise TypeError(f"objective must return a number, got {score!r}") from error
        return None if math.isnan(value) else value

    def line(self, number: int) -> str:
        """How a trial ended, and how far the study is."""
        result = _result(self.study)
        trial = result.trials[number]
        finished = sum(t.state in ("complete", "pruned") for t in result.trials)
        end = f"{trial.value:.4g}" if trial.state == "complete" else trial.state
        if trial.state == "pruned" and trial.last_step is not None:
            end += f" at step {trial.last_step}"
        best = "" if result.value is None else f", best {result.value:.4g}"
        values = ", ".join(
            f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.values.items()
        )
        return f"trial {number}: {end} ({finished} of {self.trials}{best}; {values})"


def _result(study: Study) -> HyperResult:
    trials = tuple(
        HyperTrial(
            number=trial.number,
            state=trial.state.name.lower(),
            values=trial.params,
            value=trial.value,
            seconds=None if trial.duration is None else trial.duration.total_seconds(),
            last_step=trial.last_step,
        )
        for trial in study.get_trials()
    )
    scores = {t.number: t.value for t in trials if t.state == "complete" and t.value is not None}
    if not scores:
        return HyperResult(values=None, value=None, trials=trials)
    # The earliest of equal ones.
    best = max(scores, key=lambda number: scores[number])
    return HyperResult(values=trials[best].values, value=scores[best], trials=trials)
