"""`csrc/build_cuda.py`: the library of CUDA kernels is built, or the reason is left."""

import importlib.util
import sys

import pytest
from cuda_sources import ROOT
from fake_nvcc import fake_cuda

SPEC = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc" / "build_cuda.py")
build_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_cuda)


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Makes a compiler below CUDA_HOME; its library is the text of its command."""
    for name in ("CUDA_HOME", "CUDA_PATH", "PEMT_FAST_CUDA", "PEMT_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)

    def make(**options):
        home = fake_cuda(tmp_path, **options)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return home / "bin" / "nvcc"

    return make


@pytest.fixture
def build(tmp_path):
    """The reason, the library's text, the note's text, and how often something was compiled."""

    def run():
        package = tmp_path / "package"
        reason = build_cuda.build(package, tmp_path / "cache")

        def text(path):
            return path.read_text() if path.exists() else None

        compiled = text(tmp_path / "compiled")
        return (
            reason,
            text(package / build_cuda.LIBRARY),
            text(package / build_cuda.NOTE),
            compiled.count("\n") if compiled else 0,
        )

    return run


def test_the_library_is_built_for_all_devices_that_nvcc_knows(nvcc, build):
    nvcc()
    reason, library, note, _ = build()
    assert reason is None and note is None
    for target in ("sm_80", "sm_90a", "sm_100", "compute_80"):
        assert f"code={target}" in library
    assert "PEMT_FAST_CUDA_ARCHITECTURES=sm_80+sm_90a+sm_100" in library
    assert "-cudart static" in library and "decode.cu" in library and "library.cu" in library


def test_what_nvcc_does_not_know_is_left_out(nvcc, build):
    nvcc(version="release 12.2, V12.2.1", known="compute_80 compute_90")
    reason, library, _, _ = build()
    assert reason is None
    assert "ARCHITECTURES=sm_80+sm_90a " in library and "100" not in library


def test_compiled_once_for_the_same_sources(nvcc, build, monkeypatch):
    nvcc()
    first = build()
    assert build() == first and first[3] == 1
    monkeypatch.setenv("PEMT_FAST_CUDA_ARCHS", "90a")
    _, library, _, compiled = build()
    assert compiled == 2
    assert "ARCHITECTURES=sm_90a " in library and "code=compute_90a" in library
    assert "sm_80" not in library


FAILURES = {
    "left-out": ({}, {"PEMT_FAST_CUDA": "0"}, "left out with PEMT_FAST_CUDA=0"),
    "too-old": ({"version": "release 11.8, V11.8.89"}, {}, "is of CUDA 11.8, 12.0 is the oldest"),
    "no-version": ({"version": "what?"}, {}, "--version does not say which release it is"),
    "knows-none": ({"known": "compute_50 compute_75"}, {}, "knows none of 80, 90a, 100"),
    "unknown": ({}, {"PEMT_FAST_CUDA_ARCHS": "80;200"}, "PEMT_FAST_CUDA_ARCHS names 200, "),
    "unsupported": ({}, {"PEMT_FAST_CUDA_ARCHS": "75"}, "names 75, 80 is the oldest"),
    "fails": (
        {"compile": "echo 'unsupported GNU version' >&2; exit 1"}, {},
        "(CUDA 13.0) failed: unsupported GNU version",
    ),
    "elsewhere": ({}, {"CUDA_HOME": "/no/cuda"}, "there is no nvcc in /no/cuda/bin (CUDA_HOME)"),
}  # fmt: skip


@pytest.mark.parametrize(("compiler", "environment", "expected"), FAILURES.values(), ids=FAILURES)
def test_the_reason_is_left(nvcc, build, monkeypatch, tmp_path, compiler, environment, expected):
    nvcc()
    assert build()[0] is None
    nvcc(**compiler)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    reason, library, note, _ = build()
    assert expected in reason and note == reason + "\n"
    assert library is None  # that of an earlier build does not belong to these sources
    if "PEMT_FAST_CUDA" not in environment:
        monkeypatch.setenv("PEMT_FAST_CUDA", "1")
        with pytest.raises(build_cuda.NotBuilt) as raised:
            build()
        assert str(raised.value) == reason


def test_the_reason_goes_when_the_library_comes(nvcc, build, monkeypatch):
    nvcc(known="compute_50")
    assert build()[2]
    nvcc()
    reason, library, note, _ = build()
    assert reason is None and library and note is None


def test_without_nvcc_anywhere(build, monkeypatch, nvcc):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build_cuda.shutil, "which", lambda *_, **__: None)
    reason, library, note, _ = build()
    assert reason == "nvcc was not found when the package was built"
    assert library is None and note == reason + "\n"


def test_nvcc_that_cannot_be_run(nvcc, build):
    nvcc().write_text("not a program")
    assert "--version fails: " in build()[0]


def test_the_sources_decide_what_is_compiled_again(nvcc, build, monkeypatch, tmp_path):
    nvcc()
    build()
    copied = tmp_path / "sources"
    copied.mkdir()
    for path in build_cuda.SOURCES.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build_cuda, "SOURCES", copied)
    assert build()[3] == 1
    (copied / "device.cuh").write_text("// changed\n")
    assert build()[3] == 2


def test_the_build_script_finds_it():
    assert "build_cuda" not in sys.modules  # no installed module has this name
    assert "import build_cuda" in (ROOT / "setup.py").read_text()
