# SPDX-License-Identifier: Apache-2.0
"""`AdapterTrainer`: transformers' `Seq2SeqTrainer` whose checkpoints hold adapters only.

Optimiser, schedule and random states are written and read by transformers as always; T5's own
weights, which never change, are not. A checkpoint that a kill left incomplete is not resumed from.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import Seq2SeqTrainer

from pemt_fast import checkpoint

logger = logging.getLogger("pemt_fast")

# transformers writes the state last, so a folder with it is complete.
_LAST_FILE = "trainer_state.json"


class AdapterTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` for an `AdapterModel`."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._assign(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._assign(self.state.best_model_checkpoint)

    def _assign(self, folder: str | None) -> None:
        assert folder is not None
        _, tensors = checkpoint.read(folder)
        checkpoint.assign(self.accelerator.unwrap_model(self.model), tensors, folder)


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete `checkpoint-N` in `folder`; incomplete ones are removed, and logged."""
    found: list[tuple[int, Path]] = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if not step.isdigit():
            continue
        if (path / _LAST_FILE).is_file() and (path / checkpoint.CONFIG_FILE).is_file():
            found.append((int(step), path))
        else:
            logger.warning("%s was not written to its end: removed", path)
            shutil.rmtree(path)
    return str(max(found)[1]) if found else None
