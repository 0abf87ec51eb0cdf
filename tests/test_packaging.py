"""The shape of the package: who may import whom, what an import costs, what a wheel contains."""

import ast
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_nvcc import fake_cuda

ROOT = Path(__file__).parents[1]
PACKAGE = "pemt_fast"

# What each part may import; it may also import whatever those parts may.
ARROWS = {
    "cli": {
        "training",
        "cli_convert",
        "cli_data",
        "cli_machine",
        "cli_multi_task",
        "cli_protocol",
    },
    "cli_convert": {"console", "interop"},
    "cli_data": {"console", "data", "training"},
    "cli_multi_task": {"cli_data", "console", "training"},
    "cli_protocol": {"cli_data", "console", "training"},
    "cli_machine": {"console", "doctor", "tuning", "training", "variables"},
    "doctor": {"testing"},
    "tuning": {"ops"},
    "console": set(),
    "training": {"attach", "interop", "data", "testing", "timing", "version"},
    "interop": {"methods", "attach"},
    "fusing": {"nn"},
    "integrations": {"attach"},
    "methods": {"data", "model", "peml_model"},
    "attach": {"attached"},
    "model": {"attached", "inputs"},
    "peml_model": {"linear_model"},
    "linear_model": {"attached", "inputs"},
    "attached": {"t5", "checkpoint"},
    "inputs": {"nn"},
    "data": set(),
    "checkpoint": {"safe_files", "sharding"},
    "t5": {"nn"},
    "nn": {"ops", "sharding"},
    "testing": {"ops"},
    "safe_files": set(),
    "sharding": set(),
    "timing": set(),
    "variables": set(),
    "version": set(),
    "ops": {"kernels"},
    "kernels": set(),
}
# Ways to compute the same thing: each can be read, replaced or missing without the others.
BACKENDS = [
    "pemt_fast.ops.reference",
    "pemt_fast.ops.stacked",
    "pemt_fast.ops.native",
    "pemt_fast.kernels",
    # Only pemt_fast/ops/extension.py loads it, by name; no import statement may.
    "pemt_fast._C",
]

# Loaded neither by `import pemt_fast` nor by using the operator: slow to import, or optional.
HEAVY = {
    "transformers",
    "peft",
    "triton",
    "datasets",
    "sklearn",
    "matplotlib",
    "optuna",
    "typer",
    "rich",
}
MEASURE_IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import pemt_fast
time_ms = 1000 * (time.perf_counter() - start)
pemt_fast.adapter_mixture
loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
with open(sys.argv[1], "w") as file:
    json.dump({"time_ms": time_ms, "loaded": loaded, "file": pemt_fast.__file__}, file)
"""


# --- imports inside the package ------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package; kernels are found behind their link."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder == ROOT / PACKAGE and parts[0] == "kernels":
                continue
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a syntax tree without the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for branch in child.orelse:
                yield branch
                yield from runtime_nodes(branch)
            continue
        yield child
        yield from runtime_nodes(child)


def imports(source: str, module: str, *, is_package: bool, known: set[str]) -> set[str]:
    """Names of everything that a module imports, at any depth; ours down to the module."""
    found = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *filter(None, [base])])
            for alias in node.names:
                child = f"{base}.{alias.name}"
                found.add(child if child in known or base == PACKAGE else base)
    return found


def imported_by_module() -> dict[str, set[str]]:
    found = modules()
    known = set(found) | {f"{PACKAGE}.kernels"}
    assert PACKAGE in known, "pemt_fast/__init__.py is missing"
    return {
        name: imports(
            path.read_text(encoding="utf-8"),
            name,
            is_package=path.name == "__init__.py",
            known=known,
        )
        for name, path in found.items()
    }


def reachable(part: str) -> set[str]:
    return {part}.union(*(reachable(below) for below in ARROWS[part]))


def forbidden_arrows(imported: dict[str, set[str]]) -> list[str]:
    found = []
    for module, targets in sorted(imported.items()):
        part = module.split(".")[1] if "." in module else None
        for target in sorted(t for t in targets if t.split(".")[0] == PACKAGE):
            if part is None or target == f"{PACKAGE}.__version__":
                continue
            if part not in ARROWS or target.partition(".")[2].split(".")[0] not in reachable(part):
                found.append(f"{module} -> {target}")
    return found


def test_imports_follow_the_arrows():
    imported = imported_by_module()
    unplaced = {name.split(".")[1] for name in imported if "." in name} - set(ARROWS)
    assert not unplaced, f"give these a place in ARROWS and in CONTRIBUTING.md: {unplaced}"
    assert forbidden_arrows(imported) == []


def test_backends_do_not_import_one_another():
    def backend(name: str) -> str | None:
        return next((b for b in BACKENDS if name == b or name.startswith(b + ".")), None)

    crossing = [
        f"{module} -> {target}"
        for module, targets in imported_by_module().items()
        for target in targets
        if backend(module) and backend(target) and backend(module) != backend(target)
    ]
    assert crossing == []


def test_kernels_import_nothing_else_of_the_package():
    imported = {
        (module, target)
        for module, targets in imported_by_module().items()
        for target in targets
        if module.startswith(f"{PACKAGE}.kernels.") and target.split(".")[0] == PACKAGE
    }
    assert {pair for pair in imported if not pair[1].startswith(f"{PACKAGE}.kernels")} == set()


@pytest.mark.parametrize(
    ("module", "source", "arrows"),
    [
        ("pemt_fast.ops.dispatch", "import pemt_fast.nn", ["pemt_fast.nn"]),
        ("pemt_fast.ops.dispatch", "from pemt_fast import nn", ["pemt_fast.nn"]),
        ("pemt_fast.ops.dispatch", "from ..nn.gates import Gate", ["pemt_fast.nn.gates"]),
        (
            "pemt_fast.ops.dispatch",
            "def f():\n from pemt_fast.model import load",
            ["pemt_fast.model"],
        ),
        ("pemt_fast.nn.gates", "from pemt_fast import get_model", ["pemt_fast.get_model"]),
        ("pemt_fast.ops.native", "from pemt_fast import _C", ["pemt_fast._C"]),
        ("pemt_fast.nn.gates", "if TYPE_CHECKING:\n import pemt_fast.model", []),
        ("pemt_fast.nn.gates", "from pemt_fast import __version__", []),
        ("pemt_fast.nn.gates", "import transformers\nfrom .prompts import Prompt", []),
        ("pemt_fast.cli", "from pemt_fast.ops.dispatch import availability", []),
    ],
)
def test_arrow_check_sees(module, source, arrows):
    found = imports(source, module, is_package=False, known={"pemt_fast.nn", "pemt_fast.nn.gates"})
    assert forbidden_arrows({module: found}) == [f"{module} -> {arrow}" for arrow in arrows]


# --- importing the package -----------------------------------------------------------------------


def test_nothing_called_kernels_resolves_to_our_folder():
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin]
    ours = (ROOT / "kernels").resolve()
    assert not [
        place for place in places if place and Path(place).resolve() in (ours, ours / "__init__.py")
    ]
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def import_runs(tmp_path_factory) -> list[dict]:
    """Five imports of the package, each in a process of its own, with what they printed."""
    folder = tmp_path_factory.mktemp("import")
    runs = []
    for _ in range(5):
        command = [sys.executable, "-c", MEASURE_IMPORT, str(folder / "run.json")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        measured = json.loads((folder / "run.json").read_text())
        runs.append(measured | {"printed": done.stdout + done.stderr})
    return runs


def test_import_finds_this_checkout(import_runs):
    assert Path(import_runs[0]["file"]) == ROOT / PACKAGE / "__init__.py"


def test_import_loads_nothing_heavy(import_runs):
    assert HEAVY & set(import_runs[0]["loaded"]) == set()


def test_import_prints_nothing(import_runs):
    assert import_runs[0]["printed"] == ""


def test_import_after_torch_is_quick(import_runs):
    times_ms = [run["time_ms"] for run in import_runs]
    assert statistics.median(times_ms) < 100, times_ms


# --- the tree ------------------------------------------------------------------------------------


def test_readme_tree_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\s*```\w*\n(.*?)```\s*<!-- /tree -->", readme, re.DOTALL)
    assert block, "README.md has no fenced block between <!-- tree --> and <!-- /tree -->"
    paths = [line.split()[0] for line in block[1].splitlines() if line.strip()]
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []


def listed_packages() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["setuptools"]["packages"]


def test_every_package_is_listed():
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / PACKAGE).rglob("__init__.py")
    }
    assert on_disk == set(listed_packages()) - {f"{PACKAGE}.kernels"}


def test_kernels_are_listed_as_soon_as_there_are_any():
    has_kernels = any((ROOT / "kernels").glob("*.py"))
    assert (f"{PACKAGE}.kernels" in listed_packages()) == has_kernels


# --- wheels --------------------------------------------------------------------------------------

COMPILER = os.environ.get("CXX", "c++").split()[0]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"there is no C++ compiler ({COMPILER})"
)

SMOKE_TEST = """
import json
import pemt_fast
from pemt_fast.testing import assert_matches_oracle, make_inputs
found = {"file": pemt_fast.__file__}
for impl in ("torch", "cpu"):
    try:
        assert_matches_oracle(lambda seed: make_inputs(2, 5, E=3, R=4, seed=seed), impl=impl)
        found[impl] = "right"
    except RuntimeError as error:
        found[impl] = str(error)
print(json.dumps(found))
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A program that must succeed; without what this session's environment says about builds."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PEMT_FAST_")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def copied_sources(folder: Path) -> Path:
    """A copy, because a build leaves folders behind that a second build would pick up."""
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=unwanted)


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of this checkout; what an earlier build left in place must not get into it."""
    source = copied_sources(folder)
    (source / PACKAGE / f"_C{SUFFIX}").write_text("of an earlier build")
    (source / PACKAGE / "_C_missing.txt").write_text("of an earlier build")
    (source / PACKAGE / "_cuda.so").write_text("of an earlier build")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
    run(*pip, "--wheel-dir", folder, source, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    home = fake_cuda(folder)
    return build_wheel(folder, PEMT_FAST_BUILD="1", CUDA_HOME=str(home))


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("plain"), PEMT_FAST_BUILD="0")


WHEELS = [
    pytest.param("compiled_wheel", {f"_C{SUFFIX}", "_cuda.so"}, marks=needs_compiler),
    ("plain_wheel", {"_C_missing.txt"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("wheel", "built"), WHEELS)
def test_wheel_holds_the_package_and_nothing_else(wheel, built, request):
    names = zipfile.ZipFile(request.getfixturevalue(wheel)).namelist()
    expected = {name.replace(".", "/") + "/" for name in listed_packages()}
    assert {name[: name.rindex("/") + 1] for name in names if name.endswith(".py")} == expected
    assert f"{PACKAGE}/ops/reference.py" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {PACKAGE}
    others = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    assert others == {f"{PACKAGE}/{name}" for name in {"py.typed", *built}}


def smoke_test(wheel: Path, folder: Path) -> dict[str, str]:
    """What the wheel does in a fresh environment, whose other packages are those of this one."""
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", wheel, cwd=folder)
    packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).stdout.strip()
    # The folder alone: .pth files in it, such as that of an editable installation, are not read.
    Path(packages, "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    found = json.loads(run(python, "-I", "-c", SMOKE_TEST, cwd=folder).stdout)
    assert Path(found.pop("file")).is_relative_to(folder)
    return found


@pytest.mark.slow
@needs_compiler
def test_wheel_with_the_extension_runs_in_a_fresh_environment(compiled_wheel, tmp_path):
    assert smoke_test(compiled_wheel, tmp_path) == {"torch": "right", "cpu": "right"}


@pytest.mark.slow
def test_wheel_without_the_extension_runs_and_says_why_there_is_none(plain_wheel, tmp_path):
    found = smoke_test(plain_wheel, tmp_path)
    assert found["torch"] == "right"
    assert "cannot run" in found["cpu"] and "PEMT_FAST_BUILD=0" in found["cpu"]


@pytest.mark.slow
def test_source_distribution_holds_the_sources_of_the_extension(tmp_path):
    source = copied_sources(tmp_path)
    setup = (sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path)
    run(*setup, cwd=source, PEMT_FAST_BUILD="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    sources = [
        p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")
    ]
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert "setup.py" in names


# --- the build script ----------------------------------------------------------------------------


@pytest.fixture
def small_source(tmp_path) -> Path:
    """The build script with an extension that compiles in no time."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "build_cuda.py", tmp_path / "csrc")
    (tmp_path / "csrc" / "module.cpp").write_text(
        "#include <Python.h>\nPyMODINIT_FUNC PyInit__C() { return nullptr; }\n"
    )
    return tmp_path


def build_in_place(source: Path, **environment: str) -> str:
    """Build the extension beside the Python files; returns what was printed."""
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    done = run(*command, cwd=source, **{"PEMT_FAST_CUDA": "0", **environment})
    return done.stdout + done.stderr


OBSTACLES = {
    "left-out": ("", "", {"PEMT_FAST_BUILD": "0"}, "left out with PEMT_FAST_BUILD=0"),
    "no-compiler": ("", "", {"CXX": "no-such-compiler"}, "no C++ compiler was found"),
    "no-torch": ("torch.py", "raise ImportError('none here')", {}, "torch could not be imported"),
    "bad-source": ("csrc/module.cpp", "#error not today", {}, "it could not be compiled"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "environment", "reason"),
    [
        pytest.param(
            *case, id=name, marks=needs_compiler if name in ("no-torch", "bad-source") else ()
        )
        for name, case in OBSTACLES.items()
    ],
)
def test_extension_that_cannot_be_built_leaves_the_reason(
    small_source, file, text, environment, reason
):
    earlier = small_source / PACKAGE / f"_C{SUFFIX}"
    earlier.write_text("of an earlier build")
    if file:
        (small_source / file).write_text(text)
    printed = build_in_place(small_source, **environment)
    assert "pemt_fast._C is not built" in printed
    assert reason in (small_source / PACKAGE / "_C_missing.txt").read_text()
    assert not earlier.exists()


@pytest.mark.slow
@needs_compiler
def test_extension_that_is_required_and_cannot_be_built_is_an_error(small_source):
    (small_source / "csrc" / "module.cpp").write_text("#error not today")
    with pytest.raises(AssertionError, match="#error not today"):
        build_in_place(small_source, PEMT_FAST_BUILD="1")


@pytest.mark.slow
@needs_compiler
def test_extension_that_is_built_removes_the_reason(small_source):
    note = small_source / PACKAGE / "_C_missing.txt"
    note.write_text("of an earlier build")
    build_in_place(small_source)
    assert (small_source / PACKAGE / f"_C{SUFFIX}").exists()
    assert not note.exists()


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("fails", [False, True])
def test_cuda_kernels_that_cannot_be_built_leave_the_extension_and_the_reason(small_source, fails):
    options = {"compile": "echo 'unsupported GNU version' >&2; exit 1"} if fails else {}
    home = fake_cuda(small_source, **options)
    printed = build_in_place(
        small_source, PEMT_FAST_BUILD="1", PEMT_FAST_CUDA="", CUDA_HOME=str(home)
    )
    package = small_source / PACKAGE
    assert (package / f"_C{SUFFIX}").exists()
    assert (package / "_cuda.so").exists() == (not fails)
    assert (package / "_cuda_missing.txt").exists() == fails
    assert ("impl='cuda' will not run: " in printed) == fails
