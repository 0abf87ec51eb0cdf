# SPDX-License-Identifier: Apache-2.0
"""Before PEMT touches a model: read the sources, complete the config, check that all of it fits."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pemt_fast import checkpoint
from pemt_fast.data.tasks import TASKS
from pemt_fast.methods.pemt_config import PemtConfig
from pemt_fast.t5 import T5Model, feed_forward_sites, max_positions

logger = logging.getLogger("pemt_fast")


@dataclass
class Source:
    """One trained source.

    Attributes:
        name: Task name.
        prompt: `[P_k, d_model]`.
        adapters: By site name (`encoder.0`): `down [R, D]`, `up [H, R]` and, for `bottleneck`
            sources, `b_down [R]`, `b_up [H]`, in this order.
    """

    name: str
    prompt: Tensor
    adapters: dict[str, tuple[Tensor, ...]]

    @property
    def rank(self) -> int:
        """Bottleneck width."""
        return next(iter(self.adapters.values()))[0].shape[0]


@dataclass(frozen=True)
class Plan:
    """A config with nothing left open.

    Attributes:
        config: Complete: building from it needs no other file.
        sources: Trained sources in the order of the gate; empty for fresh ones.
        token_ids: Tokens of the targets' descriptions, then of those of fresh sources; None without
            a tokenizer.
        prompt_lengths: Prompt positions per target.
        source_prompt_lengths: The same per source.
        ranks: Bottleneck width per source.
        target_bottleneck: Width of the target adapter.
    """

    config: PemtConfig
    sources: tuple[Source, ...]
    token_ids: tuple[list[int] | None, ...]
    prompt_lengths: tuple[int, ...]
    source_prompt_lengths: tuple[int, ...]
    ranks: tuple[int, ...]
    target_bottleneck: int


def make_plan(
    model: T5Model,
    config: PemtConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    sources: Sequence[Source] | None,
) -> Plan:
    """Read, complete and check; raises before anything is changed."""
    if sources is None:
        directories = [name for name in config.sources if _is_directory(name)]
        if directories and len(directories) != len(config.sources):
            fresh = [name for name in config.sources if name not in directories]
            raise ValueError(
                f"sources must be all directories or all plain names; {fresh} are no directories"
            )
        sources = [read_source(directory, model, config) for directory in directories]
    given = zip(config.tasks, config.per_target("description"), strict=True)
    texts = [text or describe(task) for task, text in given]
    token_ids = [_token_ids(text, tokenizer) for text in texts]
    prompt_lengths = tuple(
        length or _length(text, ids)
        for length, text, ids in zip(
            config.per_target("prompt_length"), texts, token_ids, strict=True
        )
    )
    lengths, ranks = config.source_prompt_lengths, config.source_ranks
    if sources:
        names = tuple(s.name for s in sources)
        if len(set(names)) != len(names):
            raise ValueError(f"sources must be different tasks, got {list(names)}")
        lengths, ranks = [s.prompt.shape[0] for s in sources], [s.rank for s in sources]
    else:
        names = tuple(config.sources)
        if names:
            logger.info("sources %s are plain names: freshly initialised", ", ".join(names))
        named = [describe(name) for name in names]
        ids = [_token_ids(t, tokenizer) for t in named]
        token_ids += ids
        lengths = lengths or [_length(t, i) for t, i in zip(named, ids, strict=True)]
        ranks = ranks or [config.source_rank] * len(names)
    bottleneck = config.target_bottleneck or model.config.d_model // config.target_reduction
    config = replace(
        config,
        sources=names,
        description=texts,
        prompt_length=prompt_lengths,
        source_prompt_lengths=lengths if names else None,
        source_ranks=ranks if names else None,
        target_bottleneck=bottleneck or None,
    )
    plan = Plan(
        config, tuple(sources), tuple(token_ids), prompt_lengths, tuple(lengths), tuple(ranks),
        bottleneck,
    )  # fmt: skip
    _check_fits(model, plan)
    return plan


def _is_directory(source: str) -> bool:
    """Whether a source is meant as a directory; a path that does not exist is an error."""
    if os.path.isdir(source):
        return True
    if os.sep in source or source.startswith("."):
        raise FileNotFoundError(
            f"sources: {source!r} is neither an existing directory nor a plain name"
        )
    return False


def read_source(directory: str | os.PathLike[str], model: T5Model, config: PemtConfig) -> Source:
    """A source trained in stage 1, checked against `model` and `config`."""
    saved, tensors = checkpoint.read(directory)
    if not isinstance(saved, PemtConfig) or saved.stage != 1:
        raise ValueError(f"{directory}: expected a source trained in stage 1 of PEMT")
    if saved.source_kind != config.source_kind:
        raise ValueError(
            f"{directory}: source_kind is {saved.source_kind!r}, the config asks for "
            f"{config.source_kind!r}"
        )
    adapters = {}
    for site in feed_forward_sites(model):
        prefix = f"base_model.{site.wo_path}.adapter."
        names = ["down.weight", "up.weight"]
        names += ["down.bias", "up.bias"] if saved.source_kind == "bottleneck" else []
        missing = [prefix + n for n in names if prefix + n not in tensors]
        if missing:
            raise ValueError(f"{directory}: made for another model size; missing {missing[0]}")
        adapters[site.name] = tuple(tensors[prefix + n] for n in names)
    return Source(saved.tasks[0], tensors["prompt.prompt"], adapters)


def describe(task: str) -> str:
    """The sentence whose tokens set a prompt's length; an unknown task is described by its name."""
    return TASKS[task].description if task in TASKS else task.replace("_", " ")


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase | None) -> list[int] | None:
    return None if tokenizer is None else list(tokenizer(text)["input_ids"])


def _length(text: str, token_ids: list[int] | None) -> int:
    """Tokens of the description; without a tokenizer its words and the end token."""
    return len(text.split()) + 1 if token_ids is None else len(token_ids)


def _check_fits(model: T5Model, plan: Plan) -> None:
    limit = max_positions(model)
    if max(plan.prompt_lengths) > limit:
        raise ValueError(
            f"prompt_length must be at most {limit}, the positions of this model, "
            f"got {max(plan.prompt_lengths)}"
        )
    d, h = model.config.d_ff, model.config.d_model
    if plan.config.stage == 2 and plan.target_bottleneck < 1:
        raise ValueError(
            f"target_reduction must be at most d_model = {h}, got {plan.config.target_reduction}"
        )
    for source in plan.sources:
        if source.prompt.shape[1:] != (h,):
            raise ValueError(
                f"source {source.name!r}: its prompt must be [P, d_model] = [P, {h}], "
                f"got {list(source.prompt.shape)}"
            )
        for name, (down, up, *_) in source.adapters.items():
            if down.shape[1] != d or up.shape[0] != h or down.shape[0] != up.shape[1]:
                raise ValueError(
                    f"source {source.name!r}: the adapter of {name} must be [R, {d}] and [{h}, R], "
                    f"got {list(down.shape)} and {list(up.shape)}"
                )
