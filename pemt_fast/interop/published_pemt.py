# SPDX-License-Identifier: Apache-2.0
"""The checkpoint files of the published PEMT code (github JachinLin2022/PEMT).

Stage 1 leaves `lora.pt` (or `adapter.pt` for bottleneck sources) and `task_embedding.pt` per
source, stage 2 leaves `adapter.pt` and `task_embedding.pt`. Trained gates and layer norms are in
neither; a file that holds them (state-dict names of the published module) is passed as `extra`.
Files are read with `weights_only`, so nothing in them is executed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pemt_fast.methods.pemt import attach
from pemt_fast.methods.pemt_config import PemtConfig
from pemt_fast.methods.pemt_plan import Source
from pemt_fast.model import AdapterModel
from pemt_fast.safe_files import read_pickled_tensors, read_tensors
from pemt_fast.t5 import FeedForwardSite, T5Model, check_t5, feed_forward_sites

logger = logging.getLogger("pemt_fast")

_ADAPTER_KEY = re.compile(r"\.adapter_controller\.adapters\.([^.]+)\.")
# Module of a bottleneck in the authors' names -> ours, in the order of `Source.adapters`.
_LINEARS = (("down_sampler", "down"), ("up_sampler", "up"))


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a `torch.save` or safetensors file."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    return read_pickled_tensors(path)


def _take(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{path}: expected an entry {name!r}, found {sorted(tensors)[:3]} …")
    return tensors[name]


def _task_of(tensors: dict[str, Tensor], in_feed_forward: bool, path: Path) -> str:
    """The task name inside the adapter names."""
    names = {
        match.group(1)
        for key in tensors
        if (match := _ADAPTER_KEY.search(key)) and ("DenseReluDense" in key) == in_feed_forward
    }
    if len(names) != 1:
        raise ValueError(f"{path}: expected the adapters of one task, found {sorted(names)}")
    return names.pop()


def _bottleneck_names(prefix: str, task: str) -> list[str]:
    """Down weight, up weight, down bias, up bias below `prefix`."""
    stem = f"{prefix}.adapter_controller.adapters.{task}"
    return [f"{stem}.{linear}.{kind}" for kind in ("weight", "bias") for linear, _ in _LINEARS]


def _read_source(directory: str | os.PathLike[str], sites: Sequence[FeedForwardSite]) -> Source:
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the directory of a source does not exist")
    prompt_path = folder / "task_embedding.pt"
    prompt = _take(_read(prompt_path), "task_shared", prompt_path)
    path = folder / "lora.pt"
    if path.is_file():
        tensors, name = _read(path), folder.name
        names = {s.name: [f"{s.wo_path}.lora_A", f"{s.wo_path}.lora_B"] for s in sites}
    elif (path := folder / "adapter.pt").is_file():
        tensors = _read(path)
        name = _task_of(tensors, in_feed_forward=True, path=path)
        names = {s.name: _bottleneck_names(f"{s.path}.DenseReluDense", name) for s in sites}
    else:
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise FileNotFoundError(f"{folder}: expected lora.pt or adapter.pt, found {found}")
    adapters = {
        site: tuple(_take(tensors, key, path) for key in keys) for site, keys in names.items()
    }
    return Source(name.replace(".", "_"), prompt, adapters)


def load_published_pemt(
    model: T5Model,
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str] | None = None,
    extra: str | os.PathLike[str] | None = None,
) -> AdapterModel:
    """Attach PEMT to a T5 from the authors' files, in the released behaviour (`published=True`).

    Args:
        model: The T5 the files were trained on.
        sources: One directory per source, in the order of the gate.
        target: Directory of a trained target. None with one source: the stage-1 model of that
            source; None with several: stage 2 with a fresh target.
        extra: File with the trained gates and layer norms under the authors' names.

    Raises:
        FileNotFoundError: a directory or file is missing.
        ValueError: a file is damaged, incomplete, or does not fit the model.
    """
    check_t5(model)
    if isinstance(sources, (str, os.PathLike)) or not sources:
        raise ValueError(f"sources must be a non-empty list of directories, got {sources!r}")
    sites = feed_forward_sites(model)
    read = [_read_source(directory, sites) for directory in sources]
    kinds = {len(next(iter(s.adapters.values()))) for s in read}
    if len(kinds) != 1:
        raise ValueError("sources must all be lora.pt or all adapter.pt, got both")
    kind = "lora" if kinds == {2} else "bottleneck"
    values: dict[str, Tensor] = {}
    if target is None and len(read) == 1:
        config, given, values = _stage_one(read[0], kind, sites)
    else:
        config, values = _stage_two(read, kind, target, sites)
        given = read
    if extra is not None:
        values |= _read_extra(Path(extra))
    elif target is not None:
        logger.warning(
            "the published files hold neither gates nor layer norms: without extra= the gates are "
            "uniform and the layer norms those of the backbone"
        )
    adapted = attach(model, config, sources=given)
    try:
        _assign(adapted, values)
    except ValueError:
        adapted.unload()
        raise
    return adapted


def _stage_one(
    source: Source, kind: str, sites: Sequence[FeedForwardSite]
) -> tuple[PemtConfig, list[Source], dict[str, Tensor]]:
    config = PemtConfig(
        target=source.name, stage=1, source_kind=kind, source_rank=source.rank,
        prompt_length=source.prompt.shape[0], published=True,
    )  # fmt: skip
    values = {"task_shared": source.prompt}
    for site in sites:
        if kind == "lora":
            names = [f"{site.wo_path}.lora_A", f"{site.wo_path}.lora_B"]
        else:
            names = _bottleneck_names(f"{site.path}.DenseReluDense", source.name)
        values |= zip(names, source.adapters[site.name], strict=True)
    return config, [], values


def _stage_two(
    read: Sequence[Source],
    kind: str,
    target: str | os.PathLike[str] | None,
    sites: Sequence[FeedForwardSite],
) -> tuple[PemtConfig, dict[str, Tensor]]:
    names = tuple(source.name for source in read)
    if target is None:
        return PemtConfig(sources=names, source_kind=kind, published=True), {}
    path, prompt_path = Path(target) / "adapter.pt", Path(target) / "task_embedding.pt"
    tensors = _read(path)
    task = _task_of(tensors, in_feed_forward=False, path=path)
    values = {"task_shared": _take(_read(prompt_path), "task_shared", prompt_path)}
    for site in sites:
        for key in _bottleneck_names(site.path, task):
            values[key] = _take(tensors, key, path)
    config = PemtConfig(
        sources=names,
        target=task,
        source_kind=kind,
        target_bottleneck=values[_bottleneck_names(sites[0].path, task)[0]].shape[0],
        prompt_length=values["task_shared"].shape[0],
        published=True,
    )
    return config, values


def _read_extra(path: Path) -> dict[str, Tensor]:
    tensors = _read(path)
    wanted = {k: v for k, v in tensors.items() if k.endswith("w_gate") or "layer_norm" in k}
    if not wanted:
        raise ValueError(
            f"{path}: expected w_gate and layer_norm entries, found {sorted(tensors)[:3]}"
        )
    return wanted


@torch.no_grad()
def _assign(adapted: AdapterModel, values: dict[str, Tensor]) -> None:
    """Copy tensors under the authors' names into our parameters."""
    names = {theirs: ours for ours, theirs in published_names(adapted).items()}
    parameters = dict(adapted.named_parameters())
    for theirs, tensor in values.items():
        if theirs not in names:
            raise ValueError(
                f"{theirs!r} has no place in this model; trained are {sorted(names)[:3]} …"
            )
        own = parameters[names[theirs]]
        if own.shape != tensor.shape:
            raise ValueError(
                f"{theirs} must be {list(own.shape)} for this model, got {list(tensor.shape)}"
            )
        own.copy_(tensor)


def published_names(model: AdapterModel) -> dict[str, str]:
    """Our trainable parameter name → the authors' name, for a PEMT model.

    The shapes are the same on both sides.
    """
    config = model.adapter_config
    if not isinstance(config, PemtConfig):
        raise TypeError(f"model must be a PEMT model, got {type(config).__name__}")
    if len(config.tasks) > 1:
        raise ValueError(f"model must have one target, as the authors' do, got {config.tasks}")
    names = {"prompt.prompt": "task_shared"}
    for site in feed_forward_sites(model.base_model):
        ours, inner = f"base_model.{site.wo_path}", f"{site.path}.DenseReluDense"
        if config.stage == 2:
            gate_owner = site.wo_path if config.source_kind == "lora" else inner
            names[f"{ours}.gate.w_gate"] = f"{gate_owner}.w_gate"
            module, prefix = "target_adapter", site.path
        elif config.source_kind == "lora":
            names[f"{ours}.adapter.down.weight"] = f"{site.wo_path}.lora_A"
            names[f"{ours}.adapter.up.weight"] = f"{site.wo_path}.lora_B"
            continue
        else:
            module, prefix = "adapter", inner
        own = [f"{ours}.{module}.{o}.{kind}" for kind in ("weight", "bias") for _, o in _LINEARS]
        names |= zip(own, _bottleneck_names(prefix, config.tasks[0]), strict=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name in trained - names.keys():
        names[name] = name.removeprefix("base_model.")
    return {ours: theirs for ours, theirs in names.items() if ours in trained}
