"""The compiled module `pemt_fast._C`: found, or missing with a reason; one OpenMP runtime."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pemt_fast.ops import extension

OPENMP_RUNTIMES = """
import torch
from pemt_fast.ops import extension
assert extension.load()
with open("/proc/self/maps") as file:
    mapped = {line.split()[-1] for line in file if "/" in line}
print(*[path for path in mapped if any(name in path for name in ("libgomp", "libomp", "libiomp"))])
"""


@pytest.fixture
def module():
    if extension.load() is None:
        pytest.skip(extension.missing_reason())
    return extension.load()


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """The loader, looking for a module and a note that are not there."""
    monkeypatch.setattr(extension, "NAME", "pemt_fast_extension_of_this_test")
    monkeypatch.setattr(extension, "NOTE", tmp_path / "_C_missing.txt")
    extension._load.cache_clear()
    yield extension
    extension._load.cache_clear()


def test_instruction_set_in_use_is_one_of_the_possible_ones(module):
    assert module.cpu_isa() in module.cpu_isas()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_openmp_runtime_is_the_one_of_torch(module):
    # NOTE: in /proc/self/maps alone a second runtime of the same name would not show.
    assert b"libgomp" not in Path(module.__file__).read_bytes()
    command = [sys.executable, "-P", "-c", OPENMP_RUNTIMES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout


def test_missing_extension_has_the_reason_that_the_build_left(missing):
    missing.NOTE.write_text("no compiler that day\n")
    assert missing.load() is None
    assert "is missing: no compiler that day; to build it: pip install" in missing.missing_reason()


def test_missing_extension_without_a_note_was_not_built(missing):
    assert missing.load() is None
    assert "it has not been built for this Python" in missing.missing_reason()


def test_extension_that_does_not_load_says_what_the_loader_says(missing, monkeypatch, tmp_path):
    file = tmp_path / f"{missing.NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    file.write_text("not a library")
    monkeypatch.syspath_prepend(tmp_path)
    assert missing.load() is None
    reason = missing.missing_reason()
    assert "does not fit torch" in reason and file.name in reason and "to build it" in reason
