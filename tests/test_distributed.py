"""Two processes on the CPU: gradients, checkpoints, and going on with another number of them.

`helpers/distributed_run.py` is what they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import METHODS, make_model
from safetensors import safe_open
from safetensors.torch import load_file
from t5_factory import pemt_config, tiny_t5
from transformers import Seq2SeqTrainingArguments

import pemt_fast
from pemt_fast import checkpoint, sharding

DRIVER = Path(__file__).parent / "helpers" / "distributed_run.py"
ADAPTERS = checkpoint.WEIGHTS_FILE


def _run(processes: int, *arguments: object) -> None:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(DRIVER), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What both processes found, and where they saved."""
    folder = tmp_path_factory.mktemp("gradients")
    _run(2, "gradients", folder)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_one_process(compared: Any, method: str, way: str) -> None:
    for found in compared[1]:
        entry = found[f"{method}-{way}"]
        assert entry["alone"].keys() == entry["together"].keys()
        assert len(entry["alone"]) > 5
        assert entry["left_over"] == []
        for name, distance in entry["together"].items():
            # The same sums in another order: no further from the truth than twice one process.
            assert distance <= 2 * entry["alone"][name] + 1e-6, name
        assert entry["generates"]


def _same_bits(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("method", METHODS)
def test_files_of_a_sharded_model_are_those_of_a_whole_one(compared: Any, method: str) -> None:
    folder = compared[0]
    alone = folder / f"{method}-alone-0"
    for other in (f"{method}-alone-1", f"{method}-ddp-0", f"{method}-ddp-1", f"{method}-fsdp2-0"):
        assert _same_bits(folder / other / ADAPTERS, alone / ADAPTERS), other
        written = (folder / other / checkpoint.CONFIG_FILE).read_text()
        assert written == (alone / checkpoint.CONFIG_FILE).read_text()
    loaded = pemt_fast.load(make_model(method).unload(), alone)
    own = set(loaded._attachment.untouched_names())
    with safe_open(folder / f"{method}-fsdp2-0" / ADAPTERS, "pt") as file:
        assert not {key.removeprefix("base_model.") for key in file.keys()} & own


# Name -> how many processes, sharded or not, and from whose checkpoint in the middle.
RUNS: dict[str, tuple[int, str, str | None]] = {
    "one": (1, "ddp", None),
    "two": (2, "ddp", None),
    "two sharded": (2, "fsdp2", None),
    "one, then two": (2, "ddp", "one"),
    "one, then two sharded": (2, "fsdp2", "one"),
    "two, then two sharded": (2, "fsdp2", "two"),
    "two sharded, then two": (2, "ddp", "two sharded"),
    "two, then one": (1, "ddp", "two"),
    "two sharded, then one": (1, "ddp", "two sharded"),
}
TRAINED = ("pemt", "mtl_lora")  # neither draws anything


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in as few starts of processes as their order allows."""
    folder = tmp_path_factory.mktemp("runs")

    def plan(names: list[str]) -> Path:
        entries = []
        for method in TRAINED:
            for name in names:
                _, way, start = RUNS[name]
                resume = str(folder / method / start / "checkpoint-2") if start else None
                directory = str(folder / method / name)
                entries.append(
                    {"way": way, "method": method, "directory": directory, "resume": resume}
                )
        path = folder / f"plan{len(list(folder.glob('plan*')))}.json"
        path.write_text(json.dumps(entries))
        return path

    _run(1, "train", plan(["one"]))
    _run(2, "train", plan([name for name, (processes, _, _) in RUNS.items() if processes == 2]))
    _run(1, "train", plan(["two, then one", "two sharded, then one"]))
    return folder


def _difference(a: Path, b: Path) -> float:
    ours, theirs = load_file(a / ADAPTERS), load_file(b / ADAPTERS)
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).norm() / ours[k].norm().clamp_min(1e-9)).item() for k in ours)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one"])
@pytest.mark.parametrize("method", TRAINED)
def test_training_ends_where_one_process_ends(trained: Path, method: str, name: str) -> None:
    one = trained / method / "one"
    assert _difference(one / "checkpoint-2", one / "final") > 1e-3  # it does train
    assert _difference(one / "final", trained / method / name / "final") < 1e-5


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("method", TRAINED)
def test_checkpoints_hold_adapters_only(trained: Path, method: str, name: str) -> None:
    folder = trained / method / name / "checkpoint-4"
    random = "rng_state" if RUNS[name][0] == 2 else "rng_state.pth"
    found = {path.name for path in folder.iterdir() if not path.name.startswith(random)}
    assert found == {
        checkpoint.CONFIG_FILE, ADAPTERS, "optimizer.pt", "scheduler.pt", "trainer_state.json",
        "training_args.bin",
    }  # fmt: skip
    model = make_model(method)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(trainable)
    with safe_open(folder / ADAPTERS, "pt") as file:
        assert set(file.keys()) == set(model.adapter_state_dict())


def test_shard_needs_processes_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pemt_fast.get_model(tiny_t5(), pemt_config())
    with pytest.raises(RuntimeError, match="run under torchrun"):
        pemt_fast.shard(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match=r"_no_split_modules, which is \[\]"):
        pemt_fast.shard(torch.nn.Linear(2, 2))


def test_what_needs_whole_parameters_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pemt_fast.get_model(tiny_t5(), pemt_fast.LoraConfig(num_tasks=1))
    monkeypatch.setattr("pemt_fast.attached.any_sharded", lambda tensors: True)
    for call in (model.merge, model.unload, lambda: model.disabled().__enter__()):
        with pytest.raises(RuntimeError, match="FSDP2 has sharded them"):
            call()


def test_partitions_of_zero_3_are_not_written(tmp_path: Path) -> None:
    model = pemt_fast.get_model(tiny_t5(), pemt_fast.LoraConfig(num_tasks=1))
    parameter: Any = next(p for p in model.parameters() if p.requires_grad)
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        model.save_pretrained(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_older_trainers_refuse_a_sharded_model(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    model = pemt_fast.get_model(tiny_t5(), pemt_fast.LoraConfig(num_tasks=1))
    arguments = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = pemt_fast.AdapterTrainer(model=model, args=arguments)
    monkeypatch.delattr(trainer, "is_distributed_loading_by_transformers", raising=False)
    monkeypatch.setattr(sharding, "any_sharded", lambda tensors: True)
    with pytest.raises(RuntimeError, match="cannot train a model that is sharded already"):
        trainer._prepare_for_training(1, None, None)
