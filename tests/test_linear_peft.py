"""Poly, MHR and LoRA on T5 and Llama against peft, in outputs, losses and gradients."""

import json

import pytest
import torch
from linear_models import METHODS, MODELS, TASKS, adapted, tiny_inputs, tiny_model
from safetensors.torch import load_file
from t5_factory import randomise

import pemt_fast
from pemt_fast.interop.peft_files import export_peft_lora, load_peft
from pemt_fast.nn.adapted_linear import AdaptedLinear

peft = pytest.importorskip("peft", reason="peft is a development dependency")
TASK_IDS = torch.tensor([2, 0, 1, 0])


def layers_of(model):
    return {
        name.removeprefix("base_model."): module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }


def poly_pair(kind, method):
    """Our model and peft's with the same values."""
    ours = adapted(method, kind)
    config = ours.adapter_config
    theirs = peft.get_peft_model(
        tiny_model(kind),
        peft.PolyConfig(
            task_type="SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM", r=config.r,
            n_tasks=TASKS, n_skills=config.num_skills, n_splits=config.num_splits,
            target_modules=list(config.target_modules),
        ),
    )  # fmt: skip
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in layers_of(ours).items():
        with torch.no_grad():
            twin = modules[name]
            twin.poly_router["default"].module_logits.copy_(layer.router.logits.flatten(1))
            twin.poly_lora_A["default"].copy_(
                layer.a.transpose(-1, -2).view_as(twin.poly_lora_A["default"])
            )
            twin.poly_lora_B["default"].copy_(layer.b.view_as(twin.poly_lora_B["default"]))
    return ours, theirs, modules


def relative(actual, expected):
    difference = (actual - expected).detach().norm()
    return float(difference / expected.detach().norm().clamp_min(1e-12))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", ["poly", "mhr"])
@pytest.mark.parametrize("kind", MODELS)
def test_poly_equals_peft(kind, method, training):
    """In training the noise is the same because both draw it layer by layer from one generator."""
    ours, theirs, modules = poly_pair(kind, method)
    inputs = tiny_inputs(kind)
    losses = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.train(training)
        torch.manual_seed(13)
        losses[name] = model(**inputs, task_ids=TASK_IDS)
        losses[name].loss.backward()
    assert relative(losses["ours"].logits, losses["theirs"].logits) < 1e-6
    assert relative(losses["ours"].loss, losses["theirs"].loss) < 1e-6
    for name, layer in layers_of(ours).items():
        twin = modules[name]
        pairs = [
            (layer.router.logits.grad.flatten(1), twin.poly_router["default"].module_logits.grad),
            (layer.a.grad.transpose(-1, -2), twin.poly_lora_A["default"].grad),
            (layer.b.grad, twin.poly_lora_B["default"].grad),
        ]
        for grad, expected in pairs:
            # Of sums over the batch whose terms cancel, so relative to the largest.
            difference = (grad.reshape(expected.shape) - expected).abs().max()
            assert float(difference) <= 1e-6 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize("kind", MODELS)
def test_lora_equals_peft(kind):
    ours = adapted("lora", kind)
    config = ours.adapter_config
    theirs = peft.get_peft_model(
        tiny_model(kind),
        peft.LoraConfig(
            r=config.r, lora_alpha=config.alpha, target_modules=list(config.target_modules)
        ),
    )
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in layers_of(ours).items():
        with torch.no_grad():
            modules[name].lora_A["default"].weight.copy_(layer.mixture.w_down)
            modules[name].lora_B["default"].weight.copy_(layer.mixture.w_up.t())
    inputs = tiny_inputs(kind)
    out, expected = ours(**inputs), theirs(**inputs)
    assert relative(out.logits, expected.logits) < 1e-6
    out.loss.backward()
    expected.loss.backward()
    for name, layer in layers_of(ours).items():
        twin = modules[name]
        assert relative(layer.mixture.w_down.grad, twin.lora_A["default"].weight.grad) < 1e-5
        assert relative(layer.mixture.w_up.grad.t(), twin.lora_B["default"].weight.grad) < 1e-5


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "mix-lora"])
def test_a_task_written_as_a_lora_is_the_same_in_peft(method, kind, tmp_path):
    ours, inputs = adapted(method, kind), tiny_inputs(kind)
    for task in (1, pemt_fast.UNSEEN_TASK):
        export_peft_lora(ours, tmp_path, task)
        theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path)
        with torch.no_grad():
            expected = ours(**inputs, task_ids=[task] * 4).logits
            assert relative(theirs(**inputs).logits, expected) < 1e-5
            # What peft loads, we load.
            again = load_peft(tiny_model(kind), tmp_path) if task == 1 else ours
            assert relative(again(**inputs, task_ids=[task] * 4).logits, expected) < 1e-5


def test_unused_skills_are_not_written(tmp_path):
    ours = adapted("c-poly")
    export_peft_lora(ours, tmp_path, 1)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == (3 + 1) * 2  # three common skills and one of the task's own


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_poly_of_peft_is_read(method, tmp_path):
    ours, theirs, _ = poly_pair("t5", method)
    theirs.save_pretrained(tmp_path)
    again, inputs = load_peft(tiny_model("t5"), tmp_path), tiny_inputs("t5")
    with torch.no_grad():
        expected = theirs.eval()(**inputs, task_ids=TASK_IDS).logits
        assert relative(again(**inputs, task_ids=TASK_IDS).logits, expected) < 1e-6
    assert again.adapter_config.num_skills == ours.adapter_config.num_skills


def test_a_lora_comes_back_bit_by_bit(tmp_path):
    """From peft, to peft again and back, whatever its rank, alpha and dropout."""
    theirs = peft.get_peft_model(
        tiny_model("t5"),
        peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.25, target_modules=["q", "wo"]),
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    export_peft_lora(load_peft(tiny_model("t5"), tmp_path / "theirs"), tmp_path / "ours")
    file = "adapter_model.safetensors"
    first, again = (load_file(tmp_path / name / file) for name in ("theirs", "ours"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    config = load_peft(tiny_model("t5"), tmp_path / "ours").adapter_config
    assert (config.r, config.alpha, config.dropout) == (3, 7, 0.25)
    peft.PeftModel.from_pretrained(tiny_model("t5"), tmp_path / "ours")


def test_ranks_that_differ_by_layer_are_filled_up(tmp_path):
    theirs = peft.get_peft_model(
        tiny_model("t5"),
        peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=["q", "wo"], rank_pattern={"wo": 6},
            alpha_pattern={"wo": 12},
        ),
    )  # fmt: skip
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = load_peft(tiny_model("t5"), tmp_path / "theirs").eval()
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[6, 7]])}
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits)
    export_peft_lora(ours, tmp_path / "ours")
    again = load_peft(tiny_model("t5"), tmp_path / "ours").eval()
    assert torch.equal(again(**batch).logits, ours(**batch).logits)


def test_what_is_no_lora_is_refused(tmp_path):
    ours = adapted("lora")
    export_peft_lora(ours, tmp_path)
    config = tmp_path / "adapter_config.json"
    good = json.loads(config.read_text())
    for changes, message in (
        ({"peft_type": "IA3"}, "peft_type must be LORA or POLY, got 'IA3'"),
        ({"use_dora": True}, "use_dora = True has no counterpart"),
        ({"target_modules": ["k"]}, "does not fit this model"),
        ({"r": 3}, "rank 3 of .* does not fit its tensors, which have 4"),
        ({"r": None}, "r must be an integer of at least 1, got None"),
        ({"r": 10**12}, "r = 1000000000000 is no size of the tensors beside it"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, got 'x'"),
        ({"alpha_pattern": {"SelfAttention.q": 1}}, "alpha / rank must be .* is 0.25"),
        ({"rank_pattern": {"(a+)+$": 4}}, "must map names of layers to numbers"),
    ):
        config.write_text(json.dumps({**good, **changes}))
        plain = tiny_model("t5")
        names = list(plain.state_dict())
        with pytest.raises(ValueError, match=message):
            load_peft(plain, tmp_path)
        assert list(plain.state_dict()) == names
    with pytest.raises(FileNotFoundError, match="adapter_config.json: expected a file"):
        load_peft(tiny_model("t5"), tmp_path / "elsewhere")
