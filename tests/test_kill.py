"""Whatever is killed with SIGKILL, whenever: the same command again gives the same bits.

Processes are real ones and die by signal 9; `helpers/killer.py` says when. They come from a fork
server that has imported everything, so that a start takes a second.
"""

import json
import multiprocessing
import signal
import time
from pathlib import Path

import killer
import pytest
from tiny_data import write_tiny_data

from pemt_fast.checkpoint import read_tensors

pytestmark = pytest.mark.slow

WEIGHTS = "pemt_fast_model.safetensors"
SOURCES = ("sources/sst2", "sources/cola")
TARGETS = ("pemt/4-shot/mrpc/seed1", "single/4-shot/mrpc/seed1")
RUNS = (*SOURCES, *TARGETS)
# 36 and 40 examples in batches of 8: 5 updates an epoch, the last of 7 is not an epoch's last.
SETTINGS = {
    "--sources": "sst2,cola", "--targets": "mrpc", "--methods": "pemt,single", "--seeds": "1",
    "--few-shot": "4", "--source-steps": 7, "--target-steps": 5, "--eval-every": 2,
    "--source-rank": 4, "--source-batch-size": 8, "--target-batch-size": 3,
    "--source-lr": 0.05, "--target-lr": 0.5, "--rate": "single=3",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "pemt_fast.cli", "pemt_fast.training.protocol_run", "transformers.models.t5.modeling_t5",
        "transformers.trainer_seq2seq", "sklearn.metrics", "matplotlib.figure",
    ])  # fmt: skip
    return context


def command(folder, out, **changes):
    options = {"--model": folder / "t5", "--data": folder, "--out": out, **SETTINGS, **changes}
    return ["protocol", *(str(word) for pair in options.items() for word in pair)]


def run(fork_server, *arguments, **when):
    """The exit code of the command in a process of its own; -9 if it was killed."""
    process = fork_server.Process(target=killer.run, args=arguments, kwargs=when)
    process.start()
    process.join(timeout=120)
    assert not process.is_alive(), "hangs"
    return process.exitcode


def trained(out):
    """Of every run the bits of its weights, and what the results say but for times."""
    found = {}
    for name in RUNS:
        results = json.loads((out / name / "results.json").read_text())
        kept = ("validation", "test", "loss", "gates", "steps", "best_step")
        said = {key: results[key] for key in kept if key in results}
        # Not the file itself: safetensors writes its header's entries in any order.
        tensors, header = read_tensors(out / name / WEIGHTS)
        bits = {key: (t.shape, t.dtype, t.numpy().tobytes()) for key, t in tensors.items()}
        found[name] = (bits, header, said)
    return found


@pytest.fixture(scope="module")
def undisturbed(folder, fork_server, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(fork_server, command(folder, out)) == 0
    found = trained(out)
    # Weights from the end show every difference; the single adapter diverges: its best are older
    # than what it is resumed from.
    assert [said["best_step"] for _, _, said in found.values()] == [7, 7, 5, 2]
    return found


def assert_same(out, expected):
    for name, (bits, header, said) in trained(out).items():
        differ = [key for key, value in expected[name][0].items() if bits[key] != value]
        assert not differ and bits.keys() == expected[name][0].keys(), f"{name}: {differ}"
        assert (header, said) == expected[name][1:], name
        # Nothing of a killed process is left.
        files = {path.name for path in (out / name).iterdir()}
        assert files <= {WEIGHTS, "pemt_fast_config.json", "results.json", "gates.png"}, name


# Updates: 7 of each source, 5 of each target; the former save at 2, 4, 6 and 7, the latter at 2, 4
# and 5, and then the best once more.
KILLS = {
    "stage 1, between two checkpoints": ("update", 6),
    "stage 1, the second source": ("update", 7 + 4),
    "stage 2, before the first checkpoint": ("update", 7 + 7 + 2),
    "stage 2, after a checkpoint": ("update", 7 + 7 + 4),
    "after the best checkpoint": ("update", 7 + 7 + 5 + 5),
    "writing weights of a checkpoint": ("weights", 3),
    "writing the final weights of a source": ("weights", 5),
    "between the final weights and their config": ("between", 5),
    "writing the optimizer": ("optimizer", 2),
    "writing the state of the last checkpoint": ("state", 4),
    "removing a checkpoint": ("removal", 1),
    "before the results": ("results", 1),
    "after the results": ("tidying", 1),
}


@pytest.mark.parametrize("kill", KILLS)
def test_same_bits_after(kill, folder, fork_server, undisturbed, tmp_path):
    when, count = KILLS[kill]
    arguments = command(folder, tmp_path)
    assert run(fork_server, arguments, when=when, count=count) == -signal.SIGKILL
    assert not all((tmp_path / n / "results.json").is_file() for n in RUNS)
    assert run(fork_server, arguments) == 0
    assert_same(tmp_path, undisturbed)


# --- pemt-fast multitask -------------------------------------------------------------------------

PEML = Path("peml") / "seed1"


def multitask(folder, out):
    options = {
        "--model": folder / "t5", "--data": folder, "--out": out, "--tasks": "sst2,mrpc",
        "--methods": "peml", "--seeds": 1, "--steps": 7, "--batch-size": 4, "--units": 100,
        "--limit-train": 12, "--limit-eval": 4, "--set": "prefix_width=8",
    }  # fmt: skip
    return ["multitask", *(str(word) for pair in options.items() for word in pair)]


def searched(out):
    tensors, _ = read_tensors(out / PEML / WEIGHTS)
    results = json.loads((out / PEML / "results.json").read_text())
    kept = {key: results[key] for key in ("scores", "steps")}
    return (
        {key: t.numpy().tobytes() for key, t in tensors.items()},
        kept | {"architecture": results["search"]["architecture"]},
        json.loads((out / PEML / "search" / "search.json").read_text())["networks"],
    )


@pytest.fixture(scope="module")
def peml(folder, fork_server, tmp_path_factory):
    out = tmp_path_factory.mktemp("peml")
    assert run(fork_server, multitask(folder, out)) == 0
    return searched(out)


# Updates: 7 of the search, 7 of the training; every one is saved.
@pytest.mark.parametrize("count", [5, 7 + 1, 7 + 5], ids=["search", "between", "training"])
def test_peml_goes_on_after(count, folder, fork_server, peml, tmp_path):
    arguments = multitask(folder, tmp_path)
    assert run(fork_server, arguments, when="update", count=count) == -signal.SIGKILL
    # What was done is not done again: so many updates are left, and one more is one too many.
    left = 14 - (count - 1)
    assert run(fork_server, arguments, when="update", count=left + 1) == 0
    assert searched(tmp_path) == peml
    names = {path.name for path in (tmp_path / PEML).rglob("*")}
    assert "checkpoints" not in names and not any(name.endswith(".tmp") for name in names)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.02)
    return found


def record(out, name):
    path = out / "queue" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def test_another_worker_takes_over(folder, fork_server, undisturbed, tmp_path):
    first = fork_server.Process(
        target=killer.run, args=(command(folder, tmp_path),), kwargs={"when": "update", "count": 4}
    )
    first.start()
    until((tmp_path / "plan.json").is_file)
    second = fork_server.Process(
        target=killer.run, args=(["protocol", "--out", str(tmp_path), "--join"],)
    )
    second.start()
    for process in (first, second):
        process.join(timeout=120)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    records = {name: record(tmp_path, name) for name in RUNS}
    assert {r["pid"] for r in records.values()} == {second.pid}, "the first one finished a run"
    assert {r["state"] for r in records.values()} == {"done"}
    assert_same(tmp_path, undisturbed)


def runs_on(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_workers_end_with_the_process_that_started_them(folder, fork_server, tmp_path):
    arguments = command(folder, tmp_path)
    main = fork_server.Process(target=killer.run, args=([*arguments, "--workers", "2"],))
    main.start()
    try:
        begun = until(lambda: {r["pid"] for n in RUNS if (r := record(tmp_path, n))})
        assert main.pid not in begun
    finally:
        main.kill()
    main.join()
    until(lambda: not any(map(runs_on, begun)), seconds=10)
    assert run(fork_server, arguments) == 0
    assert all((tmp_path / name / "results.json").is_file() for name in RUNS)
