"""`pemt-fast convert`: there and back again, bit by bit; what cannot be written says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_models import tiny_model
from safetensors.torch import load_file
from t5_factory import randomise, tiny_t5
from tiny_data import run_cli

import pemt_fast
from pemt_fast.interop.convert import convert

GOLDEN = Path(__file__).parent / "golden" / "pemt" / "A"


def _adapted(config: Any, folder: Path) -> Path:
    """Saved adapters, and beside them the model they are for."""
    t5 = tiny_t5()
    t5.save_pretrained(folder / "t5")
    model = randomise(pemt_fast.get_model(t5, config))
    model.save_pretrained(folder / "ours")
    return folder


def _same(a: Path, b: Path) -> bool:
    ours, theirs = (load_file(p / "pemt_fast_model.safetensors") for p in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    ("config", "kind", "read_as"),
    [
        (pemt_fast.LoraConfig(r=3, alpha=6), "peft_lora", "peft"),
        (pemt_fast.PolyConfig(2, num_skills=3, r=2), "peft_poly", "peft"),
        (pemt_fast.PolyConfig(2, num_skills=4, num_splits=2, r=2), "peft_poly", "peft"),
        (pemt_fast.BottleneckConfig(), "adapterhub", "adapterhub"),
        (pemt_fast.BottleneckConfig(form="parallel"), "adapterhub", "adapterhub"),
        (pemt_fast.CPolyConfig(2), "pemt_fast", "pemt_fast"),
    ],
)
def test_there_and_back_again(config: Any, kind: str, read_as: str, tmp_path: Path, capsys) -> None:
    folder = _adapted(config, tmp_path)
    there, back = folder / "there", folder / "back"
    model = str(folder / "t5")
    assert run_cli("convert", str(folder / "ours"), "--model", model, "--out", str(there),
                   "--from", "pemt_fast", "--to", kind) == 0  # fmt: skip
    assert run_cli("convert", str(there), "--model", model, "--out", str(back),
                   "--from", read_as) == 0  # fmt: skip
    assert "pemt_fast_model.safetensors" in capsys.readouterr().out
    assert _same(folder / "ours", back)


def test_published_source_and_target(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "A"))
    sources = [str(folder / "sources" / name) for name in ("mnli", "qnli", "qqp")]
    options = [word for source in sources for word in ("--published-source", source)]
    assert run_cli("convert", str(folder), "--model", str(folder), "--out", str(tmp_path / "out"),
                   "--from", "published", *options,
                   "--extra", str(folder / "gates_and_norms.safetensors")) == 0  # fmt: skip
    assert run_cli("convert", sources[0], "--model", str(folder), "--out", str(tmp_path / "mnli"),
                   "--from", "published") == 0  # fmt: skip
    from transformers import T5ForConditionalGeneration

    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[6, 7]])}
    t5 = T5ForConditionalGeneration.from_pretrained(folder).eval()
    loaded = pemt_fast.load(t5, tmp_path / "out").eval()
    logits = loaded(**batch).logits
    direct = pemt_fast.load_published_pemt(
        loaded.unload(), sources, target=folder, extra=folder / "gates_and_norms.safetensors"
    )
    assert torch.equal(direct.eval()(**batch).logits, logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "pemt_fast", "--to", "peft_poly"), "must have a PolyConfig, got a CPolyConfig"),
        (("--from", "pemt_fast", "--to", "adapterhub"), "must have a BottleneckConfig"),
        (("--from", "pemt_fast", "--to", "peft_lora"), "task must be one of"),
        (("--from", "peft"), "adapter_config.json: expected a file written by peft"),
        (("--from", "pemt_fast", "--extra", "x"), "belong to read_as='published'"),
    ],
)
def test_what_cannot_be_written(options: tuple[str, ...], message: str, tmp_path: Path, capsys):
    folder = _adapted(pemt_fast.CPolyConfig(2), tmp_path)
    out = folder / "out"
    code = run_cli(
        "convert", str(folder / "ours"), "--model", str(folder / "t5"), "--out", str(out), *options
    )
    assert code == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


def test_a_directory_with_files_is_left_alone(tmp_path: Path, capsys) -> None:
    folder = _adapted(pemt_fast.LoraConfig(), tmp_path)
    assert run_cli("convert", str(folder / "ours"), "--model", str(folder / "t5"),
                   "--out", str(folder / "t5"), "--from", "pemt_fast") == 1  # fmt: skip
    assert "is not empty" in capsys.readouterr().err


def test_the_model_is_given_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    names = list(model.state_dict())
    lora = pemt_fast.get_model(
        tiny_model("llama"), pemt_fast.LoraConfig(target_modules=("q_proj",))
    )
    randomise(lora).save_pretrained(tmp_path / "ours")
    convert(model, tmp_path / "ours", tmp_path / "peft", read_as="pemt_fast", write_as="peft_lora")
    assert list(model.state_dict()) == names
    for wrong in ({"read_as": "magic"}, {"read_as": "peft", "write_as": "magic"}):
        with pytest.raises(ValueError, match="must be one of"):
            convert(model, tmp_path, tmp_path, **wrong)
