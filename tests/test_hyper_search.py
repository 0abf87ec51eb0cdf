"""The search of PEML's hyper-parameters: its space, its storage, and what interruptions leave."""

import json
import logging
import multiprocessing
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from hyper_objectives import SPACE, distance, work

from pemt_fast import PemlConfig
from pemt_fast.training import hyper_search
from pemt_fast.training.hyper_search import HyperResult, search_hyper_parameters
from pemt_fast.training.hyper_space import CHOICES, RANGES, HyperSpace

optuna = pytest.importorskip("optuna")

from pemt_fast.training import hyper_study  # noqa: E402

STORAGES = ["study.db", "study.sqlite3", "study.log", "study.journal"]
KINDS = ["study.db", "study.log"]


def search(storage, objective=distance, trials=12, **changes) -> HyperResult:
    # What would wait for ever ends with too few trials.
    arguments = {"space": SPACE, "name": "peml", "trials": trials, "timeout": 120, **changes}
    return search_hyper_parameters(objective, storage=storage, **arguments)


def done(result: HyperResult) -> list[tuple]:
    """Finished trials in their order, without what depends on the clock and on failed ones."""
    finished = [t for t in result.trials if t.state in ("complete", "pruned")]
    return [(t.state, t.values, t.value, t.last_step) for t in finished]


def reporting(values, report) -> float:
    """Rises to `distance` in five steps."""
    score = distance(values)
    for step in range(5):
        report(10 * step, score * (2 - step / 4))
    return score


@pytest.fixture
def quick(monkeypatch):
    """Signs of life are missed soon."""
    monkeypatch.setattr(hyper_search, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(hyper_study, "PULSE_SECONDS", 0.1)
    monkeypatch.setattr(hyper_study, "STALE_SECONDS", 1.0)


# --- the space -----------------------------------------------------------------------------------


def test_space_survives_json():
    space = HyperSpace(prefix_length=[4, 8], learning_rate=[1e-3], sharing=("none",))
    again = HyperSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space != HyperSpace()


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("prefix_length", (), "prefix_length must hold at least one value"),
        ("prefix_length", (8, 8), "all different"),
        ("prefix_width", (32, 0), "prefix_width must be an integer of at least 1, got 0"),
        ("r", (8.0,), "r must be an integer"),
        ("sharing", "none", "sharing must be a list of values, got 'none'"),
        ("sharing", ("none", "some"), "sharing must be one of"),
        ("learning_rate", (), "learning_rate must be one positive number, or two"),
        ("learning_rate", (1e-2, 1e-3), "lower first"),
        ("learning_rate", (1e-3, 1e-3), "lower first"),
        ("learning_rate", (1e-4, 1e-3, 1e-2), "or two"),
        ("architecture_learning_rate", (0.0, 0.1), "architecture_learning_rate must be one"),
        ("architecture_learning_rate", (float("nan"),), "positive"),
        ("learning_rate", ("0.1",), "positive"),
    ],
)
def test_space_names_what_does_not_fit(field, values, message):
    with pytest.raises(ValueError, match=message):
        HyperSpace(**{field: values})


def test_space_does_not_know_other_fields():
    with pytest.raises(ValueError, match=r"unknown HyperSpace keys \['alpha'\]"):
        HyperSpace.from_dict({"alpha": [16]})


def test_values_are_of_the_space_and_fixed_ones_among_them(tmp_path):
    seen = []
    space = HyperSpace(prefix_depth=(3,), learning_rate=(2e-3,), r=(4, 8))
    search(tmp_path / "a.log", lambda values, _: seen.append(values) or 0.0, 8, space=space)
    assert all(v["prefix_depth"] == 3 and v["learning_rate"] == 2e-3 for v in seen)
    assert {v["r"] for v in seen} == {4, 8}
    assert all(0.01 <= v["architecture_learning_rate"] <= 0.2 for v in seen)
    assert all(v.keys() == space.to_dict().keys() for v in seen)


# --- the search ----------------------------------------------------------------------------------


def chance(trials: int) -> list[float]:
    """Scores of random values, the lowest first."""
    drawn, scores = random.Random(0), []
    for _ in range(trials):
        values = {name: drawn.choice(getattr(SPACE, name)) for name in CHOICES}
        for name in RANGES:
            low, high = getattr(SPACE, name)
            values[name] = low * (high / low) ** drawn.random()
        scores.append(distance(values))
    return sorted(scores)


@pytest.mark.parametrize("seed", [0, 1])
def test_search_finds_the_good_region(tmp_path, seed):
    result = search(tmp_path / "a.log", trials=40, seed=seed)
    late = sorted(t.value for t in result.trials[20:])
    by_chance = chance(1000)
    # Half of the later trials are better than nine in ten random ones.
    assert late[10] > by_chance[900]
    assert result.value > by_chance[975]


def test_best_is_the_best_complete_trial(tmp_path):
    result = search(tmp_path / "a.log", reporting, 25)
    complete = [t for t in result.trials if t.state == "complete"]
    best = max(complete, key=lambda t: t.value)
    assert (result.value, result.values) == (best.value, best.values)
    assert result.value == distance(result.values)


def test_same_seed_same_trials_and_another_seed_others(tmp_path):
    first, again = (search(tmp_path / f"{n}.log", reporting, 15) for n in "ab")
    other = search(tmp_path / "c.log", reporting, 15, seed=1)
    assert done(first) == done(again)
    assert done(first)[0] != done(other)[0]


def test_no_two_trials_begin_with_the_same_random_numbers(tmp_path):
    result = search(tmp_path / "a.log", trials=8)
    assert len({t.values["learning_rate"] for t in result.trials}) == 8


def test_pruning_ends_bad_trials_early_and_saves_steps(tmp_path):
    steps = Counter()

    def objective(values, report):
        def counted(step, value):
            steps[len(seen)] += 1
            report(step, value)

        seen.append(values)
        return reporting(values, counted)

    seen = []
    result = search(tmp_path / "a.log", objective, 25)
    pruned = [t for t in result.trials if t.state == "pruned"]
    assert len(pruned) >= 3 and all(t.number >= 5 for t in pruned)
    # Not by its first report, and reported steps count, not the times of reporting.
    assert {t.last_step for t in pruned} <= {10, 20, 30, 40} and 10 in {t.last_step for t in pruned}
    assert all(steps[t.number + 1] == t.last_step // 10 + 1 for t in pruned)
    assert all(t.value < result.value for t in pruned)


def test_without_pruning_all_trials_are_complete(tmp_path):
    result = search(tmp_path / "a.log", reporting, 15, prunes=False)
    assert {t.state for t in result.trials} == {"complete"}


def test_score_that_is_not_a_number_counts_as_pruned(tmp_path):
    def objective(values, report):
        return float("nan") if values["r"] == 8 else distance(values)

    result = search(tmp_path / "a.log", objective, 10)
    assert len(done(result)) == 10 and result.values["r"] != 8
    assert {t.state for t in result.trials if t.values["r"] == 8} == {"pruned"}


@pytest.mark.parametrize("score", [None, "good"])
def test_objective_without_a_score_is_an_error(tmp_path, score):
    with pytest.raises(TypeError, match=f"objective must return a number, got {score!r}"):
        search(tmp_path / "a.log", lambda values, _: score)


def test_a_line_per_trial_and_nothing_from_optuna(tmp_path, caplog):
    lines = []
    verbosity = optuna.logging.get_verbosity()
    logging.getLogger("optuna").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = search(tmp_path / "a.log", reporting, 12, report=lines.append)
    finally:
        logging.getLogger("optuna").removeHandler(caplog.handler)
    assert len(lines) == 12
    assert lines[0].startswith(f"trial 0: {result.trials[0].value:.4g} (1 of 12, best ")
    pruned = next(t for t in result.trials if t.state == "pruned")
    assert lines[pruned.number].startswith(f"trial {pruned.number}: pruned at step 10 (")
    assert f"prefix_length={pruned.values['prefix_length']}" in lines[pruned.number]
    assert optuna.logging.get_verbosity() == verbosity
    assert caplog.records == []


def test_timeout_starts_no_more_trials(tmp_path):
    def objective(values, report):
        time.sleep(0.1)
        return distance(values)

    result = search(tmp_path / "a.log", objective, 20, timeout=0.3)
    assert 1 <= len(done(result)) <= 4


def test_finished_study_returns_at_once(tmp_path):
    lines = []
    result = search(tmp_path / "a.log", trials=2, timeout=20)
    assert search(tmp_path / "a.log", trials=2, timeout=5, report=lines.append) == result
    assert lines == []


# --- storages and studies ------------------------------------------------------------------------


@pytest.mark.parametrize("file", STORAGES)
def test_storage_is_the_file_that_was_named(tmp_path, file):
    result = search(tmp_path / "folder" / file, reporting, 3)
    started = (tmp_path / "folder" / file).read_bytes()[:15]
    assert (started == b"SQLite format 3") == file.endswith((".db", ".sqlite3"))
    assert [p.name for p in (tmp_path / "folder").iterdir()] == [file]
    assert done(result) == done(search(tmp_path / "other.log", reporting, 3))


def test_storage_can_be_a_url(tmp_path):
    search(f"sqlite:///{tmp_path / 'a.anything'}", trials=2)
    again = search(f"sqlite:///{tmp_path / 'a.anything'}", trials=3)
    assert len(again.trials) == 3


@pytest.mark.parametrize("file", ["study.txt", "study", "study.db.gz"])
def test_storage_of_another_kind_is_an_error(tmp_path, file):
    with pytest.raises(ValueError, match=rf"storage must be a path ending .*{file}"):
        search(tmp_path / file)
    assert list(tmp_path.iterdir()) == []


def test_study_of_another_space_is_an_error(tmp_path):
    before = search(tmp_path / "a.log", trials=2)
    with pytest.raises(ValueError, match=r"space must be .* r is \[4, 8, 16\]; got r \[4\]$"):
        search(tmp_path / "a.log", space=HyperSpace(prefix_depth=(2,), prefix_width=(32,), r=(4,)))
    assert search(tmp_path / "a.log", trials=2) == before
    search(tmp_path / "a.log", trials=1, space=HyperSpace(r=(4,)), name="another")


def test_study_of_another_seed_is_an_error(tmp_path):
    search(tmp_path / "a.log", trials=1, seed=3)
    with pytest.raises(ValueError, match="seed must be 3, that of study 'peml', got 0"):
        search(tmp_path / "a.log", trials=2)


def test_study_that_somebody_else_made_is_an_error(tmp_path):
    storage = hyper_study.open_storage(tmp_path / "a.log")
    optuna.create_study(storage=storage, study_name="peml").ask()
    with pytest.raises(ValueError, match="'peml' is another"):
        search(tmp_path / "a.log", timeout=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "a.log", **changes)


def test_without_optuna_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install pemt_fast\[search\]"):
        search(tmp_path / "a.log")


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "stop"),
    [
        ("study.db", KeyboardInterrupt),
        ("study.log", KeyboardInterrupt),
        ("study.log", SystemExit),
    ],
)
def test_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path, file, stop):
    calls = []

    def objective(values, report):
        calls.append(values)
        # Two in a row, before and after TPE begins: a trial that runs again is interrupted too.
        if len(calls) in (4, 5, 13):
            report(0, -9.0)
            raise stop
        return reporting(values, report)

    for _ in range(3):
        with pytest.raises(stop):
            search(tmp_path / file, objective, 16)
    result = search(tmp_path / file, objective, 16)
    assert done(result) == done(search(tmp_path / "straight.log", reporting, 16))
    assert calls[3] == calls[4] == calls[5] and calls[12] == calls[13]
    assert Counter(t.state for t in result.trials)["fail"] == 3


def test_interruption_before_all_values_are_drawn_loses_nothing(tmp_path, monkeypatch):
    draw = optuna.Trial.suggest_float
    with monkeypatch.context() as patched:

        def interrupted(trial, name, *bounds, **options):
            if trial.number == 12 and name == "architecture_learning_rate":
                raise KeyboardInterrupt
            return draw(trial, name, *bounds, **options)

        patched.setattr(optuna.Trial, "suggest_float", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "a.log", trials=15)
    result = search(tmp_path / "a.log", trials=15)
    assert done(result) == done(search(tmp_path / "straight.log", trials=15))


@pytest.mark.parametrize("file", KINDS)
def test_trials_count_over_all_calls(tmp_path, file):
    calls = []

    def objective(values, report):
        calls.append(values)
        return reporting(values, report)

    for trials in (2, 2, 6, 4):
        search(tmp_path / file, objective, trials)
    result = search(tmp_path / file, objective, 8)
    assert len(calls) == len(result.trials) == 8
    assert done(result) == done(search(tmp_path / "straight.log", reporting, 8))


def test_error_of_the_objective_ends_the_call_and_its_trial_is_not_repeated(tmp_path):
    calls = []

    def objective(values, report):
        calls.append(values)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return distance(values)

    with pytest.raises(RuntimeError, match="out of memory"):
        search(tmp_path / "a.log", objective, 6)
    result = search(tmp_path / "a.log", objective, 6)
    assert len(done(result)) == 6 and len(calls) == 7
    assert calls.count(calls[2]) == 1
    assert result.trials[2].state == "fail"


def leave_running(storage, sign_of_life: float | None) -> dict:
    """A trial of a worker that is no more; its values."""
    study = hyper_study.open_study(storage, "peml", SPACE, 0, True)
    trial = study.ask()
    values = hyper_search.suggest(trial, SPACE)
    if sign_of_life is not None:
        trial.set_user_attr(hyper_study.ALIVE, sign_of_life)
    return values


@pytest.mark.parametrize("file", KINDS)
def test_trial_of_a_dead_worker_runs_again_first(tmp_path, file):
    values = leave_running(tmp_path / file, time.time() - 1e4)
    lines, calls = [], []
    result = search(
        tmp_path / file, lambda v, _: calls.append(v) or distance(v), 4, report=lines.append
    )
    assert calls[0] == values and len(calls) == 4
    assert lines[0] == "trial 0 gave no sign of life any more: it runs again"
    assert done(result) == done(search(tmp_path / "straight.log", trials=4))


def test_values_of_a_dead_worker_are_kept_whatever_has_finished_since(tmp_path):
    study = hyper_study.open_study(tmp_path / "a.log", "peml", SPACE, 0, True)
    # Not what the sampler draws now.
    study.enqueue_trial({"learning_rate": 1.25e-3, "r": 16})
    values = leave_running(tmp_path / "a.log", 1.0)
    calls = []
    search(tmp_path / "a.log", lambda v, _: calls.append(v) or distance(v), 2)
    assert calls[0] == values and values["learning_rate"] == 1.25e-3


@pytest.mark.parametrize("sign", ["just now", "never"])
def test_trial_that_may_be_alive_is_waited_for(tmp_path, quick, sign):
    begun = time.time()
    values = leave_running(tmp_path / "a.log", begun if sign == "just now" else None)
    calls, lines = [], []

    def objective(own, report):
        calls.append((own, time.time() - begun))
        return distance(own)

    result = search(tmp_path / "a.log", objective, 3, report=lines.append)
    assert len(done(result)) == len(calls) == 3
    assert "waiting for trials of other workers: 1" in lines
    assert calls[2][0] == values and calls[2][1] >= 1.0


def test_trial_longer_than_the_patience_stays_alive(tmp_path, quick):
    other = []

    def objective(values, report):
        if not other:
            study = hyper_study.open_study(tmp_path / "a.log", "peml", SPACE, 0, True)
            end = time.time() + 2.5
            while time.time() < end:
                other.extend(hyper_study.fail_stale(study, {}) or [None])
                time.sleep(0.1)
        return distance(values)

    result = search(tmp_path / "a.log", objective, 2)
    assert set(other) == {None} and [t.state for t in result.trials] == ["complete"] * 2


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("reports", [True, False])
def test_result_of_a_trial_that_was_given_up_is_dropped(tmp_path, file, reports):
    lines, calls = [], []

    def objective(values, report):
        calls.append(values)
        if len(calls) == 1:
            study = hyper_study.open_study(tmp_path / file, "peml", SPACE, 0, True)
            (trial,) = study.trials
            assert hyper_study.finish(study, 0, optuna.trial.TrialState.FAIL)
            hyper_study.run_again(study, trial)
        return reporting(values, report) if reports else distance(values)

    result = search(tmp_path / file, objective, 3, report=lines.append)
    assert lines[0] == "trial 0 was given up meanwhile: its result is dropped"
    assert calls[0] == calls[1] and len(calls) == 4
    assert [t.state for t in result.trials] == ["fail", "complete", "complete", "complete"]


# --- several workers -----------------------------------------------------------------------------


def test_two_workers_do_not_both_take_the_last_place(tmp_path, monkeypatch):
    ask, calls = optuna.Study.ask, []

    def after_another(study):
        if len(calls) == 2:
            other = ask(study)
            study.tell(other, 0.0)
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", after_another)
    result = search(tmp_path / "a.log", lambda v, _: calls.append(v) or distance(v), 3)
    assert len(calls) == 2
    assert [t.state for t in result.trials] == ["complete"] * 3 + ["fail"]


def test_stale_trial_that_two_workers_queued_runs_once(tmp_path):
    values = leave_running(tmp_path / "a.log", 1.0)
    study = hyper_study.open_study(tmp_path / "a.log", "peml", SPACE, 0, True)
    (stale,) = study.trials
    assert hyper_study.fail_stale(study, {}) == [0]
    hyper_study.run_again(study, stale)
    calls = []
    result = search(tmp_path / "a.log", lambda v, _: calls.append(v) or distance(v), 4)
    assert calls.count(values) == 1 and len(calls) == len(done(result)) == 4


def test_a_stale_trial_is_failed_by_one_worker_alone(tmp_path):
    leave_running(tmp_path / "a.log", 1.0)
    first, second = (
        hyper_study.open_study(tmp_path / "a.log", "peml", SPACE, 0, True) for _ in range(2)
    )
    assert hyper_study.fail_stale(first, {}) == [0]
    assert not hyper_study.finish(second, 0, optuna.trial.TrialState.FAIL)


def run_workers(*arguments: tuple) -> list[int | None]:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=given) for given in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    return [worker.exitcode for worker in workers]


def written(folder: Path) -> list[list[dict]]:
    return [json.loads(path.read_text()) for path in folder.glob("ran-*.json")]


@pytest.mark.slow
@pytest.mark.parametrize("file", KINDS)
def test_two_processes_share_the_trials(tmp_path, file):
    given = (str(tmp_path / file), str(tmp_path), 10)
    assert run_workers(given, given) == [0, 0]
    ran = written(tmp_path)
    assert len(ran) == 2 and all(len(values) >= 2 for values in ran)
    result = search(tmp_path / file, trials=10)
    finished = [t.values for t in result.trials if t.state == "complete"]
    assert len(finished) == 10
    rates = [values["learning_rate"] for values in [*ran[0], *ran[1]]]
    assert sorted(rates) == sorted(v["learning_rate"] for v in finished)
    assert len(set(rates)) == 10


@pytest.mark.slow
def test_search_goes_on_after_a_worker_was_killed(tmp_path, quick):
    storage = str(tmp_path / "study.log")
    assert run_workers((storage, str(tmp_path), 6, 3)) == [9]
    assert Counter(t.state for t in search(storage, trials=1).trials) == {
        "complete": 3,
        "running": 1,
    }
    time.sleep(1.0)
    result = search(storage, trials=6)
    assert done(result) == done(search(tmp_path / "straight.log", trials=6))


# --- the result ----------------------------------------------------------------------------------


def test_best_config_has_the_best_values_and_keeps_the_rest(tmp_path):
    result = search(tmp_path / "a.log")
    base = PemlConfig(alpha=3.0, dropout=0.1)
    best = result.best_config(base)
    assert (best.alpha, best.dropout) == (3.0, 0.1)
    names = set(result.values) - {"learning_rate"}
    assert {name: getattr(best, name) for name in names} == {n: result.values[n] for n in names}
    assert result.other_values == {"learning_rate": result.values["learning_rate"]}
    assert base == PemlConfig(alpha=3.0, dropout=0.1)


def test_without_a_complete_trial_there_is_no_best(tmp_path):
    result = search(tmp_path / "a.log", lambda values, _: float("nan"), 2)
    assert (result.value, result.values) == (None, None)
    for best in (lambda: result.best_config(PemlConfig()), lambda: result.other_values):
        with pytest.raises(RuntimeError, match="no trial is complete"):
            best()


def test_result_is_ready_for_json(tmp_path):
    result = search(tmp_path / "a.log", reporting, 8)
    found = json.loads(json.dumps(result.to_dict()))
    assert (found["value"], found["values"]) == (result.value, result.values)
    assert [t["number"] for t in found["trials"]] == list(range(8))
    fields = {"number", "state", "values", "value", "seconds", "last_step"}
    assert found["trials"][0].keys() == fields
    assert found["trials"][0]["last_step"] == 40 and found["trials"][0]["seconds"] >= 0
