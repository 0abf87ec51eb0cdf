"""The shape of the package: who may import whom, what an import costs, what a wheel contains."""

import ast
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "pemt_fast"

# What each part may import; it may also import whatever those parts may.
ARROWS = {
    "cli": {"training"},
    "training": {"interop", "data", "testing", "timing", "version"},
    "interop": {"methods"},
    "methods": {"data", "model"},
    "model": {"t5", "checkpoint"},
    "data": set(),
    "checkpoint": set(),
    "t5": {"nn"},
    "nn": {"ops"},
    "testing": {"ops"},
    "timing": set(),
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
]

# Loaded neither by `import pemt_fast` nor by using the operator: slow to import, or optional.
HEAVY = {"transformers", "triton", "datasets", "sklearn", "matplotlib", "typer", "rich"}
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


# --- the tree and the wheel ----------------------------------------------------------------------


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


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    # A copy, because a build leaves folders behind that a second build would pick up.
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--wheel-dir", tmp_path, source], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {name.replace(".", "/") + "/" for name in listed_packages()}
    assert {name[: name.rindex("/") + 1] for name in names if name.endswith(".py")} == expected
    assert f"{PACKAGE}/ops/reference.py" in names
    assert f"{PACKAGE}/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {PACKAGE}
