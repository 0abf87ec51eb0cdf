"""A compiler for CUDA that takes no time, to test how it is found and called."""

from pathlib import Path

KNOWN = "compute_75 compute_80 compute_90 compute_100"


def fake_cuda(
    folder: Path,
    *,
    version: str = "release 13.0, V13.0.88",
    known: str = KNOWN,
    compile: str = 'echo "$call" > "$2"',
) -> Path:
    """A CUDA_HOME whose nvcc writes its own command in place of a library.

    Args:
        folder: Where the home is made, and a line is added to the file `compiled` at every call.
        version: What `--version` says.
        known: What `--list-gpu-arch` says.
        compile: Shell that leaves the file `$2`, or fails.
    """
    program = folder / "cuda" / "bin" / "nvcc"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(
        f'#!/bin/sh\ncall="$*"\ncase "$1" in\n--version) echo "{version}";;\n'
        f"--list-gpu-arch) printf '%s\\n' {known};;\n"
        f'*) echo >> "{folder}/compiled"; while [ "$1" != -o ]; do shift; done; {compile};;\n'
        "esac\n"
    )
    program.chmod(0o755)
    return folder / "cuda"
