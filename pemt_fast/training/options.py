# SPDX-License-Identifier: Apache-2.0
"""`TrainOptions`: how long and how fast to train, with the published values of each stage.

What is None is taken from the task by `TrainOptions.for_task`: its own source length, and the batch
size and epochs of the authors' scripts in the tables below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments

from pemt_fast.data.template import MAX_SOURCE_LENGTH, Task

# Published values (github JachinLin2022/PEMT, run_pemt_stage1.sh, run_pemt_stage2.sh and the script
# that went over the 17 targets; batch sizes of stage 1 from the step counts of its logs).
MRQA = ("nq", "hotpotqa", "newsqa", "searchqa")
_BATCH_SIZES = {
    1: {"squad": 256, "record": 256},
    2: {
        **dict.fromkeys(("cb", "wsc", *MRQA), 32),
        **dict.fromkeys(("multirc", "boolq", "rte"), 64),
    },
}
_EPOCHS: dict[int, dict[str, float]] = {
    1: {},
    2: {"multirc": 10.0, **dict.fromkeys(MRQA, 5.0)},
}
# Of the tasks that the tables leave out.
_BATCH_SIZE = {1: 128, 2: 100}
_EPOCH_COUNT = {1: 5.0, 2: 20.0}


def published_batch_size(task: str, stage: int, few_shot: int | None = None) -> int:
    """Sequences per update; few-shot targets took as many as there are examples of a class."""
    if few_shot is not None:
        return few_shot
    return _BATCH_SIZES[stage].get(task, _BATCH_SIZE[stage])


def published_epochs(task: str, stage: int, few_shot: int | None = None) -> float:
    """Passes over the training part; few-shot targets took as many as most tasks."""
    if few_shot is not None:
        return _EPOCH_COUNT[stage]
    return _EPOCHS[stage].get(task, _EPOCH_COUNT[stage])


@dataclass(frozen=True)
class TrainOptions:
    """Optimisation of one run. AdamW, linear decay, no weight decay, as published.

    Attributes:
        learning_rate: Peak learning rate.
        steps: Number of updates; None: by `epochs`.
        epochs: Passes over the training part; None: as published for the task.
        warmup_steps: Linear warm-up.
        batch_size: Sequences per update and device; None: as published for the task.
        eval_batch_size: Sequences per generation batch.
        eval_every: Updates between evaluations; None: once per epoch.
        max_source_length: Tokens of the text, the prompt comes on top; None: the task's own.
        max_target_length: Tokens of the target; None: 8 for labels, 128 for free text.
        max_grad_norm: Gradient clipping.
        seed: Order of the data, dropout, initial values.
        bf16: Autocast to bfloat16.
        gradient_checkpointing: Trade time for memory.
        workers: Processes that prepare batches.
        progress: Show progress bars.
    """

    learning_rate: float = 3e-4
    steps: int | None = None
    epochs: float | None = 20
    warmup_steps: int = 0
    batch_size: int | None = 32
    eval_batch_size: int = 128
    eval_every: int | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None
    max_grad_norm: float = 1.0
    seed: int = 42
    bf16: bool = False
    gradient_checkpointing: bool = False
    workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        positive = ("learning_rate", "eval_batch_size")
        optional = (
            *("steps", "epochs", "batch_size", "eval_every"),
            *("max_source_length", "max_target_length"),
        )
        for name in positive + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if value is None or value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")

    def for_task(
        self, task: Task | Sequence[str], *, stage: int, few_shot: int | None = None
    ) -> TrainOptions:
        """Fill in what None leaves to the task; what is set stays.

        Args:
            task: A task, or the names of metrics for examples of no known task: 256 tokens and
                the values of most tasks.
            stage: 1 for a source, 2 for a target.
            few_shot: Examples per class, the published batch size; None: all examples.
        """
        name, length = "", MAX_SOURCE_LENGTH
        if isinstance(task, Task):
            name = task.name
            # The few-shot script has 256 for all of its tasks; none of them answers questions.
            if few_shot is None or task.kind == "qa":
                length = task.max_source_length
        return replace(
            self,
            max_source_length=self.max_source_length or length,
            batch_size=self.batch_size or published_batch_size(name, stage, few_shot),
            epochs=self.epochs or published_epochs(name, stage, few_shot),
        )

    def arguments(
        self, output_dir: Path, generation_length: int, *, evaluates: bool = True,
        saves: bool = True,
    ) -> Seq2SeqTrainingArguments:  # fmt: skip
        """Arguments of transformers' trainer: evaluate, keep the best and the last checkpoint.

        Without `evaluates` the last weights are the result; checkpoints then come ten times, for
        who is killed, or without `saves` never.

        Raises:
            ValueError: the batch size or the epochs are left to a task, see `for_task`.
        """
        if self.batch_size is None or self.epochs is None:
            raise ValueError("batch_size and epochs must be set: without a task none are published")
        strategy = "epoch" if self.eval_every is None else "steps"
        intervals = self._intervals()
        saving = strategy
        if not evaluates:
            strategy, saving = "no", "steps" if saves else "no"
            intervals = {"save_steps": 0.1} if saves else {}
        return Seq2SeqTrainingArguments(
            output_dir=str(output_dir),
            max_steps=self.steps or -1,
            num_train_epochs=self.epochs,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=self.max_grad_norm,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.eval_batch_size,
            eval_strategy=strategy,
            save_strategy=saving,
            logging_strategy=strategy,
            **intervals,
            # The best and the last one. With 1 transformers removes the last one in the end: who is
            # killed after that would train again from the best one on.
            save_total_limit=2,
            load_best_model_at_end=evaluates,
            metric_for_best_model="average",
            greater_is_better=True,
            predict_with_generate=True,
            generation_max_length=generation_length,
            seed=self.seed,
            data_seed=self.seed,
            bf16=self.bf16,
            **self._checkpointing(),
            dataloader_num_workers=self.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=not self.progress,
            report_to="none",
            log_level="error",
        )

    def _intervals(self) -> dict[str, Any]:
        if self.eval_every is None:
            return {}
        return dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), self.eval_every)

    def _checkpointing(self) -> dict[str, Any]:
        """Arguments for checkpointing, under the name this transformers knows."""
        if not self.gradient_checkpointing:
            return {}
        known = Seq2SeqTrainingArguments.__dataclass_fields__
        name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
        return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


STAGE_ONE = TrainOptions(learning_rate=5e-4, epochs=None, warmup_steps=500, batch_size=None)
STAGE_TWO = TrainOptions(learning_rate=3e-4, epochs=None, batch_size=None, seed=4096)
