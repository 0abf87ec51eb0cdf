# SPDX-License-Identifier: Apache-2.0
"""What `pretrain.py` reads and writes: texts, the tokenizer, a folder that is whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemt_fast.checkpoint import replace_file
from pemt_fast.data.load import load_splits
from pemt_fast.data.rows import Sources, source_of
from pemt_fast.data.span_corruption import train_tokenizer
from pemt_fast.data.tasks import get_task
from pemt_fast.data.template import Example, Task
from pemt_fast.training.pretrain_run import PretrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

RECORD_FILE = "pretrain.json"
PARTIAL_FOLDER = ".partial"
CHECKPOINT_FILE = "checkpoint.pt"
# T5's examples-proportional mixing: tasks count by their size, and none counts more than this.
TASK_LIMIT = 10_000


def read_texts(paths: list[Path]) -> list[str]:
    """Every line that is not blank, of all files."""
    if not paths:
        raise ValueError("text_files must name at least one file, got none")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such text file: {', '.join(missing)}")
    texts: list[str] = []
    empty = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: must be UTF-8 text ({error})") from error
        stripped = [line.strip() for line in lines if line.strip()]
        if not stripped:
            empty.append(str(path))
        texts += stripped
    if empty:
        raise ValueError(f"text file without text: {', '.join(empty)}")
    return texts


def load_task(task: str | Task, data_dir: Sources) -> list[Example]:
    """Training rows of a task, its name in front of each source."""
    task = get_task(task)
    place = source_of(data_dir, task)
    return load_splits(task, place, limit_train=TASK_LIMIT, prefix="colon").train


def digest(texts: list[str], examples: list[Example]) -> str:
    """A short hash of everything that is trained on."""
    state = hashlib.sha256()
    for text in texts:
        state.update(text.encode() + b"\n")
    for example in examples:
        state.update(f"{example.source}\t{example.target}\n".encode())
    return state.hexdigest()[:16]


def make_tokenizer(
    partial: Path,
    texts: list[str],
    examples: list[Example],
    config: PretrainConfig,
    progress: bool,
) -> PreTrainedTokenizerBase:
    """Train the tokenizer, or take the one of the interrupted run."""
    from transformers import PreTrainedTokenizerFast

    place = partial / "tokenizer"
    if not place.is_dir():
        pairs = (text for example in examples for text in (example.source, example.target))
        tokenizer = train_tokenizer(
            (text for source in (texts, pairs) for text in source),
            config.vocab_size,
            progress=progress,
        )
        temporary = partial / "tokenizer.tmp"
        tokenizer.save_pretrained(temporary)
        temporary.rename(place)
    return PreTrainedTokenizerFast.from_pretrained(place)


def find_finished(folder: Path) -> dict[str, Any] | None:
    """Record of a finished pretraining, None in a folder that may be used, else an error."""
    replaced = _beside(folder, "replaced")
    if replaced.is_dir() and not folder.exists():
        replaced.rename(folder)  # killed between the two renames of `save`
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise FileExistsError(f"output_dir must be a folder, {folder} is a file")
    entries = {path.name for path in folder.iterdir()} - {PARTIAL_FOLDER}
    record: dict[str, Any] | None = None
    if RECORD_FILE in entries:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    foreign = sorted(entries - set(record["files"] if record else ()))
    if foreign:
        raise FileExistsError(
            f"output_dir must be new, empty or hold nothing but a pretraining; {folder} holds "
            f"{', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}"
        )
    return record


def claim(partial: Path, settings: Mapping[str, Any]) -> None:
    """Mark the folder as belonging to these settings; without a checkpoint nothing is lost."""
    path = partial / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before == settings:
        return
    if before is not None and (partial / CHECKPOINT_FILE).is_file():
        old, new = _flatten(before), _flatten(settings)
        changed = "; ".join(
            f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
            for key in dict.fromkeys((*old, *new))
            if old.get(key) != new.get(key)
        )
        raise ValueError(
            f"{partial.parent} holds an unfinished pretraining of other settings: {changed}. "
            f"Repeat its settings to continue it, or delete {partial}"
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text = json.dumps(settings, indent=2)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings["config"], **{k: v for k, v in settings.items() if k != "config"}}


def save(
    folder: Path,
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Write the finished folder under another name and put it in the place of `folder`."""
    finished, replaced = _beside(folder, "finished"), _beside(folder, "replaced")
    for leftover in (finished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    model.config.dropout_rate = 0.1  # what fine-tuning expects; pretraining is better without
    model.cpu().save_pretrained(finished)
    tokenizer.save_pretrained(finished)
    files = sorted({*(path.name for path in finished.iterdir()), RECORD_FILE})
    record = record | {"files": files}
    text = json.dumps(record, indent=2) + "\n"
    (finished / RECORD_FILE).write_text(text, encoding="utf-8")
    folder.rename(replaced)
    finished.rename(folder)
    shutil.rmtree(replaced)
    return json.loads(text)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")
