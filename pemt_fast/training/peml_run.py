# SPDX-License-Identifier: Apache-2.0
"""Search a PEML architecture on a data set and leave its report."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import IntervalStrategy, TrainerCallback, set_seed

from pemt_fast.attach import get_model
from pemt_fast.methods.peml import PemlConfig
from pemt_fast.training.fit import CHECKPOINTS, tidy, write_json
from pemt_fast.training.multi_task_methods import sized
from pemt_fast.training.search import SearchTrainer
from pemt_fast.training.search_report import write_search
from pemt_fast.training.stages import Backbone
from pemt_fast.training.trainer import last_complete_checkpoint

POINTS = 50  # of a history, about
FOUND_FILE = "found.json"


def search_prefix(
    backbone: Backbone,
    config: PemlConfig,
    arguments: Any,
    directory: Path | None,
    *,
    budget: int | None = None,
    architecture_share: float = 0.0,
    callbacks: Sequence[TrainerCallback] = (),
    **data: Any,
) -> tuple[PemlConfig, dict[str, Any]]:
    """Search with fresh LoRA and prefix networks; what they have learned is thrown away.

    Args:
        backbone: The frozen T5.
        config: Of the search.
        arguments: Of transformers' trainer; the search takes as many steps as they say.
        directory: For the report, for checkpoints and for what was found; a search that a kill
            interrupted goes on there, one that ended is not repeated. None: for nothing.
        budget: Trained parameters of LoRA and a plain prefix, for LoRA's rank; None: the config's.
        architecture_share: Part of the data set's rows, evenly spread, that the architecture alone
            is trained on (bi-level); 0: no such part.
        callbacks: For the trainer.
        **data: For `SearchTrainer`: data set, collator, sampling.

    Returns:
        The config with the architecture that was found, and what `results.json` keeps of it.
    """
    base = backbone.make()
    if budget is not None:
        plain = sized(replace(config, prefix_depth=0), base, budget)
        config = replace(config, r=plain.r, alpha=plain.alpha)
    if directory is not None and (directory / FOUND_FILE).is_file():
        found = json.loads((directory / FOUND_FILE).read_text())
        return replace(config, architecture=found["architecture"]), found
    arguments, resumed = copy.copy(arguments), None
    if directory is not None:
        arguments.output_dir = str(directory / CHECKPOINTS)
        resumed = last_complete_checkpoint(arguments.output_dir)
    arguments.logging_strategy = IntervalStrategy.STEPS  # the history of the search
    arguments.logging_steps = max(arguments.max_steps // POINTS, 1)
    if architecture_share:
        data["train_dataset"], data["architecture_dataset"] = divided(
            data["train_dataset"], architecture_share
        )
    set_seed(arguments.seed)
    model = get_model(base, config)
    try:
        trainer = SearchTrainer(model=model, args=arguments, **data)
        trainer.remove_callback(transformers.PrinterCallback)
        for callback in callbacks:
            trainer.add_callback(callback)
        seconds = round(trainer.train_from(resumed), 1)
        architecture = model.architecture()
        if directory is not None:
            write_search(model, trainer.history, directory, seconds=seconds)
        found = {
            "seconds": seconds, "steps": trainer.state.global_step, "architecture": architecture,
            "trainable_parameters": model.count_parameters()[0],
        }  # fmt: skip
        if directory is not None:
            write_json(directory / FOUND_FILE, found)
            tidy(directory)
        return replace(config, architecture=architecture), found
    finally:
        model.unload()


def divided(rows: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """The rows without a `share` of them, evenly spread, and these."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for i, row in enumerate(rows):
        parts[math.floor((i + 1) * share) > math.floor(i * share)].append(row)
    if not all(parts):
        raise ValueError(f"architecture_share {share} of {len(rows)} rows leaves a part empty")
    return parts
