"""The code on docs/peft.md runs, block by block, on a tiny T5."""

import re
from pathlib import Path

import pytest
from tiny_data import write_tiny_data
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

pytest.importorskip("peft", reason="peft is an optional dependency")

PAGE = Path(__file__).parents[1] / "docs" / "peft.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
def test_the_blocks_run(block, tmp_path, monkeypatch):
    folder = write_tiny_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {
        "t5": AutoModelForSeq2SeqLM.from_pretrained(folder / "t5"),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "t5"),
    }
    exec(compile(block, str(PAGE), "exec"), names)


def test_there_are_blocks():
    assert len(BLOCKS) == PAGE.read_text(encoding="utf-8").count("```python") == 4
