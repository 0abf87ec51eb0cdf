"""The queue of runs: order, claims between processes, failures, workers that die."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from pemt_fast.training import run_queue
from pemt_fast.training.fit import finish
from pemt_fast.training.run_queue import Run, RunQueue, State, check_runs, work

RUNS = (
    Run("sources/a", "source"),
    Run("sources/b", "source"),
    Run("targets/t", "target", needs=("sources/a", "sources/b")),
    Run("plain/t", "score"),
)


@pytest.fixture(autouse=True)
def _poll_quickly(monkeypatch):
    monkeypatch.setattr(run_queue, "POLL_SECONDS", 0.01)


def queue_of(folder, runs=RUNS):
    return RunQueue(folder, lambda: runs)


def train_into(folder, fails=()):
    """Trains by writing `results.json`; some fail."""

    def train(run):
        if run.name in fails:
            raise ValueError(f"no data for {run.name}")
        (folder / run.name).mkdir(parents=True, exist_ok=True)
        finish(folder / run.name, {"by": os.getpid()})

    return train


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((Run("a", "k"), Run("a", "k")), "'a' twice"),
        ((Run("a", "k", needs=("b",)), Run("b", "k")), "'a' needs 'b', which is no earlier run"),
        ((Run("../a", "k"),), "inside the output, got '../a'"),
        ((Run("/a", "k"),), "inside the output, got '/a'"),
        ((Run("queue/a", "k"),), "inside the output, got 'queue/a'"),
    ],
)
def test_bad_plans(runs, message):
    with pytest.raises(ValueError, match=message):
        check_runs(runs)


def test_runs_wait_for_what_they_need(tmp_path):
    queue, order = queue_of(tmp_path), []
    assert set(queue.states().values()) == {State.waiting}
    train = train_into(tmp_path)
    work(queue, lambda run: (order.append(run.name), train(run)))
    assert order == ["sources/a", "sources/b", "targets/t", "plain/t"]
    assert set(queue.states().values()) == {State.done}
    work(queue, lambda run: pytest.fail("a done run was trained again"))


def test_a_failure_stops_only_what_needs_it(tmp_path):
    queue, lines = queue_of(tmp_path), []
    work(queue, train_into(tmp_path, fails=("sources/a",)), report=lines.append)
    assert queue.states() == {
        "sources/a": State.failed, "sources/b": State.done, "targets/t": State.blocked,
        "plain/t": State.done,
    }  # fmt: skip
    assert "sources/a: failed: ValueError: no data for sources/a" in lines
    record = queue.record("sources/a")
    assert record["error"] == "ValueError: no data for sources/a"
    assert "raise ValueError(f" in record["traceback"]
    # Others that join leave it; who retries tries it again.
    work(queue, lambda run: pytest.fail("a failed run was trained again"))
    assert queue.retry() == ["sources/a"]
    work(queue, train_into(tmp_path))
    assert set(queue.states().values()) == {State.done}


def test_an_interrupted_run_is_free_at_once(tmp_path):
    queue = queue_of(tmp_path, RUNS[:1])

    def stop(run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(queue, stop)
    assert queue.states() == {"sources/a": State.interrupted}
    lines = []
    work(queue, train_into(tmp_path), report=lines.append)
    assert lines[0] == "sources/a: taken over"


def test_a_plan_may_grow_while_it_is_worked_off(tmp_path):
    runs = list(RUNS[:1])
    train = train_into(tmp_path)
    work(RunQueue(tmp_path, lambda: tuple(runs)), lambda run: (train(run), runs.extend(RUNS[1:])))
    assert set(queue_of(tmp_path).states().values()) == {State.done}


@pytest.mark.parametrize("fails", [(), ("sources/a",)], ids=["done", "failed"])
def test_what_ended_since_the_look_is_not_claimed(tmp_path, monkeypatch, fails):
    """Between a worker's look at the states and its lock another one had the run."""
    queue = queue_of(tmp_path)
    before = queue.states()
    work(queue_of(tmp_path, RUNS[:1]), train_into(tmp_path, fails))
    monkeypatch.setattr(queue, "states", lambda runs: before)
    claim, _ = queue.claim()
    assert claim.run.name == "sources/b"
    claim.abandon()


def test_a_run_that_two_had_is_an_error(tmp_path):
    """What happens where locks hold on each machine alone."""
    queue = queue_of(tmp_path, RUNS[:1])

    def train_while_another_claims(run):
        path = tmp_path / "queue" / "sources" / "a.json"
        path.write_text(json.dumps({"state": "running", "host": "other", "pid": 7, "claim": "x"}))

    with pytest.raises(RuntimeError, match="also trained by process 7 on other: the locks"):
        work(queue, train_while_another_claims)


# --- between processes ---------------------------------------------------------------------------

MANY = tuple(Run(f"r{i}", "k") for i in range(20))


def share(folder):
    """Works off `MANY`; every run says in a common file when it begins and ends."""

    def train(run):
        with (folder / "log").open("a") as log:
            print(run.name, "begins", file=log, flush=True)
            time.sleep(0.02)
            train_into(folder)(run)
            print(run.name, "ends", file=log, flush=True)

    run_queue.POLL_SECONDS = 0.01
    work(queue_of(folder, MANY), train)


def hang(folder):
    """Claims the first run and never ends."""
    work(queue_of(folder), lambda run: time.sleep(60))


def start(target, *arguments):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def test_each_run_is_trained_by_one_of_several_processes(tmp_path):
    processes = [start(share, tmp_path) for _ in range(4)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"{r.name} {w}" for r in MANY for w in ("begins", "ends"))
    by = {json.loads((tmp_path / r.name / "results.json").read_text())["by"] for r in MANY}
    assert len(by) > 1, "one process did everything"


def test_a_killed_worker_loses_its_run_at_once(tmp_path):
    queue = queue_of(tmp_path)
    process = start(hang, tmp_path)
    while not queue.record("sources/a"):
        time.sleep(0.01)
    assert queue.states()["sources/a"] is State.running
    assert queue.record("sources/a")["pid"] == process.pid
    claim, _ = queue.claim()
    assert claim.run.name == "sources/b", "a run that is being trained was claimed"
    claim.abandon()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert queue.states()["sources/a"] is State.interrupted
    work(queue, train_into(tmp_path))
    assert queue.record("sources/a")["pid"] == os.getpid()


def test_a_worker_waits_for_the_runs_of_others(tmp_path):
    """Nothing is free while another trains the source; it is when that one dies."""
    runs = (RUNS[0], Run("targets/t", "target", needs=("sources/a",)))
    holder, queue = start(hang, tmp_path), queue_of(tmp_path, runs)
    while not queue.record("sources/a"):
        time.sleep(0.01)
    assert queue.claim() == (None, True)
    waiting = start(work, queue, train_into(tmp_path))
    time.sleep(0.3)
    assert waiting.is_alive()
    holder.kill()
    waiting.join(60)
    assert waiting.exitcode == 0
    assert set(queue.states().values()) == {State.done}
