"""AdapterHub directories read and written, without the library.

`tests/golden/adapterhub` is what adapters 1.3.0 saved and computed, see
`tests/helpers/adapterhub_exchange.py`. With the library itself: `test_adapterhub_library.py`.
"""

import json
import pickle
import shutil
from pathlib import Path

import adapterhub_exchange as exchange
import pytest
import torch
from adapterhub_exchange import close
from safetensors.torch import load_file, save_file

import pemt_fast

GOLDEN = Path(__file__).parent / "golden" / "adapterhub"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/adapter_config.json"))


def base_t5():
    return exchange.tiny_t5(GOLDEN / "base.safetensors")


def copied(tmp_path, case="seq_bn"):
    return shutil.copytree(GOLDEN / case, tmp_path / case)


def edit(folder, **changes):
    """Change entries of the file, or else options of the adapter."""
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    for name, value in changes.items():
        owner = saved if name in saved else saved["config"]
        owner[name] = value
    path.write_text(json.dumps(saved))
    return folder


def drop(folder, *names):
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    for name in names:
        (saved if name in saved else saved["config"]).pop(name)
    path.write_text(json.dumps(saved))
    return folder


def saved_tensors(folder):
    if (folder / "adapter.safetensors").is_file():
        return load_file(folder / "adapter.safetensors")
    return torch.load(folder / "pytorch_adapter.bin", weights_only=True)


# --- what the library saved ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_librarys_logits_come_out(case):
    model = pemt_fast.load_adapterhub(base_t5(), GOLDEN / case)
    expected = load_file(GOLDEN / case / "logits.safetensors")["logits"]
    close(exchange.logits(model), expected)
    assert not torch.allclose(exchange.logits(base_t5()), expected, atol=1e-2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.adapter_state_dict())


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_is_the_same_bit_by_bit(case, tmp_path):
    model = pemt_fast.load_adapterhub(base_t5(), GOLDEN / case)
    pemt_fast.export_adapterhub(model, tmp_path, name=case)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.safetensors", "adapter_config.json"
    ]  # fmt: skip
    written, original = load_file(tmp_path / "adapter.safetensors"), saved_tensors(GOLDEN / case)
    original = {key.removeprefix("transformer."): t for key, t in original.items()}
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], t) for key, t in original.items())
    again = pemt_fast.load_adapterhub(base_t5(), tmp_path)
    assert torch.equal(exchange.logits(again), exchange.logits(model))
    assert again.adapter_config == model.adapter_config


@pytest.mark.parametrize("case", ["seq_bn", "double_seq_bn", "par_bn", "everywhere"])
def test_the_config_is_written_as_the_library_writes_it(case, tmp_path):
    model = pemt_fast.load_adapterhub(base_t5(), GOLDEN / case)
    pemt_fast.export_adapterhub(model, tmp_path, name=case)
    found, expected = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, GOLDEN / case)
    )
    assert found == expected
    assert isinstance(found["config"]["scaling"], float)  # a whole number is refused there


def test_a_trained_model_of_ours_goes_there_and_back(tmp_path):
    config = pemt_fast.BottleneckConfig(
        bottleneck=5, form="double_sequential", cross_attention=True, feed_forward=False,
        activation="identity", init_weights="houlsby", leave_out=(0,), scale=2,
    )  # fmt: skip
    model = pemt_fast.get_model(base_t5(), config)
    with torch.no_grad():
        for tensor in model.adapter_state_dict().values():
            tensor.normal_(std=0.3)
    pemt_fast.export_adapterhub(model, tmp_path)
    assert len(load_file(tmp_path / "adapter.safetensors")) == 4 * (3 + 2)
    again = pemt_fast.load_adapterhub(base_t5(), tmp_path)
    assert torch.equal(exchange.logits(again), exchange.logits(model))
    again.save_pretrained(tmp_path / "ours")
    ours = pemt_fast.load(base_t5(), tmp_path / "ours")
    assert torch.equal(exchange.logits(ours), exchange.logits(model))


@pytest.mark.parametrize("d_model", [7, 48, 768])
def test_every_width_has_a_factor(d_model):
    from pemt_fast.interop.adapterhub_config import _factor_of

    for bottleneck in range(1, 2 * d_model + 1):
        assert int(d_model // _factor_of(bottleneck, None, d_model)) == bottleneck


def test_the_head_beside_an_adapter_is_named_and_not_opened(tmp_path, caplog):
    folder = copied(tmp_path, exchange.HEAD)
    (folder / "pytorch_model_head.bin").write_bytes(b"not a file of torch")
    pemt_fast.load_adapterhub(base_t5(), folder)
    assert "pytorch_model_head.bin is not read, the model keeps its own head" in caplog.text
    caplog.clear()
    pemt_fast.load_adapterhub(base_t5(), GOLDEN / "seq_bn")
    assert caplog.text == ""


def test_files_of_older_versions(tmp_path):
    """Without a version `gelu` is what is `gelu_new` today; options that came later are missing."""
    folder = copied(tmp_path, "everywhere")
    drop(folder, "version", "stochastic_depth", "dropout", "phm_layer", "init_weights_seed")
    edit(folder, non_linearity="gelu")
    model = pemt_fast.load_adapterhub(base_t5(), folder)
    close(exchange.logits(model), load_file(folder / "logits.safetensors")["logits"])
    assert model.adapter_config.activation == "gelu_tanh"


def test_the_models_dtype_and_place(tmp_path):
    model = pemt_fast.load_adapterhub(base_t5().bfloat16(), GOLDEN / "seq_bn")
    assert {t.dtype for t in model.adapter_state_dict().values()} == {torch.bfloat16}
    plain = model.unload()
    assert not any("adapter" in name for name in plain.state_dict())


# --- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "ln_before": (True, r"ln_before = True has no counterpart here; read is False"),
    "ln_after": (True, "ln_after = True"),
    "use_gating": (True, "use_gating = True"),
    "phm_layer": (True, "phm_layer = True"),
    "inv_adapter": ("nice", "inv_adapter = 'nice'"),
    "stochastic_depth": (0.1, "stochastic_depth = 0.1"),
    "scaling": ("learned", "scaling = 'learned' .*; read is a number"),
    "non_linearity": ("leakyrelu", "non_linearity = 'leakyrelu' .*; read is relu, gelu, "),
    "reduction_factor": (
        {"1": 4, "default": 2}, r"reduction_factor = \{.*\} .*; read is one factor for all blocks"
    ),
    "original_ln_after": (False, r"'original_ln_after': False\} have no counterpart here"),
    "residual_before_ln": ("post_add", "'residual_before_ln': 'post_add'"),
    "leave_out": ([4], r"leave_out must name blocks below 4, got \[4\]"),
    "output_adapter": (False, "leave no sub-layer that would get an adapter"),
    "init_weights": ("zeros", "init_weights must be one of"),
    "dropout": (1.0, r"dropout must be in \[0, 1\), got 1.0"),
    "mh_adapter": ("yes", "mh_adapter = 'yes' .*; read is true or false"),
    "architecture": ("lora", "architecture = 'lora' .*; read is bottleneck adapters"),
    "new_option": (3, "new_option = 3 .*; read is the options of BnConfig"),
    "hidden_size": (16, "hidden_size must be 8, the model's width, got 16"),
    "model_type": ("bert", "model_type must be t5 or mt5, got 'bert'"),
    "name": (None, "expected an entry name with the adapter's name, got None"),
}  # fmt: skip


@pytest.mark.parametrize("option", REFUSED)
def test_options_without_counterpart_are_named(option, tmp_path):
    value, message = REFUSED[option]
    folder, model = edit(copied(tmp_path), **{option: value}), base_t5()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message) as raised:
        pemt_fast.load_adapterhub(model, folder)
    assert str(folder / "adapter_config.json") in str(raised.value)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [0, -2, float("nan"), 1e-320, True, "16", None])
def test_reduction_factors_that_are_none(value, tmp_path):
    with pytest.raises(ValueError, match="the option reduction_factor = .*; read is a positive"):
        pemt_fast.load_adapterhub(base_t5(), edit(copied(tmp_path), reduction_factor=value))


def test_a_missing_option(tmp_path):
    with pytest.raises(ValueError, match="the option non_linearity of a bottleneck adapter is mis"):
        pemt_fast.load_adapterhub(base_t5(), drop(copied(tmp_path), "non_linearity"))


def change_tensors(folder, change):
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


KEY = "decoder.block.1.layer.2.adapters.seq_bn.adapter_up.weight"
TENSORS = {
    "missing": (lambda t: t.pop(KEY), rf"missing \['{KEY}'\], unexpected \[\]"),
    "left_over": (
        lambda t: t.update({"invertible_adapters.seq_bn.F.0.bias": torch.zeros(2)}),
        r"missing \[\], unexpected \['invertible_adapters.seq_bn.F.0.bias'\]",
    ),
    "wide": (
        lambda t: t.update({KEY: torch.zeros(8, 5)}),
        rf"{KEY} must be \[8, 4\] of a float dtype for this model, got \[8, 5\]",
    ),
    "transposed": (lambda t: t.update({KEY: torch.zeros(4, 8)}), r"got \[4, 8\]"),
    "integers": (
        lambda t: t.update({KEY: torch.zeros(8, 4, dtype=torch.int64)}), r"of torch.int64"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named_before_anything_is_attached(case, tmp_path, monkeypatch):
    change, message = TENSORS[case]
    folder, model = copied(tmp_path), base_t5()
    change_tensors(folder, change)
    monkeypatch.setattr("pemt_fast.interop.adapterhub_files.get_model", None)
    with pytest.raises(ValueError, match=message):
        pemt_fast.load_adapterhub(model, folder)


def test_a_factor_that_asks_for_a_giant_is_refused_by_the_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"must be \[8000000000000, 8\] of a float dtype"):
        pemt_fast.load_adapterhub(base_t5(), edit(copied(tmp_path), reduction_factor=1e-12))


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("the file's code has run",))


def test_nothing_in_a_pickle_is_executed(tmp_path):
    folder = copied(tmp_path, "par_bn")
    torch.save({"a": Evil()}, folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="reading those runs code of the file"):
        pemt_fast.load_adapterhub(base_t5(), folder)
    torch.save([1], folder / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="expected a dict of tensors, got list"):
        pemt_fast.load_adapterhub(base_t5(), folder)
    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2)[:-3])
    with pytest.raises(ValueError, match="pytorch_adapter.bin: truncated, damaged or not plain"):
        pemt_fast.load_adapterhub(base_t5(), folder)


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file written by AdapterHub's save_ad"):
        pemt_fast.load_adapterhub(base_t5(), tmp_path)
    folder = copied(tmp_path)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_adapter.bin: file not found"):
        pemt_fast.load_adapterhub(base_t5(), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: not valid JSON"):
        pemt_fast.load_adapterhub(base_t5(), folder)
    (folder / "adapter_config.json").write_text('{"config": "seq_bn", "name": "a"}')
    with pytest.raises(ValueError, match="expected an entry config with the adapter's options"):
        pemt_fast.load_adapterhub(base_t5(), folder)


def test_models_that_are_not_free_or_no_t5():
    model = pemt_fast.load_adapterhub(base_t5(), GOLDEN / "seq_bn")
    with pytest.raises(RuntimeError, match=r"unload\(\) it first"):
        pemt_fast.load_adapterhub(model.base_model, GOLDEN / "seq_bn")
    with pytest.raises(TypeError, match="model must be a T5ForConditionalGeneration"):
        pemt_fast.load_adapterhub(torch.nn.Linear(2, 2), GOLDEN / "seq_bn")


def test_what_cannot_be_exported(tmp_path):
    lora = pemt_fast.get_model(base_t5(), pemt_fast.LoraConfig())
    with pytest.raises(ValueError, match="model must have a BottleneckConfig, got a LoraConfig"):
        pemt_fast.export_adapterhub(lora, tmp_path)
    model = pemt_fast.load_adapterhub(base_t5(), GOLDEN / "seq_bn")
    for name in ("", "a.b"):
        with pytest.raises(ValueError, match="name must be a name without dots"):
            pemt_fast.export_adapterhub(model, tmp_path, name=name)
    with model.disabled(), pytest.raises(RuntimeError, match="can neither be saved nor loaded"):
        pemt_fast.export_adapterhub(model, tmp_path)
    assert not list(tmp_path.iterdir())
