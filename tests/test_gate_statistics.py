"""What the gates chose: sums of forward passes, in a trainer's logs and by a callback."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

import pemt_fast
from pemt_fast.nn.gate_statistics import GateStatistics


@pytest.fixture
def model() -> Any:
    model = randomise(pemt_fast.get_model(tiny_t5(), pemt_config()))
    return model.eval()


def test_means_and_entropy_by_hand() -> None:
    seen = GateStatistics(["a", "b"])
    assert seen.metrics() == {} and seen.means() == {}
    seen.add({"encoder.0": torch.tensor([[1.0, 0.0]]), "decoder.0": torch.tensor([[0.5, 0.5]])})
    seen.add({"encoder.0": torch.tensor([[0.5, 0.5], [0.0, 1.0]])})
    assert seen.means() == {"encoder.0": [0.5, 0.5], "decoder.0": [0.5, 0.5]}
    found = seen.metrics("eval_gate")
    assert list(found) == ["eval_gate_a", "eval_gate_b", "eval_gate_entropy"]
    # Encoder: one of three sequences is undecided, decoder: the only one.
    assert found["eval_gate_entropy"] == pytest.approx((1 / 3 + 1) / 2)
    seen.reset()
    assert seen.means() == {}


def test_entropy_of_a_single_source_is_zero() -> None:
    seen = GateStatistics(["a"])
    seen.add({"encoder.0": torch.ones(3, 1)})
    assert seen.metrics() == {"gate_a": 1.0, "gate_entropy": 0.0}


def test_forward_passes_are_counted(model: Any) -> None:
    batches = [tiny_batch(batch=n, seed=n) for n in (2, 3)]
    gates = [model(**batch, output_gates=True).gates for batch in batches]
    with torch.no_grad(), model.watch_gates() as seen:
        for batch in batches:
            model(**batch)
        with model.disabled():
            model(**batches[0])
        model.generate(input_ids=batches[0]["input_ids"], max_length=3)
    model(**batches[0])
    for layer, means in seen.means().items():
        expected = torch.cat([g[layer] for g in gates]).mean(0)
        torch.testing.assert_close(torch.tensor(means), expected)
    assert list(seen.means()) == list(gates[0])
    assert sum(list(seen.metrics().values())[:3]) == pytest.approx(1.0)


def test_only_while_training_or_not(model: Any) -> None:
    with model.watch_gates(training=True) as own, model.watch_gates(training=False) as other:
        model(**tiny_batch(batch=2))
        assert own.means() == {}
        model.train()
        model(**tiny_batch(batch=3))
    counted = [int(s[-1]) for s in (own._sums["encoder.0"], other._sums["encoder.0"])]
    assert counted == [3, 2]
    assert model._gate_watchers == []


class _Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def _arguments(folder: Path) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        str(folder), max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2,
        per_device_train_batch_size=3, per_device_eval_batch_size=2, learning_rate=1e-2,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip


def _rows(count: int) -> list[dict[str, Any]]:
    batch = tiny_batch(batch=count)
    return [{k: v[i] for k, v in batch.items()} for i in range(count)]


@pytest.mark.parametrize("way", ["trainer", "callback", "late callback"])
def test_logs_of_a_trainer(model: Any, tmp_path: Path, way: str) -> None:
    reporter, rows = _Reporter(), _rows(6)
    options: Any = {"model": model, "args": _arguments(tmp_path), "train_dataset": rows}
    options["eval_dataset"] = rows[:5]
    if way == "trainer":
        trainer = pemt_fast.AdapterTrainer(**options, callbacks=[reporter], gate_statistics=True)
    elif way == "callback":
        trainer = Seq2SeqTrainer(**options, callbacks=[pemt_fast.GateCallback(), reporter])
    else:
        trainer = Seq2SeqTrainer(**options)
        trainer.add_callback(pemt_fast.GateCallback())
        trainer.add_callback(reporter)
    trainer.train()
    names = [f"gate_{name}" for name in ("a", "b", "c", "entropy")]
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert len(losses) == len(evaluations) == 2
    for entry in losses:
        assert sum(entry[name] for name in names[:3]) == pytest.approx(1.0)
    assert losses[0][names[0]] != losses[1][names[0]]
    with torch.no_grad(), model.eval().watch_gates() as seen:
        batch = tiny_batch(batch=6)
        model(**{k: v[:5] for k, v in batch.items()})
    for name, value in seen.metrics("eval_gate").items():
        assert evaluations[-1][name] == pytest.approx(value, rel=1e-5)
    assert any("eval_gate_a" in logs for logs in reporter.seen)
    assert not any("gate_a" in entry for entry in history if "train_runtime" in entry)
    again = trainer.evaluate()
    assert again["eval_gate_b"] == pytest.approx(seen.metrics()["gate_b"], rel=1e-5)


def test_history_of_the_callback(model: Any, tmp_path: Path) -> None:
    callback = pemt_fast.GateCallback()
    trainer = Seq2SeqTrainer(
        model=model, args=_arguments(tmp_path), train_dataset=_rows(6), eval_dataset=_rows(2),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [2, 4]
    assert list(callback.history[0]["gates"]) == [
        "encoder.0",
        "encoder.1",
        "decoder.0",
        "decoder.1",
    ]
    callback.close()
    assert model._gate_watchers == []


def test_models_without_gates(tmp_path: Path) -> None:
    model = pemt_fast.get_model(tiny_t5(), pemt_fast.LoraConfig(num_tasks=1))
    with pytest.raises(ValueError, match="a model with gates, as PEMT's, got LinearAdapterModel"):
        pemt_fast.AdapterTrainer(model=model, args=_arguments(tmp_path), eval_dataset=_rows(2),
                                 gate_statistics=True)  # fmt: skip


def test_the_largest_entropy_is_one() -> None:
    seen = GateStatistics(list("abcde"))
    seen.add({"x": torch.full((2, 5), 0.2)})
    assert seen.metrics()["gate_entropy"] == pytest.approx(1.0)
    assert math.isclose(sum(seen.means()["x"]), 1.0, rel_tol=1e-6)
