# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere: read without running anything in them, and without more memory than theirs.

Pickles are read with torch's `weights_only`; what that leaves open is looked at before: records
that are compressed (a few kilobytes may become gigabytes), sizes in old files that nothing in them
backs, tensors that show a few bytes as many. Sizes in a config are compared with the tensors beside
it (`check_sizes`), and what is built from the config is stopped where it grows far beyond them
(`allocate_at_most`).
"""

from __future__ import annotations

import json
import math
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_LARGEST_JSON = 16 * 2**20
# Integers in a config that count nothing large, whatever the tensors are: splits, tasks, layers.
_SMALL_COUNT = 2**16
_BUILT_MORE = 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large to be a config, no valid JSON, or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{path}: must have at most {_LARGEST_JSON} bytes, has {size}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file, with an error that names a damaged one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")
    try:
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from error


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, read with `weights_only`: nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, asks for more memory than it has bytes, or holds objects of
            classes, which would be executed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: file not found")
    try:
        excess = _excess(path)
        found = None if excess else torch.load(path, map_location="cpu", weights_only=True)
    # Over damaged bytes the unpickler stumbles in many ways, an IndexError among them.
    except Exception as error:
        if pickled := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: holds objects besides tensors and plain values ({pickled[1]}), and "
                "reading those runs code of the file. If you trust it, read it once with "
                "torch.load(path, weights_only=False) where its classes are installed, and save "
                "its tensors and plain values with torch.save"
            ) from error
        raise ValueError(f"{path}: truncated, damaged or not plain tensors ({error})") from error
    if excess:
        raise ValueError(excess)
    _check_tensors(found, path)
    return found


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """`read_pickle` of a file that must hold a dict of tensors.

    Raises:
        ValueError: it holds something else, or as there.
    """
    values = read_pickle(path)
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(values).__name__}")
    return {name: tensor.detach() for name, tensor in values.items()}


def _excess(path: Path) -> str | None:
    """Why reading would take more memory than the file has bytes, None if it would not."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                    return (
                        f"{path}: its part {record.filename!r} is compressed or larger than the "
                        f"file ({record.file_size} bytes of {size}), which torch.save never writes"
                    )
        return None
    # Before torch 1.6: magic number, version, machine, then what was saved, whose storages state
    # their own sizes and are allocated before anything is read into them.
    with path.open("rb") as file:
        pickles = [list(pickletools.genops(file)) for _ in range(4)]
    stated = [value for _, value, _ in pickles[-1] if isinstance(value, int)]
    if stated and max(stated) > size:
        return (
            f"{path}: an old file of {size} bytes that states a size of {max(stated)}: refused. If "
            "you trust it, read it once with torch.load and save it again with torch.save"
        )
    return None


def _check_tensors(found: Any, path: Path) -> None:
    if isinstance(found, Tensor):
        dense = found.layout is torch.strided and found.device.type == "cpu"
        if not dense or found.untyped_storage().nbytes() < found.numel() * found.element_size():
            raise ValueError(
                f"{path}: a tensor of shape {list(found.shape)} must be dense and in the file as a "
                "whole"
            )
    elif isinstance(found, Mapping):
        for value in found.values():
            _check_tensors(value, path)
    elif isinstance(found, list | tuple):
        for value in found:
            _check_tensors(value, path)


def count_elements(tensors: Iterable[Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.numel() for tensor in tensors)


def check_sizes(values: Any, elements: int, path: Path, name: str = "") -> None:
    """Raise unless the integers of a config can be sizes of tensors with so many elements.

    Args:
        values: What JSON gave.
        elements: Of the tensors beside it, all together.
        path: Of the config, for the message.
        name: Where in it `values` is.

    Raises:
        ValueError: one is larger.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_sizes(value, elements, path, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list):
        for value in values:
            check_sizes(value, elements, path, name)
    elif isinstance(values, int | float) and not abs(values) <= max(elements, _SMALL_COUNT):
        raise ValueError(
            f"{path}: {name} = {values} is no size of the tensors beside it, which have {elements} "
            "elements"
        )


class allocate_at_most(TorchDispatchMode):  # noqa: N801
    """Inside, new tensors may have so many elements together; one that is too many is not made.

    For building a model from a config that may say anything: its parameters are those of the file,
    some tensors are only needed on the way.

    Args:
        file: Elements of the tensors in the file.
        model: Elements of the model it is attached to.
        path: Of the file or its directory, for the message.
    """

    def __init__(self, file: int, model: int, path: object) -> None:
        super().__init__()
        self.left = 4 * file + 2 * model + _BUILT_MORE
        self.path = path

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count what factories make."""
        if func.overloadpacket in _FACTORIES:
            sizes = (a for a in args if isinstance(a, list | tuple | torch.Size))
            self.left -= math.prod(next(iter(sizes), ()))
            if self.left < 0:
                raise ValueError(
                    f"{self.path}: what its config describes is far larger than its tensors"
                )
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
_FACTORIES = {
    _aten.empty, _aten.empty_strided, _aten.zeros, _aten.ones, _aten.full, _aten.rand, _aten.randn,
    _aten.randint, _aten.randperm, _aten.new_empty, _aten.new_empty_strided, _aten.new_zeros,
    _aten.new_ones, _aten.new_full, _aten.eye, _aten.arange,
}  # fmt: skip
