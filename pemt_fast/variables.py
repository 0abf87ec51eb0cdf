# SPDX-License-Identifier: Apache-2.0
"""The environment variables that change something; `pemt-fast info` shows all of them."""

from __future__ import annotations

import os

# Name -> what it does. A test compares the names with those in the sources.
VARIABLES = {
    "PEMT_FAST_IMPL": "what impl='auto' means, for debugging",
    "PEMT_FAST_CACHE": "folder of what doctor and tune found; default: ~/.cache/pemt_fast",
    "PEMT_FAST_DEBUG": "1: the command line shows tracebacks",
    "PEMT_FAST_CUDA_LIBRARY": "another file of compiled CUDA kernels",
    "PEMT_FAST_BUILD": "installation: 0 without, 1 not without the C++ extension",
    "PEMT_FAST_CUDA": "installation: 0 without, 1 not without the CUDA kernels",
    "PEMT_FAST_CUDA_ARCHS": "installation: the architectures of the CUDA kernels",
    "PEMT_FAST_SANITIZE": "installation: sanitizers of the C++ extension",
}


def settings() -> dict[str, tuple[str | None, str]]:
    """Value, None where it is not set, and meaning of each; unknown ones in the environment too."""
    known = {name: (os.environ.get(name), meaning) for name, meaning in VARIABLES.items()}
    unknown = sorted(k for k in os.environ if k.startswith("PEMT_FAST_") and k not in known)
    return known | {name: (os.environ[name], "unknown: it changes nothing") for name in unknown}
