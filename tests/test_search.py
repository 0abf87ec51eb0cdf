"""`SearchTrainer`: schedule, rates, bi-level gradients, and a search that was interrupted."""

import copy

import pytest
import torch
from linear_models import tiny_inputs, tiny_model
from transformers import Seq2SeqTrainingArguments, TrainerCallback

import pemt_fast
from pemt_fast.training.search import SearchTrainer

ROWS, STEPS = 8, 6


def searched(sharing="none", seed=0, **changes):
    torch.manual_seed(seed)
    options = {"r": 2, "prefix_length": 4, "prefix_width": 8, "sharing": sharing, **changes}
    return pemt_fast.get_model(tiny_model("t5"), pemt_fast.PemlConfig(**options))


def dataset(seed=1):
    inputs = tiny_inputs("t5", ROWS)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, 80, inputs["labels"].shape, generator=generator)
    inputs["labels"] = labels
    return [{name: t[b].tolist() for name, t in inputs.items()} for b in range(ROWS)]


def trainer_of(model, folder, *, own=None, **options):
    arguments = Seq2SeqTrainingArguments(
        str(folder), **{
            "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3,
            "lr_scheduler_type": "constant", "report_to": [], "save_steps": 1, "use_cpu": True,
            "logging_steps": 1, "disable_tqdm": True, "seed": 5, **options,
        },
    )  # fmt: skip
    return SearchTrainer(model, arguments, train_dataset=dataset(), architecture_dataset=own)


class Watch(TrainerCallback):
    """What the model looks like in each step, and a kill after one of them."""

    def __init__(self, model, stop_after=None):
        self.model, self.stop_after, self.seen = model, stop_after, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Before the update."""
        schedule = self.model.schedule
        self.seen.append((schedule.temperature.item(), schedule.entropy_weight.item()))

    def on_save(self, args, state, control, **kwargs):
        """A checkpoint is complete."""
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_every_step_has_its_place_on_the_schedule(tmp_path):
    model = searched(temperature=(2.0, 0.5), entropy_weight=0.3)
    trainer = trainer_of(model, tmp_path)
    watch = Watch(model)
    trainer.add_callback(watch)
    trainer.train()
    temperatures, weights = zip(*watch.seen, strict=True)
    assert temperatures == pytest.approx([2.0 * 0.25 ** (i / 5) for i in range(6)])
    assert weights == pytest.approx([0.3 * i / 5 for i in range(6)])


def test_rates_and_history(tmp_path):
    model = searched(architecture_learning_rate=0.2)
    before = values(model)
    trainer = trainer_of(model, tmp_path, weight_decay=0.1)
    trainer.train()
    architecture = {id(p) for p in model.router_parameters()}
    groups = {g["lr"]: g for g in trainer.optimizer.param_groups if g["params"]}
    assert groups.keys() == {1e-3, 0.2}
    assert {id(p) for p in groups[0.2]["params"]} == architecture
    assert groups[0.2]["weight_decay"] == 0.0
    # AdamW's first updates are as large as the rate.
    for name, parameter in model.named_parameters():
        if id(parameter) in architecture:
            assert 0.1 < (parameter - before[name]).abs().max() < 2.0
    history = trainer.history
    assert [entry["step"] for entry in history] == list(range(1, STEPS + 1))
    weights = torch.tensor(history[-1]["weights"])
    assert weights.shape == (6, 2, len(model.adapter_config.operators))
    torch.testing.assert_close(weights, torch.stack(model.architecture_weights()))


@pytest.mark.parametrize("bilevel", [False, True], ids=["single-level", "bi-level"])
@pytest.mark.parametrize("stop_after", [1, 4])
def test_an_interrupted_search_ends_with_the_same_architecture(stop_after, bilevel, tmp_path):
    own = dataset(seed=2) if bilevel else None
    whole = searched()
    trainer_of(whole, tmp_path / "whole", own=own).train()
    model = searched()
    trainer = trainer_of(model, tmp_path / "parts", own=own)
    trainer.add_callback(Watch(model, stop_after))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not torch.equal(model.logits()[0].alpha, whole.logits()[0].alpha)
    resumed = searched(seed=9)  # a new process: other values until the checkpoint is read
    again = trainer_of(resumed, tmp_path / "parts", own=own)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{stop_after}"))
    torch.testing.assert_close(values(resumed), values(whole), rtol=0, atol=0)
    assert resumed.architecture() == whole.architecture()
    assert [entry["step"] for entry in again.history] == list(range(1, STEPS + 1))


def gradients_of_a_step(model, trainer):
    """What the first optimizer step sees."""
    found = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            )
            raise KeyboardInterrupt

    trainer.add_callback(Catch())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bi_level_takes_the_gradient_of_the_architecture_from_its_own_data(accumulation, tmp_path):
    options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation}
    options["per_device_train_batch_size"] = ROWS // accumulation
    single, both = searched(), searched()
    plain = gradients_of_a_step(single, trainer_of(single, tmp_path, **options))
    own = dataset(seed=2)
    found = gradients_of_a_step(both, trainer_of(both, tmp_path, own=own, **options))
    names = {n for n in plain if n.endswith("alpha")}
    for name in plain.keys() - names:
        torch.testing.assert_close(found[name], plain[name])
    assert not any(torch.allclose(found[name], plain[name]) for name in names)
    model = copy.deepcopy(both).train()
    model.zero_grad()
    model.search_at(0.0)
    trainer = trainer_of(searched(), tmp_path, own=own, **options)
    for trainer.backward_passes in range(accumulation):
        (model(**trainer.architecture_batch()).loss / accumulation).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if n in names}
    torch.testing.assert_close({n: found[n] for n in names}, expected)


def test_every_pass_draws_rows_of_its_own(tmp_path):
    trainer = trainer_of(
        searched(), tmp_path, own=dataset(seed=2), gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
    )  # fmt: skip
    drawn = {}
    for trainer.state.global_step in range(4):
        for trainer.backward_passes in range(2):
            first, again = trainer.architecture_batch(), trainer.architecture_batch()
            assert first["labels"].shape[0] == 3 and torch.equal(first["labels"], again["labels"])
            drawn[tuple(map(tuple, first["labels"].tolist()))] = True
    assert len(drawn) == 8


def test_only_what_is_searched(tmp_path):
    model = searched()
    model.discretise()
    with pytest.raises(ValueError, match="must be a PemlModel whose architecture is searched"):
        trainer_of(model, tmp_path)
    lora = pemt_fast.get_model(tiny_model("t5"), pemt_fast.LoraConfig(r=2))
    with pytest.raises(ValueError, match="is searched, got LinearAdapterModel"):
        trainer_of(lora, tmp_path)
