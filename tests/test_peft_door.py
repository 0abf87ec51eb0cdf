"""peft's own calls with our methods: the same bits as without peft, and what is refused."""

import copy
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch
from linear_models import tiny_inputs, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from t5_factory import randomise
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import pemt_fast
from pemt_fast import checkpoint

peft = pytest.importorskip("peft", reason="peft is an optional dependency")

from peft_cases import (  # noqa: E402
    CASES,
    directly,
    door_config,
    logits,
    method_config,
    task_ids,
    through_the_door,
)

from pemt_fast.integrations import peft as door  # noqa: E402
from pemt_fast.integrations.peft import guard  # noqa: E402

every_case = pytest.mark.parametrize("case", CASES)
MERGING = ("lora", "multi-lora", "mtl-lora", "poly", "mhr", "c-poly", "moe-lora")
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def names(model):
    """What is attached, by its name in peft's files."""
    return {f"base_model.model.{name}" for name in model.get_base_model().adapter_state_dict()}


def saved_names(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return set(file.keys())


# --- the same bits -------------------------------------------------------------------------------


def test_every_method_is_among_the_cases_and_has_a_config():
    used = {type(method_config(case)).__name__ for case in CASES}
    ours = {own.__name__ for own in checkpoint.config_classes().values()}
    assert used == ours
    assert {name for name in door.__all__ if name.endswith("Config")} == ours | {"PemtFastConfig"}


@every_case
def test_outputs_losses_and_gradients_are_ours(case):
    results = []
    for build in (through_the_door, directly):
        model = randomise(build(case)).train()
        torch.manual_seed(11)  # noise of the routers, dropout
        out = model(**tiny_inputs("t5"), task_ids=task_ids(model))
        out.loss.backward()
        grads = {
            n.removeprefix("base_model.model."): p.grad
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        results.append((out.logits, out.loss, grads))
    (first, loss, grads), (second, other, others) = results
    assert torch.equal(first, second) and torch.equal(loss, other)
    assert grads.keys() == others.keys()
    used = {n for n, grad in grads.items() if grad is not None}  # a found operator may be `none`
    assert used == {n for n, grad in others.items() if grad is not None} and used
    assert [n for n in used if not torch.equal(grads[n], others[n])] == []
    model = through_the_door(case)
    assert isinstance(model, peft.PeftModel)
    assert model.get_nb_trainable_parameters() == directly(case).count_parameters()


@every_case
@pytest.mark.parametrize("beams", [1, 2])
def test_generated_tokens_are_ours(case, beams):
    inputs = tiny_inputs("t5")
    options = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
               "num_beams": beams, "max_length": 8}  # fmt: skip
    first, second = randomise(through_the_door(case)).eval(), randomise(directly(case)).eval()
    found = first.generate(**options, task_ids=task_ids(first))
    assert torch.equal(found, second.generate(**options, task_ids=task_ids(second)))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_decoder_only(task_type, tmp_path):
    model = randomise(through_the_door("c-poly", "llama", task_type=task_type))
    expected = logits(randomise(directly("c-poly", "llama")), "llama")
    assert torch.equal(logits(model, "llama"), expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again, "llama"), expected)
    assert isinstance(again, peft.PeftModelForCausalLM)
    # By this name transformers' trainer knows that label smoothing has to shift the labels.
    assert model.base_model.model._get_name() == "LlamaForCausalLM"


@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
def test_the_methods_dtype_holds(adapter_dtype):
    base = tiny_model("t5").to(torch.bfloat16)
    model = peft.get_peft_model(base, door_config("c-poly", adapter_dtype=adapter_dtype))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if adapter_dtype else torch.bfloat16}


def test_task_ids_matter():
    model = randomise(through_the_door("c-poly", task_type="SEQ_2_SEQ_LM"))
    assert not torch.equal(logits(model, task_ids=[0] * 4), logits(model, task_ids=[1] * 4))
    missing = "task_ids must give the task of each of the 4 sequences"
    with pytest.raises(ValueError, match=missing):
        model(**tiny_inputs("t5"))
    # peft's own class drops them, which no method that needs them lets pass.
    by_hand = peft.PeftModelForSeq2SeqLM(tiny_model("t5"), door_config("c-poly"))
    with pytest.raises(ValueError, match=missing):
        by_hand(**tiny_inputs("t5"), task_ids=[0] * 4)


@pytest.mark.parametrize("case", ["pemt-stage-2", "c-poly", "peml-found"])
def test_gradient_checkpointing(case):
    grads = []
    for checkpointing in (False, True):
        model = randomise(through_the_door(case, task_type="SEQ_2_SEQ_LM")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(11)
        model(**tiny_inputs("t5"), task_ids=task_ids(model), use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.slow
@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
def test_compiled_without_graph_breaks(task_type):
    model = randomise(through_the_door("c-poly", task_type=task_type)).eval()
    inputs = {**tiny_inputs("t5"), "task_ids": torch.tensor([2, 0, 1, 0])}
    with torch.no_grad():
        expected = model(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(**inputs).logits, expected)
    torch._dynamo.reset()


# --- files ---------------------------------------------------------------------------------------


@every_case
def test_saved_and_loaded(case, tmp_path):
    model = randomise(through_the_door(case))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert saved_names(tmp_path) == names(model)
    own = {f"base_model.model.base_model.{name}" for name in tiny_model("t5").state_dict()}
    trained = {n for n in own if case == "full" or "layer_norm" in n}  # copies, trained
    assert saved_names(tmp_path) & own <= trained
    again = peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.get_nb_trainable_parameters()[0] == 0 and not again.training
    assert again.peft_config["default"].method_config == model.base_model.model.adapter_config
    # The library itself reads the directory too, without peft.
    assert torch.equal(logits(pemt_fast.load(tiny_model("t5"), tmp_path)), expected)


def test_training_goes_on_from_a_file(tmp_path):
    model = randomise(through_the_door("pemt-stage-2"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path, is_trainable=True)
    found = {n for n, p in again.named_parameters() if p.requires_grad}
    assert found == trained and not any("mixture" in n for n in found)  # the sources are frozen
    again.set_adapter("default", inference_mode=True)
    assert again.get_nb_trainable_parameters()[0] == 0
    again.set_adapter("default")
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained


def test_the_config_is_read_alone_and_by_auto_classes(tmp_path):
    base = tiny_model("t5")
    base.save_pretrained(tmp_path / "base")
    named = type(base).from_pretrained(tmp_path / "base")
    model = randomise(peft.get_peft_model(named, door_config("c-poly")))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapters")
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapters")
    assert type(config) is door.CPolyConfig and config.num_common == 3
    assert config.base_model_name_or_path == str(tmp_path / "base")
    again = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapters")
    assert isinstance(again, peft.PeftModelForSeq2SeqLM)
    assert torch.equal(logits(again), expected)


def test_an_adapter_may_have_another_name(tmp_path):
    model = peft.get_peft_model(tiny_model("t5"), door_config("c-poly"), adapter_name="mine")
    expected = logits(randomise(model))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path / "mine", "other")
    assert torch.equal(logits(again), expected) and again.active_adapters == ["other"]


def test_a_resized_vocabulary_is_saved_as_peft_does(tmp_path):
    base = tiny_model("t5")
    base.save_pretrained(tmp_path / "base")

    def resized():
        torch.manual_seed(4)
        model = type(base).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(90)
        return model

    model = randomise(peft.get_peft_model(resized(), door_config("lora")))
    expected = logits(model)
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained(tmp_path / "adapters")
    assert names(model) < saved_names(tmp_path / "adapters")
    again = resized()
    again.get_input_embeddings().weight.data.zero_()
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapters")
    assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match=r"unexpected \['base_model.lm_head.weight'"):
        pemt_fast.load(resized(), tmp_path / "adapters")


@pytest.mark.parametrize("sharing", ["none", "network"])
def test_a_finished_search_is_what_is_saved(sharing, tmp_path):
    model = randomise(through_the_door("peml-search", sharing=sharing))
    before = copy.deepcopy(model.peft_config["default"])
    model.discretise()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert before.architecture is None and model.peft_config["default"].architecture is not None
    again = peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path)
    assert torch.equal(logits(again), expected)


def test_sources_of_stage_2_may_come_through_the_door(tmp_path, monkeypatch):
    for name in ("a", "b"):
        source = randomise(through_the_door("pemt-stage-1", target=name), seed=ord(name))
        source.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("a", "b")]
    config = door.PemtConfig(sources=folders, target="t", prompt_length=4, target_bottleneck=8)
    model = peft.get_peft_model(tiny_model("t5"), config)
    found = model.get_base_model().adapter_state_dict()
    saved = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert any(torch.equal(v, found["prompt.sources.1"]) for k, v in saved.items() if "prompt" in k)
    assert config.sources == tuple(folders)  # the user's config stays as it was
    assert model.peft_config["default"].sources == ("a", "b")
    expected = logits(randomise(model))
    model.save_pretrained(tmp_path / "t")
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # a folder named like a source is not looked at
    again = peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path / "t")
    assert torch.equal(logits(again), expected)


def test_damaged_files(tmp_path):
    randomise(through_the_door("c-poly")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    first = sorted(good)[0]
    for tensors, message in (
        ({k: v for k, v in good.items() if k != first}, r"missing \['base_model.decoder"),
        ({**good, "base_model.model.more": good[first].clone()}, r"unexpected \['more'\]"),
        ({**good, first: good[first][:1].clone()}, "must have shape"),
    ):
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        with pytest.raises(ValueError, match=message):
            peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path)
        with pytest.raises(ValueError, match=message):
            pemt_fast.load(tiny_model("t5"), tmp_path)
    config = tmp_path / "adapter_config.json"
    values = json.loads(config.read_text())
    for changes, message in (
        ({"num_task": 3}, r"unknown CPolyConfig keys \['num_task'\]"),
        ({"method": "d_poly"}, "method must be one of"),
        ({"format": 2}, "expected format 1"),
    ):
        changed = {**values, "pemt_fast": {**values["pemt_fast"], **changes}}
        config.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            peft.PeftConfig.from_pretrained(tmp_path)
    config.write_text(json.dumps({**values, "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="peft_type must be PEMT_FAST, got 'LORA'; load_peft"):
        pemt_fast.load(tiny_model("t5"), tmp_path)


def test_fields_of_a_newer_peft_are_left_out_with_its_warning(tmp_path):
    through_the_door("c-poly").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_next_year": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['of_next_year'\]"):
        assert peft.PeftConfig.from_pretrained(tmp_path).num_tasks == 3


def test_a_config_from_a_file_does_not_pass_for_its_weights(tmp_path):
    randomise(through_the_door("pemt-stage-2")).save_pretrained(tmp_path / "one")
    config = peft.PeftConfig.from_pretrained(tmp_path / "one")
    model = peft.get_peft_model(tiny_model("t5"), config)
    for call in (
        lambda: model(**tiny_inputs("t5")),
        lambda: model.generate(input_ids=tiny_inputs("t5")["input_ids"]),
        lambda: model.save_pretrained(tmp_path / "two"),
    ):
        with pytest.raises(RuntimeError, match="its weights were not loaded: PeftModel.from_pretr"):
            call()
    model.load_adapter(tmp_path / "one", "default")
    assert logits(model).isfinite().all()


# --- switching off, merging, taking away ---------------------------------------------------------


@every_case
def test_disabled_and_unloaded(case):
    with torch.no_grad():
        expected = tiny_model("t5")(**tiny_inputs("t5")).logits
    model = randomise(through_the_door(case))
    adapted = logits(model)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        assert model.get_model_status().enabled is False
    assert torch.equal(logits(model), adapted)
    status = model.get_model_status()
    assert status.enabled is True and status.requires_grad == {"default": True}
    plain = model.unload()
    with torch.no_grad():
        assert torch.equal(plain(**tiny_inputs("t5")).logits, expected)
    assert list(plain.state_dict()) == list(tiny_model("t5").state_dict())


@pytest.mark.parametrize("case", MERGING)
def test_merged_for_good(case):
    model = randomise(through_the_door(case), scale=0.3)
    wanted = [1] * 4 if len(model.tasks) > 1 else [0] * 4
    expected = logits(model, task_ids=wanted)
    model.merge_adapter(safe_merge=True, task=wanted[0])
    assert model.get_model_status().merged_adapters == ["default"]
    torch.testing.assert_close(logits(model, task_ids=wanted), expected, rtol=1e-4, atol=1e-4)
    merged = logits(model, task_ids=wanted)
    model.unmerge_adapter()
    assert torch.equal(logits(model, task_ids=wanted), expected)
    plain = model.merge_and_unload(task=wanted[0])
    with torch.no_grad():
        assert torch.equal(plain(**tiny_inputs("t5")).logits, merged)
    assert list(plain.state_dict()) == list(tiny_model("t5").state_dict())


@pytest.mark.parametrize("case", [case for case in CASES if case not in MERGING])
def test_what_does_not_merge_says_so_and_stays(case):
    model = randomise(through_the_door(case))
    expected = logits(model)
    with pytest.raises(ValueError, match="merge|take in|depends"):
        model.merge_and_unload()
    assert torch.equal(logits(model), expected)


def test_merging_needs_a_task_and_finite_values():
    model = randomise(through_the_door("c-poly"))
    with pytest.raises(ValueError, match=r"task must be one of \['0', '1', '2'\], got None"):
        model.merge_and_unload()
    lora = randomise(through_the_door("lora"))
    layer = lora.get_base_model().get_submodule(
        "base_model.encoder.block.0.layer.0.SelfAttention.q"
    )
    before = layer.weight.clone()
    next(p for p in lora.parameters() if p.requires_grad).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="would not be finite; nothing was merged"):
        lora.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.weight, before) and lora.get_model_status().merged_adapters == []


# --- training ------------------------------------------------------------------------------------


def rows(model):
    inputs = tiny_inputs("t5")
    ids = task_ids(model)
    return [{**{k: v[b].tolist() for k, v in inputs.items()}, "task_ids": ids[b]} for b in range(4)]


def trainer_of(model, folder, **options):
    arguments = Seq2SeqTrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, report_to=[],
        save_steps=1, eval_strategy="steps", eval_steps=1, use_cpu=True, disable_tqdm=True,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", seed=3, **options,
    )  # fmt: skip
    data = rows(model)
    return Seq2SeqTrainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize(
    "case", ["pemt-stage-1", "pemt-stage-2", "c-poly", "peml-found", "prompts"]
)
def test_the_trainer_writes_adapters_only_and_resumes(case, tmp_path):
    model = through_the_door(case, task_type="SEQ_2_SEQ_LM")
    options = {"predict_with_generate": True, "generation_max_length": 6}
    trainer = trainer_of(model, tmp_path / "first", **options)
    trainer.train()
    folders = sorted((tmp_path / "first").glob("checkpoint-*"))
    assert [path.name for path in folders] == [f"checkpoint-{i}" for i in (1, 2, 3)]
    for folder in folders:
        weights = {p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt")}
        assert weights <= {
            "adapter_model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt",
        }  # fmt: skip
        assert saved_names(folder) == names(model)
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    state = model.state_dict()
    assert [name for name, tensor in best.items() if not torch.equal(tensor, state[name])] == []
    # A second run from the first step on ends where the first one ended.
    other = trainer_of(
        through_the_door(case, seed=8, task_type="SEQ_2_SEQ_LM"), tmp_path / "second", **options
    )
    other.train(resume_from_checkpoint=str(folders[0]))
    last, again = (
        load_file(tmp_path / run / "checkpoint-3" / "adapter_model.safetensors")
        for run in ("first", "second")
    )
    assert [name for name, tensor in last.items() if not torch.equal(tensor, again[name])] == []
    start = load_file(folders[0] / "adapter_model.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in last.items())


def test_the_best_checkpoint_is_put_back(tmp_path):
    model = through_the_door("c-poly", task_type="SEQ_2_SEQ_LM")
    trainer = trainer_of(model, tmp_path, greater_is_better=True)  # the first one has most loss
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best, last = (
        load_file(tmp_path / f"checkpoint-{i}" / "adapter_model.safetensors") for i in (1, 3)
    )
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in best.items())
    assert not all(torch.equal(tensor, state[name]) for name, tensor in last.items())


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_done_says_what_to_do(tmp_path):
    model = randomise(through_the_door("c-poly"))
    model.save_pretrained(tmp_path)
    expected, inputs, config = logits(model), tiny_inputs("t5"), model.peft_config["default"]
    t5_with_a_lora = peft.get_peft_model(tiny_model("t5"), peft.LoraConfig()).base_model.model
    one = "a model carries one pemt_fast adapter: several tasks share it"
    for call, error, message in (
        (lambda: model.add_adapter("second", door_config("c-poly")), RuntimeError, one),
        (lambda: model.load_adapter(tmp_path, "second"), RuntimeError, one),
        (lambda: model.add_weighted_adapter(["default"], [1.0], "sum"), RuntimeError, one),
        (lambda: model.base_model.set_adapter("second"), ValueError, one),
        (lambda: model.merge_adapter(["second"]), ValueError, one),
        (lambda: model.set_adapter("second"), ValueError, "Adapter second not found"),
        (lambda: model.delete_adapter("default"), RuntimeError, r"unload\(\) takes the only"),
        (lambda: model(**inputs, task_ids=[0] * 4, adapter_names=["default"] * 4), ValueError,
         "task_ids gives the task of each sequence"),
        (lambda: model.generate(**inputs, adapter_names=["default"] * 4), ValueError,
         "task_ids gives the task of each sequence"),
        (lambda: peft.get_peft_model(model, door_config("lora")), RuntimeError,
         "carries adapters of peft already"),
        (lambda: peft.get_peft_model(model.get_base_model().base_model, door_config("lora")),
         RuntimeError, "already carries pemt_fast adapters"),
        (lambda: peft.get_peft_model(tiny_model("t5"), door_config("lora"), mixed=True),
         ValueError, "PEMT_FAST"),
        (lambda: peft.get_peft_model(tiny_model("t5"), door_config("lora"),
                                     low_cpu_mem_usage=True),
         ValueError, "low_cpu_mem_usage must be False"),
        (lambda: peft.get_peft_model(t5_with_a_lora, door_config("lora")), RuntimeError,
         "a T5ForConditionalGeneration, carries adapters of peft already"),
        (lambda: peft.inject_adapter_in_model(door_config("lora"), tiny_model("t5")), ValueError,
         "Please use `get_peft_model`"),
        (lambda: peft.get_peft_model(tiny_model("llama"), door_config("pemt-stage-2")), TypeError,
         "model must be a T5ForConditionalGeneration"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"] and model.peft_config["default"] is config
    with model.disable_adapter(), pytest.raises(RuntimeError, match="can neither be saved"):
        model.save_pretrained(tmp_path)
    lora = randomise(through_the_door("lora"))
    lora.save_pretrained(tmp_path)
    lora.merge_adapter()
    with pytest.raises(RuntimeError, match=r"unmerge_adapter\(\) first"):
        lora.load_adapter(tmp_path, "default")


def test_configs_are_ours_under_peft():
    config = door.CPolyConfig(4, num_common=2, task_type="SEQ_2_SEQ_LM", tokenizer=object())
    assert isinstance(config, peft.PeftConfig)
    assert config.method_config == pemt_fast.CPolyConfig(4, num_common=2)
    assert config.num_tasks == 4 and config.num_specific == 1
    assert door.PemtFastConfig.of(config.method_config, task_type="SEQ_2_SEQ_LM") == config
    assert config.to_dict()["task_type"] == "SEQ_2_SEQ_LM"
    assert "CPolyConfig(num_tasks=4" in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError, match="'num_common': make another config"):
        config.num_common = 5
    for own in checkpoint.config_classes().values():
        theirs = getattr(door, own.__name__)
        parameters = inspect.signature(theirs).parameters
        for name, parameter in inspect.signature(own).parameters.items():
            assert parameters[name] == parameter
        peft_fields = {field.name for field in dataclasses.fields(peft.PeftConfig)}
        assert parameters.keys() == {f.name for f in dataclasses.fields(own)} | peft_fields
        assert not peft_fields & {field.name for field in dataclasses.fields(own)}


def test_wrong_arguments_get_our_messages():
    for call, error, message in (
        (lambda: door.CPolyConfig(num_tasks=0), ValueError, "num_tasks must be an integer of at"),
        (lambda: door.PemtConfig(stage=3), ValueError, r"stage must be one of \[1, 2\], got 3"),
        (lambda: door.CPolyConfig(num_task=3), TypeError, "unexpected keyword argument 'num_task'"),
        (lambda: door.LoraConfig(lora_alpha=3), TypeError, "lora_alpha is called alpha in Lora"),
        (lambda: door.PolyConfig(n_tasks=3), TypeError, "n_tasks is called num_tasks in Poly"),
        (lambda: door.LoraConfig(modules_to_save=["x"]), TypeError, "has no counterpart: Full"),
        (lambda: door.LoraConfig(task_type="SEQ_CLS"), ValueError, "got 'SEQ_CLS'; for other"),
        (lambda: door.LoraConfig(task_type="SEQ2SEQ"), ValueError, "Invalid task type: 'SEQ2SEQ'"),
        (lambda: door.PemtFastConfig(), TypeError, "use one of those"),
        (lambda: door.PemtFastConfig.of(3), TypeError, "config must be one of pemt_fast's"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_tokenizer_starts_the_prompt():
    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": [11, 12, 13]}

    config = {"prompt_length": 3, "description": "text"}
    model = peft.get_peft_model(
        tiny_model("t5"), door.PromptTuningConfig(**config, tokenizer=Tokenizer())
    )
    rows = tiny_model("t5").get_input_embeddings().weight[11:14]
    assert torch.equal(model.prompt.rows(1, None)[0], rows)


# --- peft itself ---------------------------------------------------------------------------------


def peft_lora():
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(tiny_model("t5"), config)
    assert type(model) is peft.PeftModelForSeq2SeqLM
    randomise(model).eval()
    with torch.no_grad():
        return model(**tiny_inputs("t5")).logits


def test_pefts_own_types_stay_as_they_are():
    tables = (
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    )  # fmt: skip
    before = [dict(table) for table in tables]
    members = list(peft.PeftType)
    expected = peft_lora()
    importlib.reload(door)  # entered once more
    assert list(peft.PeftType) == members and members.count("PEMT_FAST") == 1
    assert [list(table) for table in tables] == [list(table) for table in before]
    assert torch.equal(peft_lora(), expected)
    assert peft.PeftType("PEMT_FAST") is peft.PeftType.PEMT_FAST
    assert logits(through_the_door("lora")).isfinite().all()


def test_pefts_insides_are_where_they_are_looked_for():
    guard.check_internals(peft)


MOVED = {
    "tuners.tuners_utils.BaseTuner._remap_adapter_state_dict_for_load": "is gone",
    "utils.peft_types.register_peft_method": "is gone",
    "mapping.PEFT_TYPE_TO_TUNER_MAPPING": "is gone",
    "peft_model.PeftModel._enable_peft_forward_hooks": "is gone",
    "utils.peft_types.PeftType._value2member_map_": "is a tuple, not a dict",
    "tuners.tuners_utils.BaseTuner.inject_adapter": "has no parameter 'model' any more",
}


@pytest.mark.parametrize("path", MOVED)
def test_moved_internals_are_named(path, monkeypatch):
    owner_path, _, name = path.rpartition(".")
    owner = peft
    for part in owner_path.split("."):
        owner = getattr(owner, part)
    if "gone" in MOVED[path]:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, () if "tuple" in MOVED[path] else lambda self: None)
    with pytest.raises(ImportError) as raised:
        guard.check_internals(peft)
    for part in (peft.__version__, path, MOVED[path], "0.21.2", "pemt_fast.get_model(model"):
        assert part in str(raised.value)


FRESH = """
import peft
before = list(peft.PeftType), set(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
del peft.tuners.tuners_utils.BaseTuner.set_requires_grad
try:
    import pemt_fast.integrations.peft
except ImportError as error:
    assert "BaseTuner.set_requires_grad is gone" in str(error), error
else:
    raise SystemExit("no error")
assert before == (list(peft.PeftType), set(peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING))
import pemt_fast
pemt_fast.get_model, pemt_fast.CPolyConfig(3)
"""
WITHOUT = """
import sys
sys.modules["peft"] = None
import pemt_fast
pemt_fast.get_model, pemt_fast.load, pemt_fast.CPolyConfig(3)
try:
    import pemt_fast.integrations.peft
except ImportError as error:
    assert "pip install 'pemt_fast[peft]'" in str(error), error
else:
    raise SystemExit("no error")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [FRESH, WITHOUT], ids=["moved", "absent"])
def test_a_door_that_does_not_open_changes_nothing(script):
    subprocess.run([sys.executable, "-c", script], check=True)
