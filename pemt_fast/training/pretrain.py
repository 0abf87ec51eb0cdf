# SPDX-License-Identifier: Apache-2.0
"""Pretrains a small T5 from plain text, offline and in minutes, as a backbone to be frozen.

The objective is T5's span corruption. Labelled tasks may be mixed in as text-to-text, the task's
name in front of the source, as T5's own first pretraining did.

An interrupted run continues when it is started again with the same arguments: checkpoints lie in
``.partial`` inside the output folder. The finished folder is written beside it and renamed, so
other programs see either a whole model or none.

Next: `pretrain_run.py` trains, `pretrain_files.py` reads and writes,
`pemt_fast/data/span_corruption.py` makes the tokenizer and the batches.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pemt_fast.data.rows import Sources
from pemt_fast.data.span_corruption import (
    SENTINELS,
    TaskBatches,
    TextBatches,
    encode_stream,
    span_corruption,
    train_tokenizer,
)
from pemt_fast.data.tasks import get_task
from pemt_fast.data.template import Task
from pemt_fast.data.tokenization import tokenize
from pemt_fast.training.pretrain_files import (
    CHECKPOINT_FILE,
    PARTIAL_FOLDER,
    claim,
    digest,
    find_finished,
    load_task,
    make_tokenizer,
    read_texts,
    save,
)
from pemt_fast.training.pretrain_run import PretrainConfig, PretrainRun, build_model

__all__ = ["PretrainConfig", "pretrain", "span_corruption", "train_tokenizer"]

logger = logging.getLogger("pemt_fast")

_MAX_TARGET_LENGTH = 64


def pretrain(
    text_files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    config: PretrainConfig | None = None,
    *,
    tasks: str | Task | Iterable[str | Task] = (),
    data_dir: Sources = None,
    progress: bool = True,
    device: str | None = None,
) -> dict[str, Any]:
    """Train a tokenizer and a T5 from scratch and save both to `output_dir`.

    Text is cut into blocks of one length whose spans are corrupted. With `tasks`, the share
    `config.task_share` of the steps trains on their examples instead, source ``"<name>: <source>"``
    and the label's text as target: T5 v1.0 was pretrained on such a mixture of its supervised
    tasks too. Only the training parts that `load_splits` makes with its default seed are used, at
    most 10,000 rows of a task. Dropout is off while pretraining; the saved configuration has 0.1.

    Everything is read into memory: meant for some tens of megabytes of text.

    Args:
        text_files: UTF-8 files; every line that is not blank is a text.
        output_dir: new, empty, or with an unfinished or finished pretraining. A finished one of
            the same settings is left as it is; one of other settings is replaced at the end.
        config: settings, None for the defaults.
        tasks: names of tasks in `pemt_fast.data.tasks`, or `Task` objects.
        data_dir: folder of the tasks' rows, as in `load_rows`; or a mapping from a task's name to
            its own folder or its rows by split; None asks the hub.
        progress: show progress bars.
        device: "cpu", "cuda", …; None takes the GPU where there is one.

    Returns:
        What is in ``pretrain.json``: ``config``, ``tasks``, ``text_files``, ``digest`` of the data,
        ``parameters``, ``vocab_size``, ``text_tokens``, ``precision``, ``seconds`` and
        ``steps_per_s`` of the training, ``held_out_loss`` (nats per target token of text kept out
        of the training), ``loss_curve`` (means over stretches of steps) and ``files``.

    Raises:
        FileNotFoundError: a text file is missing, or as in `load_rows`.
        FileExistsError: `output_dir` holds other files.
        ValueError: a text file is empty or not UTF-8, the text is too short, a task is unknown, or
            `output_dir` holds an unfinished pretraining of other settings.
        FloatingPointError: the loss is no longer finite.
    """
    config = config or PretrainConfig()
    paths = [text_files] if isinstance(text_files, str | os.PathLike) else list(text_files)
    chosen = [tasks] if isinstance(tasks, str | Task) else list(dict.fromkeys(tasks))
    names = [get_task(task).name for task in chosen]
    folder = Path(output_dir).resolve()
    finished = find_finished(folder)
    texts = read_texts([Path(path) for path in paths])
    examples = [example for task in chosen for example in load_task(task, data_dir)]

    settings: dict[str, Any] = {
        "config": asdict(config),
        "tasks": names,
        "text_files": [Path(path).name for path in paths],
        "digest": digest(texts, examples),
    }
    if finished is not None and all(finished.get(key) == settings[key] for key in settings):
        logger.info("%s already holds this pretraining", folder)
        return finished

    partial = folder / PARTIAL_FOLDER
    claim(partial, settings)
    tokenizer = make_tokenizer(partial, texts, examples, config, progress)
    stream = encode_stream(texts, tokenizer, progress=progress)
    ids = tokenizer.get_vocab()
    text = TextBatches(
        stream,
        [ids[sentinel] for sentinel in SENTINELS],
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
        density=config.density,
        mean_span=config.mean_span,
    )
    rows = tokenize(
        examples,
        tokenizer,
        max_source_length=config.sequence_length,
        max_target_length=_MAX_TARGET_LENGTH,
    )
    task = TaskBatches(rows, batch_size=config.batch_size, seed=config.seed) if rows else None

    run = PretrainRun(config, build_model(config, len(tokenizer)), text, task, device)
    run.train(partial / CHECKPOINT_FILE, progress=progress)
    record = settings | {
        "parameters": run.model.num_parameters(),
        "vocab_size": len(tokenizer),
        "text_tokens": len(stream),
        "precision": "bf16" if run.bf16 else "fp32",
        "seconds": round(run.seconds, 2),
        "steps_per_s": round(config.steps / run.seconds, 3),
        "held_out_loss": run.held_out_loss(),
        "loss_curve": run.loss_curve(),
    }
    return save(folder, run.model, tokenizer, record)
