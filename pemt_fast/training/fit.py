# SPDX-License-Identifier: Apache-2.0
"""Train one wrapped model on one task and measure it: the step that both stages share.

Data is checked and encoded before anything is written. The run directory then holds `checkpoints/`
while training (resumed after a kill) and, at the end, the adapters of the best checkpoint and
`results.json`, which `finish` writes last: a directory with it is finished.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from pemt_fast.attached import AttachedModel
from pemt_fast.checkpoint import replace_file
from pemt_fast.data import Splits, Task, tokenize
from pemt_fast.data.template import MAX_SOURCE_LENGTH, Example
from pemt_fast.model import AdapterModel
from pemt_fast.t5 import T5Model
from pemt_fast.training.metrics import compute
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.trainer import AdapterTrainer, last_complete_checkpoint
from pemt_fast.version import __version__

logger = logging.getLogger("pemt_fast")

RESULTS_FILE = "results.json"
CHECKPOINTS = "checkpoints"
REQUEST_FILE = "request.json"
Rows = list[dict[str, list[int]]]


def write_json(path: Path, values: object) -> None:
    """Write JSON under a temporary name and rename it."""
    text = json.dumps(values, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


def read_results(directory: str | os.PathLike[str]) -> dict | None:
    """`results.json` of a finished run, None if the run is not finished."""
    path = Path(directory) / RESULTS_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def finished(
    directory: Path, wanted: dict[str, object], *, unrecorded: Mapping[str, object] | None = None
) -> dict | None:
    """Results of a finished run of the same request, None if there is none.

    Args:
        directory: The run directory.
        wanted: The request.
        unrecorded: What held for runs whose request lacks these keys: earlier versions had no other
            value and wrote none.

    Raises:
        ValueError: another request was finished in its place.
    """
    results = read_results(directory)
    if results is None:
        return None
    before = {**(unrecorded or {}), **results.get("request", {})}
    if before != json.loads(json.dumps(wanted)):
        raise ValueError(
            f"{directory}: holds a finished run with other settings; choose another output "
            "directory or remove it"
        )
    logger.info("%s: already finished, skipped", directory)
    tidy(directory)
    return results


def begin(directory: Path, wanted: dict[str, object]) -> None:
    """Note the request of a run beside its checkpoints.

    Raises:
        ValueError: those that are there are of another request.
    """
    path, text = directory / CHECKPOINTS / REQUEST_FILE, json.loads(json.dumps(wanted))
    if path.is_file() and json.loads(path.read_text()) != text:
        raise ValueError(
            f"{directory}: holds an interrupted run with other settings; choose another output "
            "directory or remove it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, text)


def environment() -> dict[str, object]:
    """What a reader needs to know about the machine and the versions."""
    return {
        "pemt_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def predict(
    model: AttachedModel | T5Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    batch_size: int,
    max_length: int,
) -> list[str]:
    """Greedy decoding of encoded rows, in their order; similar lengths share a batch.

    Rows may have `task_ids`, their task.
    """
    collator = DataCollatorForSeq2Seq(tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    texts = [""] * len(rows)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collator([rows[i] for i in indices]).to(device)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_length=max_length,
            num_beams=1,
            do_sample=False,
            **({"task_ids": batch["task_ids"]} if "task_ids" in batch else {}),
        )
        decoded = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for i, text in zip(indices, decoded, strict=True):
            texts[i] = text.strip()
    model.train(was_training)
    return texts


def encode(
    splits: Splits, tokenizer: PreTrainedTokenizerBase, options: TrainOptions
) -> tuple[Rows, Rows, Rows]:
    """Token ids of the three parts; raises if a part is empty or a label does not fit.

    A source length of None is that of most tasks: see `TrainOptions.for_task`.
    """
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    for name, examples in parts.items():
        if not examples:
            raise ValueError(f"the {name} part is empty: training needs at least one example")
    return tuple(  # type: ignore[return-value]
        tokenize(
            examples,
            tokenizer,
            max_source_length=options.max_source_length or MAX_SOURCE_LENGTH,
            max_target_length=options.max_target_length,
        )
        for examples in parts.values()
    )


def generation_length(rows: Sequence[Rows]) -> int:
    """Room for the longest target, its end token and the start token."""
    return max(len(row["labels"]) for part in rows for row in part) + 1


def fit(
    model: AdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    metrics: Task | Sequence[str],
    options: TrainOptions,
    directory: str | os.PathLike[str],
    *,
    label: str,
    request: dict[str, object],
) -> dict:
    """Train, keep the best checkpoint by the mean of the metrics, test it, write everything.

    Args:
        model: From `get_model`.
        tokenizer: The T5's.
        splits: Examples of the three parts.
        metrics: A known task or names of metrics, for `metrics.compute`.
        options: Optimisation.
        directory: The run directory.
        label: What is being trained, for logs and results.
        request: What a run that goes on here must have in common with the one that began.

    Returns:
        Scores, times and settings, for `finish`.
    """
    train, validation, test = encode(splits, tokenizer, options)
    length = generation_length((train, validation, test))
    folder = Path(directory)
    checkpoints = folder / CHECKPOINTS
    begin(folder, request)
    _drop_temporary(folder)

    def score(examples: Sequence[Example], predictions: Sequence[str]) -> dict[str, float]:
        return compute(metrics, list(predictions), list(examples))

    def evaluate(prediction: transformers.EvalPrediction) -> dict[str, float]:
        tokens = torch.as_tensor(prediction.predictions).clamp_min(0)  # the trainer pads with -100
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return score(splits.validation, [t.strip() for t in texts])

    trainer = AdapterTrainer(
        model=model,
        args=options.arguments(checkpoints, length),
        train_dataset=cast(Any, train),
        eval_dataset=cast(Any, validation),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        compute_metrics=evaluate,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    resumed = last_complete_checkpoint(checkpoints)
    if resumed:
        logger.warning("%s: resuming from %s", label, resumed)
    seconds = trainer.train_from(resumed)
    texts = predict(model, tokenizer, test, batch_size=options.eval_batch_size, max_length=length)
    trainable, total = model.count_parameters()
    results = {
        "label": label,
        "validation": {k.removeprefix("eval_"): v for k, v in _best_validation(trainer).items()},
        "test": score(splits.test, texts),
        "examples": {"train": len(train), "validation": len(validation), "test": len(test)},
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds": round(seconds, 1),
        "resumed": bool(resumed),
        "trainable_parameters": trainable,
        "all_parameters": total,
        "loss": [
            {"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e
        ],
        "options": asdict(options),
        "config": model.adapter_config.to_dict(),
        "environment": environment(),
        "request": request,
    }
    model.save_pretrained(folder)
    return results


def finish(directory: str | os.PathLike[str], results: dict) -> dict:
    """Mark a run as finished: write its results, drop the checkpoints, return what was written."""
    path = Path(directory) / RESULTS_FILE
    write_json(path, results)
    tidy(directory)
    return json.loads(path.read_text())


def tidy(directory: str | os.PathLike[str]) -> None:
    """Remove what a finished run needs no more; a kill may have left it."""
    shutil.rmtree(Path(directory) / CHECKPOINTS, ignore_errors=True)
    _drop_temporary(Path(directory))


def _drop_temporary(folder: Path) -> None:
    """Remove what a kill inside `replace_file` left."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def _best_validation(trainer: AdapterTrainer) -> dict[str, float]:
    """The evaluation entry of the best checkpoint, without timings."""
    best = trainer.state.best_global_step
    entries = [e for e in trainer.state.log_history if "eval_average" in e and e["step"] == best]
    skip = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {k: v for k, v in entries[-1].items() if k.startswith("eval_") and k not in skip}
