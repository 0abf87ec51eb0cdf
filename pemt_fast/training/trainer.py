# SPDX-License-Identifier: Apache-2.0
"""`AdapterTrainer`: transformers' `Seq2SeqTrainer` whose checkpoints hold adapters only.

Optimiser, schedule and random states are written and read by transformers as always; T5's own
weights, which never change, are not. A checkpoint that a kill left incomplete is not resumed from.

A model that FSDP2 has sharded (`sharding.shard`) is trained as it is; its checkpoints are the same
as without: whole adapters and the whole optimiser state, for any number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Seq2SeqTrainer, TrainerState

from pemt_fast import checkpoint, sharding
from pemt_fast.training.gate_callback import GateCallback
from pemt_fast.training.task_sampler import TaskSampler

logger = logging.getLogger("pemt_fast")

# Their names in a checkpoint, those of transformers.
_OPTIMIZER_FILE = "optimizer.pt"
_SCHEDULER_FILE = "scheduler.pt"
_STATE_FILE = "trainer_state.json"
# Of every complete checkpoint; `rng_state_<process>.pth` where several processes train.
_PARTS = (
    checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, _STATE_FILE, _OPTIMIZER_FILE, _SCHEDULER_FILE,
    "rng_state*.pth",
)  # fmt: skip
# Entry of the log: seconds of training until then, those of killed processes included.
_ELAPSED = "elapsed"


class AdapterTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` for what `get_model` returns.

    Where the method's config has a `router_learning_rate`, the weights of the skills are trained at
    that rate and without weight decay, everything else as the arguments say.

    Args:
        *args: As in `Seq2SeqTrainer`.
        task_temperature: Draw batches that mix the tasks of the data set's column `task_ids` at
            this temperature (`task_sampler.py`); None for transformers' order.
        gate_statistics: Log what the gates choose, see `GateCallback`.
        **kwargs: As in `Seq2SeqTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        task_temperature: float | None = None,
        gate_statistics: bool = False,
        **kwargs: Any,
    ) -> None:
        self.task_temperature = task_temperature
        self._seconds_before, self._started = 0.0, time.perf_counter()
        super().__init__(*args, **kwargs)
        if gate_statistics:
            self.add_callback(callback := GateCallback())
            # First, so that those who report see what it adds.
            callbacks = self.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(callback)))
            callback.on_init_end(self.args, self.state, self.control, model=self.model)

    def train_from(self, folder: str | None) -> float:
        """Train from a checkpoint on, None: from the start; take the best weights if any are.

        Weights and scores are those of a training that was never interrupted, bit for bit on the
        same machine with the same number of threads.

        Returns:
            Seconds of training; for what was read from the checkpoint the time it took then.
        """
        state = None if folder is None else _read_state(Path(folder))
        self._started = time.perf_counter()
        if state is None:
            self._seconds_before = 0.0
        else:
            times = [entry[_ELAPSED] for entry in state.log_history if _ELAPSED in entry]
            self._seconds_before = times[-1] if times else 0.0
        if state is None or state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=folder)
        else:
            # transformers would train one update more where the last one is not an epoch's last.
            self.state = state
            self._assign(str(folder)) if state.best_global_step is None else self._load_best_model()
        return self._elapsed()

    def _elapsed(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.task_temperature is None or dataset is None:
            return super()._get_train_sampler(train_dataset)
        rows: Any = dataset
        task_ids = [row["task_ids"] for row in rows]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return TaskSampler(task_ids, temperature=self.task_temperature, seed=seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with a group of its own for the routers."""
        known = self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        rate = getattr(getattr(model, "adapter_config", None), "router_learning_rate", None)
        if known is None and rate is not None:
            own = {id(parameter) for parameter in model.router_parameters()}
            moved = []
            for group in optimizer.param_groups:
                moved += [p for p in group["params"] if id(p) in own]
                group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group({"params": moved, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_sharded and not getattr(self, "is_fsdp_enabled", False):
            # The way of models that come sharded: neither wrapped in DDP nor sharded again.
            if not hasattr(self, "is_distributed_loading_by_transformers"):
                raise RuntimeError(
                    f"transformers {transformers.__version__} cannot train a model that is sharded "
                    "already: its trainer would wrap it once more. Use a newer version, or DDP"
                )
            self.is_distributed_loading_by_transformers = True
        return super()._prepare_for_training(*args, **kwargs)

    @property
    def _is_sharded(self) -> bool:
        model: Any = self.model
        return sharding.any_sharded(model.parameters())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, which would gather all of T5 from a model that is sharded."""
        if self._is_sharded:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Where transformers looks for what a checkpoint's state will hold; not every run logs.
        self.state.log_history.append(
            {"step": self.state.global_step, _ELAPSED: round(self._elapsed(), 3)}
        )
        if not self.args.should_save and not self._is_sharded:
            return
        folder = str(output_dir or self.args.output_dir)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        if self.args.should_save:
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer: Any = self.optimizer
        state = sharding.whole_optimizer_state(optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, _OPTIMIZER_FILE))
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), os.path.join(output_dir, _SCHEDULER_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_sharded:
            return super()._load_optimizer_and_scheduler(checkpoint)
        files = (os.path.join(checkpoint, name) for name in (_OPTIMIZER_FILE, _SCHEDULER_FILE))
        state, schedule = (torch.load(f, map_location="cpu", weights_only=True) for f in files)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        sharding.load_whole_optimizer_state(optimizer, state)
        scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._assign(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # Not the path in the state: the folder may have been moved since, or the working directory
        # be another one.
        self._assign(f"{self.args.output_dir}/checkpoint-{self.state.best_global_step}")

    def _assign(self, folder: str) -> None:
        _, tensors = checkpoint.read(folder)
        checkpoint.assign(self.accelerator.unwrap_model(self.model), tensors, folder)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete `checkpoint-N` in `folder`; incomplete ones are removed, and logged."""
    found: list[tuple[int, Path]] = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not step.isdigit():
            continue
        # A kill while it was written leaves the state out or cuts it off, one while it was removed
        # leaves any of the files.
        if all(any(path.glob(part)) for part in _PARTS) and _read_state(path) is not None:
            found.append((int(step), path))
        else:
            logger.warning("%s is not complete: removed", path)
            shutil.rmtree(path)
    return str(max(found)[1]) if found else None


def _read_state(folder: Path) -> TrainerState | None:
    """Transformers' state in a checkpoint; None if it was not written to its end."""
    try:
        return TrainerState.load_from_json(str(folder / _STATE_FILE))
    except json.JSONDecodeError:
        return None
