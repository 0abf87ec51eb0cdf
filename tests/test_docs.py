"""Every Python block of the documentation runs; every command in it exists with its options.

Blocks of a page run one after the other with the names a reader has: `t5`, `tokenizer`, `batch`, …
Hub names stand for tiny models, `runs/` holds trained sources and targets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import transformers
import typer
from docs_names import names, tiny_llama, tiny_t5, write_runs

import pemt_fast
from pemt_fast.cli import app
from pemt_fast.data import synthetic_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
UNDER_TORCHRUN = ROOT / "docs" / "distributed.md"
# The README's commands for a checkout, and what is written elsewhere than on a line of its own.
MAKE_TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p != UNDER_TORCHRUN], ids=lambda p: p.name
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForSeq2SeqLM, "from_pretrained", tiny_t5)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny_llama)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: synthetic_tokenizer()
    )
    write_runs()
    known: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(blocks(page, "python")):
        known |= names(tmp_path)
        line = page.read_text()[: page.read_text().index(text)].count("\n")
        # Padded, so that a traceback shows the line of the page.
        code = compile("\n" * line + text, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, known)
        assert not re.search(r"[=(, ]\.\.\.[,)\n]", text), f"block {number} leaves something out"


PRELUDE = "from docs_names import names\nglobals().update(names(__import__('pathlib').Path('.')))\n"


def test_blocks_under_torchrun(tmp_path: Path) -> None:
    (text,) = blocks(UNDER_TORCHRUN, "python")
    (tmp_path / "train.py").write_text(PRELUDE + text)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    path = os.pathsep.join([str(Path(__file__).parent / "helpers"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "sharded" / "pemt_fast_model.safetensors").is_file()


def _commands(page: Path) -> list[list[str]]:
    """`pemt-fast` and `make` lines of the fenced blocks, continued lines joined."""
    found = []
    for kind, text in BLOCK.findall(page.read_text()):
        if kind in ("python", "json"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.split()[:1] in (["pemt-fast"], ["make"]):
                found.append(shlex.split(line, comments=True))
    return found


COMMANDS = [(page, words) for page in PAGES for words in _commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda v: v.name if isinstance(v, Path) else " ".join(v)[:60]
)
def test_commands_exist_with_their_options(page: Path, words: list[str]) -> None:
    if words[0] == "make":
        assert words[1] in MAKE_TARGETS, f"{page.name}: make {words[1]}"
        return
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group | typer.core.TyperGroup)
    context = group.make_context("pemt-fast", words[1:], resilient_parsing=True)
    name, command, rest = group.resolve_command(context, words[1:])
    assert command is not None
    # Parses and checks, runs nothing.
    command.make_context(name, [word for word in rest if word != "…"], parent=context)


def test_there_are_commands_and_blocks() -> None:
    assert len(COMMANDS) > 10
    assert sum(len(blocks(page, "python")) for page in PAGES) > 10


@pytest.mark.parametrize("name", pemt_fast.__all__)
def test_public_docstrings_name_their_arguments(name: str) -> None:
    """What a reader asks `help` for: every argument or field is there."""
    thing = getattr(pemt_fast, name)
    if isinstance(thing, str | int):
        return
    text = inspect.getdoc(thing) or ""
    assert text, name
    if inspect.isclass(thing):
        fields = (
            [f.name for f in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
        )
        every = "\n".join(inspect.getdoc(base) or "" for base in thing.__mro__)
        missing = [f for f in fields if not re.search(rf"\b{f}\b", every)]
    else:
        parameters = [p for p in inspect.signature(thing).parameters if p not in ("self", "kwargs")]
        missing = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert not missing, f"{name} does not document {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
