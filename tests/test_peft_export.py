"""Poly and a prefix written as peft's: the same there, Poly the same when it comes back."""

import json

import pytest
import torch
from linear_models import METHODS, MODELS, TASKS, adapted, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from t5_factory import randomise
from transformers import Qwen3Config, Qwen3ForCausalLM

import pemt_fast

peft = pytest.importorskip("peft", reason="peft is an optional dependency")
TASK_IDS = torch.tensor([2, 0, 1, 0])


def logits(model, kind):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(kind), task_ids=TASK_IDS).logits


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("method", ["poly", "mhr"])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_computes_the_same(kind, method, alpha, tmp_path):
    ours = adapted(method, kind, alpha=alpha)
    pemt_fast.export_peft_poly(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(kind), tmp_path)
    torch.testing.assert_close(logits(theirs, kind), logits(ours, kind), rtol=1e-5, atol=1e-5)
    changed = logits(tiny_peft_poly(kind, ours.adapter_config), kind)
    assert not torch.allclose(changed, logits(ours, kind), rtol=1e-3, atol=1e-3)


def tiny_peft_poly(kind, config):
    """peft's Poly of that size with first values of its own."""
    return peft.get_peft_model(
        tiny_model(kind),
        peft.PolyConfig(
            task_type="SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM", r=config.r, n_tasks=TASKS,
            n_skills=config.num_skills, n_splits=config.num_splits,
            target_modules=list(config.target_modules),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["poly", "mhr"])
@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back_keeps_every_bit(kind, method, tmp_path):
    config = adapted(method, kind).adapter_config
    theirs = tiny_peft_poly(kind, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "poly_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "first")
    ours = pemt_fast.load_peft(tiny_model(kind), tmp_path / "first")
    pemt_fast.export_peft_poly(ours, tmp_path / "second")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert first.keys() == second.keys() and first
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    again = pemt_fast.load_peft(tiny_model(kind), tmp_path / "second")
    found = again.adapter_state_dict()
    for name, tensor in ours.adapter_state_dict().items():
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(logits(again, kind), logits(ours, kind))
    sizes = ("r", "n_tasks", "n_skills", "n_splits", "poly_type", "peft_type", "task_type")
    values = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("first", "second")
    ]
    assert {k: values[0][k] for k in sizes} == {k: values[1][k] for k in sizes}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("poly", "mhr")])
def test_only_poly_is_written(method, tmp_path):
    with pytest.raises(ValueError, match="model must have a PolyConfig, got a .*export_peft_lora"):
        pemt_fast.export_peft_poly(adapted(method), tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --- a prefix ------------------------------------------------------------------------------------


def tiny_qwen(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
             "initializer_range": 0.3}  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **changes)).eval()


def prefixed(base, **changes):
    config = {"prefix_length": 5, "prefix_depth": 0, "target_modules": (), **changes}
    return randomise(pemt_fast.get_model(base, pemt_fast.PemlConfig(**config)), scale=0.5).eval()


FOUND = {"prefix_depth": 2, "prefix_width": 8, "architecture": [["linear", "skip"]] * 2}


@pytest.mark.parametrize("changes", [{}, FOUND], ids=["plain", "network"])
@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), tiny_qwen], ids=["llama", "qwen"])
def test_peft_has_the_same_prefix(make, changes, tmp_path):
    ours, inputs = prefixed(make(), **changes), tiny_inputs("llama")
    pemt_fast.export_peft_prefix(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = ours(**inputs).logits[seen], theirs(**inputs).logits[seen]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(make()(**inputs).logits[seen], expected, rtol=1e-2, atol=1e-2)
    del inputs["labels"]
    tokens = [m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), tiny_qwen], ids=["llama", "qwen"])
def test_peft_prefix_comes_here(make, projects, tmp_path):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projects,
        encoder_hidden_size=12,
    )  # fmt: skip
    theirs = randomise(peft.get_peft_model(make(), config), scale=0.5).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, inputs = (
        pemt_fast.load_peft_prefix(make(), tmp_path / "theirs").eval(),
        tiny_inputs("llama"),
    )
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = theirs(**inputs).logits[seen], ours(**inputs).logits[seen]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    pemt_fast.export_peft_prefix(ours, tmp_path / "ours")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("theirs", "ours")]
    first, again = (load_file(file)["prompt_embeddings"] for file in files)
    # Turned back and forth: keys up to rounding, values bit by bit.
    torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-6)


def test_what_is_no_prefix_is_refused(tmp_path):
    ours = prefixed(tiny_model("llama"))
    pemt_fast.export_peft_prefix(ours, tmp_path)
    config, weights = (tmp_path / f"adapter_{n}" for n in ("config.json", "model.safetensors"))
    good, tensors = json.loads(config.read_text()), load_file(weights)
    llama = tiny_model("llama")
    names = list(llama.state_dict())
    for changes, embeddings, message in (
        ({"peft_type": "LORA"}, None, "peft_type must be PREFIX_TUNING, got 'LORA'"),
        (
            {},
            {"prompt_embeddings": torch.zeros(5, 7)},
            "columns for this model, got 7",
        ),
        ({}, {"prompt_embeddings": torch.zeros(5)}, "expected prompt_embeddings of two dimensions"),
        ({}, tensors | {"more": torch.zeros(1)}, "and nothing else, found"),
    ):
        config.write_text(json.dumps(good | changes))
        save_file(tensors if embeddings is None else embeddings, weights)
        with pytest.raises(ValueError, match=message):
            pemt_fast.load_peft_prefix(llama, tmp_path)
        assert list(llama.state_dict()) == names
    with pytest.raises(ValueError, match="must be decoder-only"):
        save_file(tensors, weights)
        config.write_text(json.dumps(good))
        pemt_fast.load_peft_prefix(tiny_model("t5"), tmp_path)


def test_a_merged_lora_may_be_beside_the_prefix(tmp_path):
    ours = prefixed(tiny_model("llama"), target_modules="all-linear", r=2)
    ours.merge()
    pemt_fast.export_peft_prefix(ours, tmp_path)
    expected = ours(**tiny_inputs("llama")).logits[0]
    merged = tiny_model("llama")
    for name, layer in ours.adapted_layers().items():
        merged.get_submodule(name).weight.data = layer.weight.data.clone()
    theirs = peft.PeftModel.from_pretrained(merged, tmp_path)
    torch.testing.assert_close(
        theirs(**tiny_inputs("llama")).logits[0], expected, rtol=1e-4, atol=1e-4
    )


def test_what_is_no_prefix_of_peft(tmp_path):
    torch.manual_seed(0)
    windows = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for model, message in (
        (prefixed(tiny_model("t5")), "must be decoder-only: peft's prefix of an encoder-decoder"),
        (adapted("c-poly", "llama"), "must have a prefix, got a CPolyConfig"),
        (prefixed(tiny_model("llama"), prefix_depth=2), r"discretise\(\) first"),
        (prefixed(tiny_model("llama"), target_modules=("q_proj",)), r"merge\(\) first"),
        (prefixed(tiny_qwen(**windows)), "there are ..sliding_attention"),
        (prefixed(tiny_qwen(rope_parameters=dynamic)), "unscaled, got 'dynamic'"),
    ):
        with pytest.raises(ValueError, match=message):
            pemt_fast.export_peft_prefix(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
