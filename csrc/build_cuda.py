# SPDX-License-Identifier: Apache-2.0
"""Build the library `pemt_fast/_cuda.so` from `csrc/cuda`, or say why not; called by `setup.py`.

nvcc and a C++ compiler are enough: neither torch nor its headers take part, so that a torch for
another CUDA, or for none, does not matter. Two environment variables change it:

    PEMT_FAST_CUDA          1: a library that cannot be built is an error; 0: build none;
                            unset: try, and leave the reason in `pemt_fast/_cuda_missing.txt`
    PEMT_FAST_CUDA_ARCHS    for which devices, e.g. "80,90a"; unset: those of `ARCHITECTURES` that
                            this nvcc knows
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
LIBRARY, NOTE = "_cuda.so", "_cuda_missing.txt"

# Of these also run: 86 and 89 with what is made for 80, 103 with that for 100; later ones translate
# the PTX of the oldest when they load it.
ARCHITECTURES = ("80", "90a", "100")
OLDEST = 12  # that knows clusters and 90a


class NotBuilt(RuntimeError):
    """Why there is no library."""


def find_nvcc() -> str:
    """The path of nvcc: below CUDA_HOME or CUDA_PATH, on PATH, where CUDA is installed."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            found = shutil.which("nvcc", path=os.path.join(home, "bin"))
            if found is None:
                raise NotBuilt(f"there is no nvcc in {home}/bin ({variable})")
            return found
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise NotBuilt("nvcc was not found when the package was built")
    return found


def _ask(nvcc: str, option: str) -> str:
    try:
        done = subprocess.run([nvcc, option], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotBuilt(f"{nvcc} {option} fails: {error}") from error
    return done.stdout


def version_of(nvcc: str) -> str:
    """Its release, e.g. 13.0; raises for those that are too old."""
    found = re.search(r"release (\d+)\.(\d+)", _ask(nvcc, "--version"))
    if found is None:
        raise NotBuilt(f"{nvcc} --version does not say which release it is")
    if int(found[1]) < OLDEST:
        raise NotBuilt(f"{nvcc} is of CUDA {found[1]}.{found[2]}, {OLDEST}.0 is the oldest")
    return f"{found[1]}.{found[2]}"


def architectures_for(nvcc: str) -> list[str]:
    """Those to compile for, in order; raises if one was asked for that nvcc does not know."""
    known = re.findall(r"compute_(\d+)", _ask(nvcc, "--list-gpu-arch"))
    asked = re.findall(r"\w+", os.environ.get("PEMT_FAST_CUDA_ARCHS", ""))
    unknown = [name for name in asked if name.rstrip("af") not in known]
    if unknown:
        raise NotBuilt(
            f"PEMT_FAST_CUDA_ARCHS names {', '.join(unknown)}, {nvcc} knows {', '.join(known)}"
        )
    if old := [name for name in asked if int(name.rstrip("af")) < 80]:
        raise NotBuilt(f"PEMT_FAST_CUDA_ARCHS names {', '.join(old)}, 80 is the oldest")
    found = asked or [name for name in ARCHITECTURES if name.rstrip("af") in known]
    if not found:
        raise NotBuilt(f"{nvcc} knows none of {', '.join(ARCHITECTURES)}")
    return found


def command(nvcc: str, architectures: Sequence[str], library: Path) -> list[str]:
    """What compiles the library."""
    oldest = min(architectures, key=lambda name: int(name.rstrip("af")))
    targets = [f"arch=compute_{name},code=sm_{name}" for name in architectures]
    targets.append(f"arch=compute_{oldest},code=compute_{oldest}")  # what later devices translate
    names = "+".join(f"sm_{name}" for name in architectures)
    return [
        nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings",
        *(f"-gencode={target}" for target in targets), "--threads", "0",
        "-shared", "-cudart", "static", "-Xlinker", "-z,defs",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall",
        "-Xfatbin", "-compress-all", f"-DPEMT_FAST_CUDA_ARCHITECTURES={names}",
        "-o", str(library), *map(str, sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])),
    ]  # fmt: skip


def _key(nvcc: str, version: str, architectures: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join([nvcc, version, *architectures]).encode())
    for path in sorted([*SOURCES.iterdir(), Path(__file__)], key=lambda path: path.name):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(cache: Path) -> Path:
    nvcc = find_nvcc()
    version, architectures = version_of(nvcc), architectures_for(nvcc)
    # Compiling takes a minute: once for these sources.
    library = cache / f"{_key(nvcc, version, architectures)}.so"
    if library.is_file():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    call = command(nvcc, architectures, unfinished)
    print(" ".join(call), flush=True)
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        print("\n".join(lines), flush=True)
        raise NotBuilt(f"{nvcc} (CUDA {version}) failed: {' | '.join(lines[:3])}")
    unfinished.replace(library)
    return library


def build(package: Path, cache: Path) -> str | None:
    """Leave either the library or the reason for its absence in `package`; returns the reason.

    Args:
        package: The folder of the Python package.
        cache: Where compiled libraries are kept.
    """
    mode = os.environ.get("PEMT_FAST_CUDA", "")
    library, note = package / LIBRARY, package / NOTE
    package.mkdir(parents=True, exist_ok=True)
    # Not written over: a process may have it loaded.
    library.unlink(missing_ok=True)
    try:
        if mode == "0":
            raise NotBuilt("it was left out with PEMT_FAST_CUDA=0")
        shutil.copyfile(_compile(cache), library)
    except NotBuilt as error:
        if mode == "1":
            raise
        note.write_text(f"{error}\n", encoding="utf-8")
        return str(error)
    note.unlink(missing_ok=True)
    return None
