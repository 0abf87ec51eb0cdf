"""Saving and loading: complete, adapter weights only, atomic, and clear about what is wrong."""

import json
import os

import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file, save_file
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5
from transformers import T5Config, T5ForConditionalGeneration

import pemt_fast

WEIGHTS, CONFIG = "pemt_fast_model.safetensors", "pemt_fast_config.json"
STAGE_ONE = {"stage": 1, "sources": (), "source_prompt_lengths": None}


def build(**changes):
    return randomise(pemt_fast.get_model(tiny_t5(), pemt_config(**changes)))


@pytest.fixture
def saved(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "target")
    return model, tmp_path / "target"


def train_source(directory, target, **changes):
    model = build(**STAGE_ONE, target=target, **changes)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"source_kind": "bottleneck"}, {"source_ranks": (2, 5, 3)}, STAGE_ONE],
    ids=["lora", "bottleneck", "unequal-ranks", "stage-1"],
)
def test_round_trip(tmp_path, changes):
    model, batch = build(**changes), tiny_batch()
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    loaded = pemt_fast.load(tiny_t5(), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.adapter_config == model.adapter_config
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trains


def test_loading_ignores_directories_named_like_a_source(saved, tmp_path, monkeypatch):
    model, directory = saved
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = pemt_fast.load(tiny_t5(), directory)
    assert loaded.adapter_config.sources == model.adapter_config.sources == ("a", "b", "c")


def test_only_attached_tensors_are_saved(saved):
    model, directory = saved
    names = load_file(directory / WEIGHTS).keys()
    assert not any(".base." in n or "shared" in n or "lm_head" in n for n in names)
    for part in ("gate.w_gate", "target_adapter.up.bias", "mixture.w_down", "final_layer_norm"):
        assert any(part in n for n in names), part
    assert "prompt.prompt" in names and "prompt.sources.2" in names
    assert names == model.adapter_state_dict().keys()


def test_stage_two_from_trained_sources(tmp_path):
    sources = [
        train_source(tmp_path / "first", "mnli", source_rank=3),
        train_source(tmp_path / "second", "qqp", source_rank=6, prompt_length=2),
    ]
    config = pemt_config(
        sources=[tmp_path / "first", tmp_path / "second"], source_prompt_lengths=None
    )
    model = pemt_fast.get_model(tiny_t5(), config)
    assert model.adapter_config.sources == ("mnli", "qqp")
    assert model.adapter_config.source_ranks == (3, 6)
    assert model.adapter_config.source_prompt_lengths == (5, 2)
    for e, source in enumerate(sources):
        assert torch.equal(model.prompt.sources[e], source.prompt.prompt)
        mine = model.base_model.decoder.block[1].layer[2].DenseReluDense.wo.mixture
        theirs = source.base_model.decoder.block[1].layer[2].DenseReluDense.wo.adapter
        assert torch.equal(mine.w_down[mine.rows(e)], theirs.down.weight)
        assert torch.equal(mine.w_up[mine.rows(e)], theirs.up.weight.t())


def test_a_gate_on_one_source_reproduces_that_source(tmp_path):
    """End to end across the stages: with the gate at one source, stage 2 computes stage 1."""
    source, batch = train_source(tmp_path / "s", "mnli"), tiny_batch()
    config = pemt_config(sources=[tmp_path / "s"], source_prompt_lengths=None)
    model = pemt_fast.get_model(tiny_t5(), config).eval()
    with torch.no_grad():
        # The prompt of stage 2 adds what it attends to: take it out to compare the adapters.
        model.prompt.sources[0].zero_()
        model.prompt.prompt.copy_(source.prompt.prompt)
        for module in model.modules():
            if hasattr(module, "target_adapter"):
                module.target_adapter.up.weight.zero_()
    torch.testing.assert_close(model(**batch).logits, source(**batch).logits)


def test_missing_and_damaged_files(saved):
    _, directory = saved
    with pytest.raises(FileNotFoundError, match="the directory does not exist"):
        pemt_fast.load(tiny_t5(), directory / "no")
    blob = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ValueError, match=f"{WEIGHTS}: truncated or damaged"):
        pemt_fast.load(tiny_t5(), directory)
    (directory / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS}: file not found"):
        pemt_fast.load(tiny_t5(), directory)
    (directory / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        pemt_fast.load(tiny_t5(), directory)
    (directory / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="expected a file written by save_pretrained"):
        pemt_fast.load(tiny_t5(), directory)


def test_config_and_weights_must_belong_together(saved, tmp_path):
    _, directory = saved
    build(target="other").save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / CONFIG, directory / CONFIG)
    with pytest.raises(ValueError, match="belongs to another pemt_fast_config.json"):
        pemt_fast.load(tiny_t5(), directory)


def test_unknown_config_keys_and_methods(saved):
    _, directory = saved
    values = json.loads((directory / CONFIG).read_text())
    for change, message in (
        ({"colour": 1}, r"unknown PemtConfig keys \['colour'\]"),
        ({"method": "magic"}, "method must be one of"),
        ({"format": 99}, "expected format 1"),
    ):
        (directory / CONFIG).write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            pemt_fast.load(tiny_t5(), directory)


def test_wrong_tensors_are_refused_and_the_model_stays_untouched(saved):
    _, directory = saved
    tensors = load_file(directory / WEIGHTS)
    with open(directory / WEIGHTS, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length))["__metadata__"]
    broken = dict(tensors)
    broken["surprise"] = broken.pop("prompt.prompt")
    save_file(broken, directory / WEIGHTS, metadata)
    t5 = tiny_t5()
    with pytest.raises(ValueError, match=r"missing \['prompt.prompt'\], unexpected \['surprise'\]"):
        pemt_fast.load(t5, directory)
    assert not hasattr(t5, "_pemt_fast_attached")
    wrong = {**tensors, "prompt.prompt": torch.zeros(5, 31)}
    save_file(wrong, directory / WEIGHTS, metadata)
    with pytest.raises(ValueError, match=r"prompt.prompt must have shape \[5, 32\].*got \[5, 31\]"):
        pemt_fast.load(tiny_t5(), directory)


def test_another_model_size_is_named(tmp_path):
    train_source(tmp_path / "s", "mnli")
    wide = T5ForConditionalGeneration(
        T5Config(
            vocab_size=80, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    config = pemt_config(sources=[tmp_path / "s"], source_prompt_lengths=None)
    with pytest.raises(ValueError, match=r"source 'mnli': the adapter of encoder.0 must be"):
        pemt_fast.get_model(wide, config)
    deep = T5ForConditionalGeneration(
        T5Config(
            vocab_size=80, d_model=32, d_ff=64, d_kv=8, num_layers=3, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="made for another model size"):
        pemt_fast.get_model(deep, config)


def test_sources_must_fit_each_other(tmp_path):
    train_source(tmp_path / "a", "mnli")
    train_source(tmp_path / "b", "mnli")
    train_source(tmp_path / "c", "qqp", source_kind="bottleneck")
    for sources, message in (
        (["a", "b"], "sources must be different tasks"),
        (["a", "c"], "source_kind is 'bottleneck', the config asks for 'lora'"),
    ):
        paths = [tmp_path / s for s in sources]
        with pytest.raises(ValueError, match=message):
            pemt_fast.get_model(tiny_t5(), pemt_config(sources=paths, source_prompt_lengths=None))
    with pytest.raises(ValueError, match="all directories or all plain names"):
        pemt_fast.get_model(
            tiny_t5(), pemt_config(sources=[tmp_path / "a", "fresh"], source_prompt_lengths=None)
        )
    build().save_pretrained(tmp_path / "stage2")
    with pytest.raises(ValueError, match="expected a source trained in stage 1"):
        pemt_fast.get_model(
            tiny_t5(), pemt_config(sources=[tmp_path / "stage2"], source_prompt_lengths=None)
        )


def test_a_failed_save_keeps_the_previous_files(saved, monkeypatch):
    model, directory = saved
    before = {p.name: p.read_bytes() for p in directory.iterdir()}

    def half_written(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("pemt_fast.checkpoint.save_file", half_written)
    with pytest.raises(OSError, match="No space left"):
        randomise(model).save_pretrained(directory)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def copy_case(tmp_path):
    import shutil

    return shutil.copytree(GOLDEN / "A", tmp_path / "A")


def load_published(folder):
    t5 = T5ForConditionalGeneration.from_pretrained(folder)
    sources = [folder / "sources" / name for name in ("mnli", "qnli", "qqp")]
    return pemt_fast.load_published_pemt(
        t5, sources, target=folder, extra=folder / "gates_and_norms.safetensors"
    )


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "sources/qqp/lora.pt").unlink(), FileNotFoundError, "expected lora.pt or"),
        (lambda f: (f / "adapter.pt").unlink(), FileNotFoundError, "adapter.pt: file not found"),
        (
            lambda f: (f / "task_embedding.pt").write_bytes(b"PK\3\4 nothing"),
            ValueError,
            "task_embedding.pt: truncated, damaged",
        ),
        (
            lambda f: torch.save([1, 2], f / "adapter.pt"),
            ValueError,
            "adapter.pt: expected a dict of tensors, got list",
        ),
        (
            lambda f: torch.save({"x": torch.zeros(2)}, f / "task_embedding.pt"),
            ValueError,
            "expected an entry 'task_shared'",
        ),
        (
            lambda f: save_file(
                {"encoder.block.0.layer.1.DenseReluDense.wo.w_gate": torch.zeros(64, 2)},
                f / "gates_and_norms.safetensors",
            ),
            ValueError,
            r"w_gate must be \[64, 3\] for this model, got \[64, 2\]",
        ),
        (
            lambda f: save_file({"x": torch.zeros(1)}, f / "gates_and_norms.safetensors"),
            ValueError,
            "expected w_gate and layer_norm entries",
        ),
    ],
)
def test_published_files_that_do_not_fit(tmp_path, damage, error, message):
    folder = copy_case(tmp_path)
    damage(folder)
    with pytest.raises(error, match=message):
        load_published(folder)


def test_published_model_survives_our_format(tmp_path):
    model, batch = load_published(GOLDEN / "A").eval(), tiny_batch()
    model.save_pretrained(tmp_path)
    loaded = pemt_fast.load(T5ForConditionalGeneration.from_pretrained(GOLDEN / "A"), tmp_path)
    torch.testing.assert_close(loaded.eval()(**batch).loss, model(**batch).loss)


def test_our_loader_points_to_the_published_one():
    with pytest.raises(FileNotFoundError, match="use load_published_pemt"):
        pemt_fast.load(tiny_t5(), GOLDEN / "C")


def test_published_bottleneck_sources(tmp_path):
    """The authors' other form of source: `adapter.pt` with a non-linear bottleneck."""
    ours = build(source_kind="bottleneck", published=True, sources=["x", "y"],
                 source_prompt_lengths=(6, 3))  # fmt: skip
    state = dict(ours.named_parameters())
    for e, name in enumerate(("x", "y")):
        tensors = {}
        for stack, layer in (("encoder", 1), ("decoder", 2)):
            for i in range(2):
                path = f"{stack}.block.{i}.layer.{layer}.DenseReluDense"
                mixture = ours.get_submodule(f"base_model.{path}.wo.mixture")
                stem, rows = f"{path}.adapter_controller.adapters.{name}", mixture.rows(e)
                tensors |= {
                    f"{stem}.down_sampler.weight": mixture.w_down[rows],
                    f"{stem}.down_sampler.bias": mixture.b_down[rows],
                    f"{stem}.up_sampler.weight": mixture.w_up[rows].t(),
                    f"{stem}.up_sampler.bias": mixture.b_up[e],
                }
        (tmp_path / name).mkdir()
        torch.save(
            {k: v.detach().clone() for k, v in tensors.items()}, tmp_path / name / "adapter.pt"
        )
        prompt = ours.prompt.sources[e].detach().clone()
        torch.save({"task_shared": prompt}, tmp_path / name / "task_embedding.pt")
    names = pemt_fast.published_names(ours)
    values = {theirs: state[mine].detach().clone() for mine, theirs in names.items()}
    assert "encoder.block.0.layer.1.DenseReluDense.w_gate" in values
    (tmp_path / "t").mkdir()
    torch.save({k: v for k, v in values.items() if "adapters" in k}, tmp_path / "t" / "adapter.pt")
    torch.save({"task_shared": values["task_shared"]}, tmp_path / "t" / "task_embedding.pt")
    torch.save(values, tmp_path / "extra.pt")
    loaded = pemt_fast.load_published_pemt(
        tiny_t5(), [tmp_path / "x", tmp_path / "y"], tmp_path / "t", tmp_path / "extra.pt"
    )
    batch = tiny_batch()
    torch.testing.assert_close(loaded.eval()(**batch).loss, ours(**batch).loss)
    one = pemt_fast.load_published_pemt(tiny_t5(), [tmp_path / "x"])
    assert one.adapter_config.stage == 1 and one.adapter_config.target == "x"
    assert torch.isfinite(one.eval()(**batch).loss)
