# SPDX-License-Identifier: Apache-2.0
"""What is remembered about a GPU from one process to the next: files in the user's cache folder.

A value holds for one model of GPU, one version each of torch and Triton, and the sources of the
kernels as they are: anything else is another identity, which has no value yet. The folder is
`$PEMT_FAST_CACHE`, else `pemt_fast` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("pemt_fast")


def folder() -> Path:
    """Where the files are; it need not exist."""
    if named := os.environ.get("PEMT_FAST_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pemt_fast"


@functools.cache
def identity(device: torch.device) -> dict[str, str]:
    """What a value depends on."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        name = capability = device.type  # Triton's interpreter
    return {
        "gpu": name,
        "capability": capability,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "kernels": digest.hexdigest()[:16],
    }


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())["entries"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read and is not used: %s", path, error)
        return []


def load(name: str, device: torch.device) -> Any:
    """The value of that name for this GPU and these versions, None if there is none."""
    wanted = identity(device)
    for entry in _entries(folder() / f"{name}.json"):
        if entry["identity"] == wanted:
            return entry["value"]
    return None


def save(name: str, device: torch.device, value: Any) -> Path:
    """Keep a value (of what JSON can hold) in place of the one before; returns the file."""
    path, key = folder() / f"{name}.json", identity(device)
    entries = [entry for entry in _entries(path) if entry["identity"] != key]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.new")
    beside.write_text(
        json.dumps({"entries": [*entries, {"identity": key, "value": value}]}, indent=1) + "\n"
    )
    beside.replace(path)
    return path
