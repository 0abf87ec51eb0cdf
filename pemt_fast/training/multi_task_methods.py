# SPDX-License-Identifier: Apache-2.0
"""The methods that `pemt-fast multitask` compares, and how they come to the same size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from pemt_fast.attach import get_model
from pemt_fast.methods.lora import LoraConfig, MoeLoraConfig, MtlLoraConfig, MultiLoraConfig
from pemt_fast.methods.peml import PemlConfig
from pemt_fast.methods.poly import CPolyConfig, PolyConfig
from pemt_fast.methods.prompt_tuning import PromptTuningConfig
from pemt_fast.methods.task_config import TaskConfig

# C-Poly's published sizes, and the number of skills, splits and experts of the methods beside it.
COMMON, SPECIFIC, RANK, SKILLS = 3, 1, 2, 4
# Small, so that the embeddings of MoE-LoRA's gate do not add much to its budget.
EMBEDDING_WIDTH = 16
# Published sizes: parallel adapters of MultiLoRA and up-projections of MTL-LoRA; prompt positions.
PARALLEL, PROMPT_LENGTH = 3, 100
# Not made of hidden units alone: their rank is chosen for the number of LoRA's parameters.
SIZED = frozenset({"mtl_lora", "multi_lora", "lora_prefix", "peml"})
# A prompt learns at a rate of its own (Lester et al., 2021).
PROMPT_RATE = 0.3
METHODS = (
    "lora", "moe_lora", "poly", "mhr", "c_poly", "mtl_lora", "multi_lora", "prompt_tuning",
    "lora_prefix", "peml",
)  # fmt: skip
_MOST_RANK = 1024
# Fields of a config that the comparison sets itself.
_GIVEN = frozenset({"num_tasks", "task_names", "target_modules", "r", "alpha"})


def config_of(method: str, tasks: Sequence[str], units: int, **common: Any) -> TaskConfig:
    """The config of a method with `units` hidden units per layer.

    For those of `SIZED` the rank is a start that `sized` replaces; prompt tuning has its own size.

    Raises:
        ValueError: no such method, or the units cannot be shared out evenly.
    """
    names, count = {"task_names": tuple(tasks)}, len(tasks)
    adapters = {**names, **common}

    def share(parts: int) -> int:
        if units % parts:
            raise ValueError(f"units must be a multiple of {parts} for {method}, got {units}")
        return units // parts

    match method:
        case "lora":
            return LoraConfig(num_tasks=count, r=units, alpha=units, **adapters)
        case "moe_lora":
            share(SKILLS)
            return MoeLoraConfig(count, SKILLS, EMBEDDING_WIDTH, r=units, alpha=units, **adapters)
        case "poly" | "mhr":
            rank, splits = share(SKILLS), SKILLS if method == "mhr" else 1
            return PolyConfig(count, SKILLS, splits, r=rank, alpha=rank, **adapters)
        case "c_poly":
            rank = share(COMMON + SPECIFIC * count)
            return CPolyConfig(count, COMMON, SPECIFIC, r=rank, alpha=rank, **adapters)
        case "mtl_lora":
            return MtlLoraConfig(count, PARALLEL, r=units, alpha=units, **adapters)
        case "multi_lora":
            return MultiLoraConfig(
                num_tasks=count, num_adapters=PARALLEL, r=units, alpha=units, **adapters
            )
        case "lora_prefix" | "peml":
            depth = {} if method == "peml" else {"prefix_depth": 0}
            return PemlConfig(num_tasks=count, r=units, alpha=units, **depth, **adapters)  # type: ignore[arg-type]
        case "prompt_tuning":
            return PromptTuningConfig(num_tasks=count, prompt_length=PROMPT_LENGTH, **names)  # type: ignore[arg-type]
    raise ValueError(f"methods must be among {', '.join(METHODS)}, got {method!r}")


def with_settings(config: TaskConfig, settings: Mapping[str, Any]) -> TaskConfig:
    """The config with other values of some fields.

    Raises:
        ValueError: it has no such field, or the comparison sets it; or a value is not allowed.
    """
    known = {field.name for field in fields(config)} - _GIVEN
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(
            f"settings must be of {sorted(known)} for {config.method}, got {unknown[0]!r}"
        )
    return replace(config, **settings)


def rate_of(method: str, rate: float) -> float:
    """The learning rate of a method where the others have `rate`."""
    return PROMPT_RATE if method == "prompt_tuning" else rate


def trained(config: TaskConfig, model: Any) -> int:
    """How many parameters a config trains on a model; the model stays as it is."""
    adapted: Any = get_model(model, config)
    count: int = adapted.count_parameters()[0]
    adapted.unload()
    return count


def sized(config: Any, model: Any, budget: int) -> Any:
    """The config with the rank, α = r, whose trained parameters come closest to `budget`.

    Raises:
        ValueError: a rank of 1 is over the budget by more than half of it.
    """

    def with_rank(r: int) -> Any:
        return replace(config, r=r, alpha=float(r))

    low, high = 1, 2
    while trained(with_rank(high), model) < budget and high < _MOST_RANK:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if trained(with_rank(middle), model) < budget:
            low = middle
        else:
            high = middle
    found = {r: trained(with_rank(r), model) for r in (low, high)}
    best = min(found, key=lambda r: abs(found[r] - budget))
    if found[best] > 1.5 * budget:
        raise ValueError(
            f"units must be larger for {config.method}: rank {best} trains {found[best]:,} "
            f"parameters, LoRA {budget:,}"
        )
    return with_rank(best)
