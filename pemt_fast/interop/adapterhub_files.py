# SPDX-License-Identifier: Apache-2.0
"""Directories of AdapterHub's library `adapters`: one bottleneck adapter on T5, read and written.

The library need not be installed. Its tensors are named
`{sub-layer}.adapters.{name}.adapter_down.0.{weight [R, D], bias [R]}` and
`{sub-layer}.adapters.{name}.adapter_up.{weight [D, R], bias [D]}`, below `transformer.` where a
model with flexible heads was saved. Its options: `adapterhub_config.py`.

Source: github adapter-hub/adapters 1.3.0, loading.py, methods/bottleneck.py, models/t5.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pemt_fast import checkpoint
from pemt_fast.attach import check_free, get_model
from pemt_fast.interop.adapterhub_config import config_from_options, options_from_config
from pemt_fast.linear_model import LinearAdapterModel
from pemt_fast.methods.bottleneck import BottleneckConfig
from pemt_fast.safe_files import read_json, read_pickled_tensors, read_tensors
from pemt_fast.t5 import T5Model, check_t5

logger = logging.getLogger("pemt_fast")

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"
PICKLE_FILE = "pytorch_adapter.bin"
_HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
_MODEL_TYPES = ("t5", "mt5")
_WRITTEN_FOR = "adapters.1.3.0"
_HEADED_PREFIX = "transformer."  # of models with flexible heads


def load_adapterhub(model: Any, directory: str | os.PathLike[str]) -> LinearAdapterModel:
    """Attach a bottleneck adapter that AdapterHub's `save_adapter` wrote to a fresh T5.

    Computes what the library, version 1.3.0, computes with it as the only active adapter. Reads
    `adapter.safetensors`, else `pytorch_adapter.bin`, of which nothing is executed. Values are cast
    to the model's dtype, as there. The language head that `save_adapter` puts beside an adapter is
    not read; a line in the log says so.

    Args:
        model: A `T5ForConditionalGeneration` or `MT5ForConditionalGeneration` as the adapter was
            trained on.
        directory: With `adapter_config.json` and the weights.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: `model` is not a T5.
        ValueError: another kind of adapter or model, an option without counterpart in
            `BottleneckConfig`, a damaged file, or tensors that do not fit; the message names it,
            and the model is left as it was.
        RuntimeError: the model carries adapters already.
    """
    check_free(model)
    check_t5(model)
    folder = Path(directory)
    config, name = _read_config(folder / CONFIG_FILE, model)
    path = folder / WEIGHTS_FILE
    if path.is_file():
        tensors = read_tensors(path)[0]
    else:
        path = folder / PICKLE_FILE
        tensors = read_pickled_tensors(path)
    own = _own_names(config, model, name, tensors, path)
    if heads := [file for file in _HEAD_FILES if (folder / file).is_file()]:
        logger.warning("%s: %s is not read, the model keeps its own head", folder, heads[0])
    adapted = get_model(model, config)
    try:
        checkpoint.assign(adapted, own, path)
    except ValueError:
        adapted.unload()
        raise
    return adapted


def export_adapterhub(
    model: LinearAdapterModel, directory: str | os.PathLike[str], *, name: str = "adapter"
) -> None:
    """Write the adapters in the layout of AdapterHub's library, version 1.3.0.

    `adapter_config.json` and `adapter.safetensors`, each written under a temporary name and
    renamed. There `model.load_adapter(directory, use_safetensors=True)` reads them: without that
    option the library looks for a pickle file, which is not written here.

    Args:
        model: With a `BottleneckConfig`.
        directory: Created if needed.
        name: Of the adapter, in the file and in the library.

    Raises:
        ValueError: the method is another one, or `name` cannot be that of a module.
        RuntimeError: within `model.disabled()`.
    """
    config = model.adapter_config
    if not isinstance(config, BottleneckConfig):
        raise ValueError(
            f"model must have a BottleneckConfig, got a {type(config).__name__}: AdapterHub has "
            "no place for its adapters"
        )
    if not name or "." in name:
        raise ValueError(f"name must be a name without dots, got {name!r}")
    base: Any = model.base_model
    # A copy each, for tensors that share memory are refused by the format.
    tensors = {
        theirs: tensor.contiguous().cpu()
        for theirs, tensor in _renamed(checkpoint.adapter_state_dict(model), name).items()
    }
    description = {
        "config": options_from_config(config, base.config.d_model),
        "hidden_size": base.config.d_model, "model_class": type(base).__name__,
        "model_name": getattr(base.config, "_name_or_path", ""),
        "model_type": base.config.model_type, "name": name, "version": _WRITTEN_FOR,
    }  # fmt: skip
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2, sort_keys=True)
    checkpoint.replace_file(
        folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, {"format": "pt"})
    )
    checkpoint.replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text))


def _read_config(path: Path, model: T5Model) -> tuple[BottleneckConfig, str]:
    """The config, complete for this model, and the adapter's name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file written by AdapterHub's save_adapter")
    saved = read_json(path)
    if not isinstance(saved.get("config"), dict):
        raise ValueError(f"{path}: expected an entry config with the adapter's options")
    if not isinstance(name := saved.get("name"), str):
        raise ValueError(f"{path}: expected an entry name with the adapter's name, got {name!r}")
    if (kind := saved.get("model_type")) not in (None, *_MODEL_TYPES):
        raise ValueError(f"{path}: model_type must be t5 or mt5, got {kind!r}")
    d_model = model.config.d_model
    if (width := saved.get("hidden_size")) not in (None, d_model):
        raise ValueError(f"{path}: hidden_size must be {d_model}, the model's width, got {width!r}")
    blocks = len(model.encoder.block) + len(model.decoder.block)
    try:
        config = config_from_options(
            saved["config"], d_model=d_model, blocks=blocks, has_version="version" in saved
        )
        config = config.complete(d_model)
        config.places(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config, name


def _own_names(
    config: BottleneckConfig,
    model: T5Model,
    name: str,
    tensors: Mapping[str, Tensor],
    path: Path,
) -> dict[str, Tensor]:
    """The file's tensors under our names, checked before anything is attached."""
    if tensors and all(key.startswith(_HEADED_PREFIX) for key in tensors):
        tensors = {key.removeprefix(_HEADED_PREFIX): t for key, t in tensors.items()}
    d, r = model.config.d_model, config.bottleneck
    shapes = {"down.weight": (r, d), "down.bias": (r,), "up.weight": (d, r), "up.bias": (d,)}
    own = {
        f"base_model.{place}.adapter.{part}": shape
        for place in config.places(model)
        for part, shape in shapes.items()
    }
    theirs = _renamed({key: key for key in own}, name)
    checkpoint.require_names(theirs, tensors, f"{path}: does not fit {CONFIG_FILE} and this model")
    for key, ours in theirs.items():
        if tuple(tensors[key].shape) != own[ours] or not tensors[key].is_floating_point():
            raise ValueError(
                f"{path}: {key} must be {list(own[ours])} of a float dtype for this model, got "
                f"{list(tensors[key].shape)} of {tensors[key].dtype}"
            )
    return {ours: tensors[key] for key, ours in theirs.items()}


def _renamed(own: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values by AdapterHub's keys, of values by the names of our parameters."""
    parts = {"down": "adapter_down.0", "up": "adapter_up"}
    found = {}
    for key, value in own.items():
        place, _, part = key.removeprefix("base_model.").partition(".adapter.")
        layer, _, kind = part.partition(".")
        # Ours may sit on the sub-layer's dropout, see `BottleneckConfig.places`.
        site = place.removesuffix(".dropout")
        found[f"{site}.adapters.{name}.{parts[layer]}.{kind}"] = value
    return found
