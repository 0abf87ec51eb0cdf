# SPDX-License-Identifier: Apache-2.0
"""The compiled module `pemt_fast._C`: its import, and why there is none.

The package is complete without it but for `impl="cpu"`. Where it could not be built, `setup.py`
left the reason in `_C_missing.txt`; where it was built for another torch, its import tells. The
sources are in `csrc/`.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

# Loads the libraries that the extension takes from the process, the OpenMP runtime among them.
import torch

NAME = "pemt_fast._C"
NOTE = Path(__file__).parents[1] / "_C_missing.txt"
REBUILD = "to build it: pip install --no-build-isolation -e ."


def load() -> ModuleType | None:
    """The extension module, imported on first use; None where it is missing."""
    return _load()[0]


def missing_reason() -> str | None:
    """Why `load` returns None, and what to do about it; None where there is an extension."""
    return _load()[1]


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(NAME)
        built_for, here = module.torch_version, torch.__version__.partition("+")[0]
        if built_for != here:
            reason = f"the extension {NAME} was built for torch {built_for}, this is {here}"
            return None, f"{reason}; {REBUILD}"
        return module, None
    except ModuleNotFoundError:
        if NOTE.is_file():
            reason = NOTE.read_text(encoding="utf-8").strip()
        else:
            reason = "it has not been built for this Python"
        return None, f"the extension {NAME} is missing: {reason}; {REBUILD}"
    except ImportError as error:
        built = f"the extension {NAME} does not fit torch {torch.__version__}"
        return None, f"{built}: {error}; {REBUILD}"
