# SPDX-License-Identifier: Apache-2.0
"""Search a PEML architecture on a data set and leave its report."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import IntervalStrategy, set_seed

from pemt_fast.attach import get_model
from pemt_fast.methods.peml import PemlConfig
from pemt_fast.training.multi_task_methods import sized
from pemt_fast.training.search import SearchTrainer
from pemt_fast.training.search_report import write_search
from pemt_fast.training.stages import Backbone

POINTS = 50  # of a history, about


def search_prefix(
    backbone: Backbone,
    config: PemlConfig,
    arguments: Any,
    directory: Path,
    *,
    budget: int | None,
    **data: Any,
) -> tuple[PemlConfig, dict[str, Any]]:
    """Search with fresh LoRA and prefix networks; what they have learned is thrown away.

    Args:
        backbone: The frozen T5.
        config: Of the search.
        arguments: Of transformers' trainer; the search takes as many steps as they say.
        directory: For the report.
        budget: Trained parameters of LoRA and a plain prefix, for LoRA's rank; None: the config's.
        **data: For `SearchTrainer`: data set, collator, sampling.

    Returns:
        The config with the architecture that was found, and what `results.json` keeps of it.
    """
    base = backbone.make()
    if budget is not None:
        plain = sized(replace(config, prefix_depth=0), base, budget)
        config = replace(config, r=plain.r, alpha=plain.alpha)
    arguments = copy.copy(arguments)
    arguments.logging_strategy = IntervalStrategy.STEPS  # the history of the search
    arguments.logging_steps = max(arguments.max_steps // POINTS, 1)
    set_seed(arguments.seed)
    model = get_model(base, config)
    try:
        trainer = SearchTrainer(model=model, args=arguments, **data)
        trainer.remove_callback(transformers.PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = round(time.perf_counter() - started, 1)
        architecture = model.architecture()
        write_search(model, trainer.history, directory, seconds=seconds)
        found = {
            "seconds": seconds, "steps": trainer.state.global_step, "architecture": architecture,
            "trainable_parameters": model.count_parameters()[0],
        }  # fmt: skip
        return replace(config, architecture=architecture), found
    finally:
        model.unload()
