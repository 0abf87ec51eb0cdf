"""The decode kernel without a GPU: its plans, its sums on emulated threads, its machine code.

The kernel's source is compiled for the host, where every thread takes its turn
(`helpers/cuda/emulated_device.h`), and for GPUs, where nvcc is.
"""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
HELPERS = ROOT / "tests" / "helpers" / "cuda"
COMPILER = shutil.which("c++")
NVCC = shutil.which("nvcc")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "silu": 3}

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed here")


def build(folder, source, *flags):
    program = folder / Path(source).stem
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-g", *flags, "-o", program, HELPERS / source,
         SOURCES / "decode_plan.cpp"], check=True,
    )  # fmt: skip
    return program


def run(program, *arguments):
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# --- what the kernel computes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulation"), "decode_emulation.cpp", *SANITIZED)


def compute(emulation, *, sizes, gates=1, grid=(1, 1), activation="gelu", dtype="bf16",
            flags="br", seed=0, shared=232448):  # fmt: skip
    """Worst error in units of its bound, from tokens, D, H, units, adapters."""
    error, bits, tickets = run(
        emulation, *sizes, gates, *grid, ACTIVATIONS[activation], dtype, flags, seed, shared
    )
    # With the slices in another order too.
    assert (bits, tickets) == ("same", "reset")
    return float(error)


GRIDS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 5), (2, 2)]
SIZES = [
    (1, 64, 64, 32, 2),
    (3, 72, 200, 80, 3),  # several tiles of columns
    (8, 33, 29, 50, 3),  # nothing divides, loads are not aligned
    (5, 8, 8, 1, 1),
    (13, 40, 72, 100, 7),
]


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"cluster{g[0]}-slices{g[1]}")
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_every_form_of_the_grid(emulation, sizes, grid, dtype):
    assert compute(emulation, sizes=sizes, grid=grid, dtype=dtype) < 1


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_number_of_tokens(emulation, tokens, dtype):
    sizes = (tokens, 48, 40, 48, 3)
    assert compute(emulation, sizes=sizes, gates=tokens, grid=(2, 2), dtype=dtype) < 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("flags", ["-", "b", "r"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_biases_and_base(emulation, activation, flags, dtype):
    case = {"activation": activation, "flags": flags, "dtype": dtype, "grid": (2, 2)}
    assert compute(emulation, sizes=(6, 40, 48, 64, 3), gates=3, **case) < 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("gates", [1, 2, 6], ids=lambda g: f"{g}tokens")
@pytest.mark.parametrize("grid", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("flags", ["br0" + which for which in ("", "u", "i", "d", "e", "f")])
def test_a_zero_gate_keeps_out_what_is_not_finite(emulation, flags, grid, gates, dtype):
    case = {"gates": gates, "grid": grid, "flags": flags, "dtype": dtype}
    assert compute(emulation, sizes=(6, 40, 48, 64, 3), **case) < 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2)], ids=str)
def test_columns_in_several_passes(emulation, grid, dtype):
    """Little shared memory: the sums of 64 or 128 columns at a time, and of two warps."""
    for shared in (8000, 12000):
        case = {"grid": grid, "dtype": dtype, "shared": shared}
        assert compute(emulation, sizes=(9, 40, 520, 32, 2), **case) < 1


# --- plans ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plan"), "decode_plans.cpp", *SANITIZED)


H200, A100, RTX = (132, 232448, 8), (108, 166912, 1), (48, 101376, 1)


@needs_compiler
@pytest.mark.parametrize("device", [H200, A100, RTX], ids=["H200", "A100", "RTX"])
def test_a_plan_covers_every_unit_and_column_once(planner, device):
    cases = list(itertools.product(
        (1, 4, 16, 64), (512, 768, 1024, 4096), (64, 768, 3072, 8), (1, 64, 96, 384, 1024, 4096),
        (2, 4),
    ))  # fmt: skip
    lines = "\n".join(" ".join(map(str, case)) for case in cases)
    done = subprocess.run(
        [planner, *map(str, device)], input=lines, capture_output=True, text=True, check=True
    )
    answers = done.stdout.splitlines()
    for (tokens, _, h, units, _), answer in zip(cases, answers, strict=True):
        words = answer.split()
        plan = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        cluster, slices = plan["cluster"], plan["slices"]
        case = (tokens, h, units, answer)
        assert 1 <= cluster <= device[2] and cluster * slices <= device[0], case
        assert plan["shared"] <= device[1], case
        # Every unit in one slice, no slice empty; every column in one block, none empty.
        assert plan["units"] % (16 * cluster) == 0 and plan["columns"] % 8 == 0, case
        assert plan["pass"] == plan["columns"] or plan["pass"] % 64 == 0, case
        assert plan["units"] * slices >= units > plan["units"] * (slices - 1), case
        assert plan["columns"] * cluster >= h > plan["columns"] * (cluster - 1), case
        assert plan["tokens"] >= tokens and plan["tokens"] in (8, 16, 32, 64), case
        needs = slices * tokens * h * 4 if slices > 1 else 0
        assert plan["workspace"] == needs and plan["tickets"] == (cluster if needs else 0), case


# --- machine code --------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a", "100"], ids="sm_{}".format)
def test_no_instance_spills_and_16_bits_are_products_of_the_tensor_cores(architecture, tmp_path):
    cubin = tmp_path / "decode.cubin"
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Werror",
         "all-warnings", "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
         "-cubin", "-o", cubin, SOURCES / "decode.cu"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == 20  # 4 numbers of tokens: float32, two dtypes aligned and not
    assert set(spills) == {("0", "0")}
    # Of Triton's wheel: not every installation of nvcc has one.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True)
    kernels = listing.stdout.split("Function : ")[1:]
    assert len(kernels) == 20
    for kernel in kernels:
        name = kernel.split("\n", 1)[0]
        assert ("HMMA.16816.F32" in kernel) == ("decodeIf" not in name), name
        assert ("UCGABAR_ARV" in kernel) == (architecture != "80"), name
