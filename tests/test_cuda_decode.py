"""The decode kernel without a GPU: its plans, its sums on emulated threads, its machine code.

The kernel's source is compiled for the host, where every thread takes its turn
(`helpers/cuda/emulated_device.h`), and for GPUs, where nvcc is.
"""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import triton
from cuda_sources import compiled, needs_compiler, needs_nvcc

from pemt_fast.ops import cuda_library

SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def run(program, *arguments):
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


# --- what the kernel computes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return compiled(tmp_path_factory, "decode_emulation.cpp", "decode_emulation", *SANITIZED)


def compute(emulation, *, sizes, gates=1, grid=(1, 1), activation="gelu", dtype="bf16",
            flags="br", seed=0, shared=232448, target=0):  # fmt: skip
    """Worst error in units of its bound, from tokens, D, H, units, adapters."""
    error, bits, ticket = run(
        emulation, *sizes, gates, *grid, ACTIVATIONS[activation], dtype, flags, seed, shared,
        target,
    )  # fmt: skip
    # With the slices in another order too.
    assert (bits, ticket) == ("same", "reset")
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
    for flags in ("br", "brx"):
        assert compute(emulation, sizes=sizes, grid=grid, dtype=dtype, flags=flags) < 1


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_every_number_of_tokens(emulation, tokens, dtype):
    sizes = (tokens, 48, 40, 48, 3)
    assert compute(emulation, sizes=sizes, gates=tokens, grid=(2, 2), dtype=dtype) < 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("flags", ["-", "b", "r", "bn", "bt", "bg", "bx", "bns"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_biases_and_base(emulation, activation, flags, dtype):
    case = {"activation": activation, "flags": flags, "dtype": dtype, "grid": (2, 2)}
    assert compute(emulation, sizes=(6, 40, 48, 64, 3), gates=3, **case) < 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("gates", [1, 2, 6], ids=lambda g: f"{g}tokens")
@pytest.mark.parametrize("grid", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("which", ["", "u", "i", "d", "e", "f", "ux", "ix"])
def test_a_zero_gate_keeps_out_what_is_not_finite(emulation, which, grid, gates, dtype):
    case = {"gates": gates, "grid": grid, "flags": "br0" + which, "dtype": dtype}
    assert compute(emulation, sizes=(6, 40, 48, 64, 3), **case) < 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("target", [1, 16, 40])
def test_a_target_adapter_follows(emulation, target, grid, dtype):
    for flags in ("br", "nx"):
        case = {"target": target, "grid": grid, "dtype": dtype, "flags": flags}
        assert compute(emulation, sizes=(5, 40, 72, 64, 3), gates=5, **case) < 1


@needs_compiler
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2)], ids=str)
def test_columns_in_several_passes(emulation, grid, dtype):
    """Little shared memory: the sums of 64 or 128 columns at a time, and of two warps."""
    for shared in (8000, 12000):
        flags = "brx" if shared == 8000 else "br"
        case = {"grid": grid, "dtype": dtype, "shared": shared, "flags": flags}
        assert compute(emulation, sizes=(9, 40, 520, 32, 2), **case) < 1


# --- plans ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return compiled(tmp_path_factory, "decode_plans.cpp", "decode_plans", *SANITIZED)


H200, A100, RTX = (132, 232448, 8), (108, 166912, 1), (48, 101376, 1)


def plans(planner, device, cases, may_slice=True):
    """Of each case the plans of the mixture and of the target adapter."""
    lines = "\n".join(" ".join(map(str, case)) for case in cases)
    done = subprocess.run(
        [planner, *map(str, device), str(int(may_slice))],
        input=lines, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for case, answer in zip(cases, done.stdout.splitlines(), strict=True):
        words = answer.split()
        pairs = list(zip(words[::2], map(int, words[1::2]), strict=True))
        half = len(pairs) // 2
        yield case, dict(pairs[:half]), dict(pairs[half:])


@needs_compiler
@pytest.mark.parametrize("may_slice", [True, False], ids=["slices", "one-slice"])
@pytest.mark.parametrize("device", [H200, A100, RTX], ids=["H200", "A100", "RTX"])
def test_a_plan_covers_every_unit_and_column_once(planner, device, may_slice):
    cases = list(itertools.product(
        (1, 4, 16, 64), (512, 768, 1024, 4096), (64, 768, 3072, 8), (1, 64, 96, 384, 1024),
        (0, 64, 128), (2, 4),
    ))  # fmt: skip
    for case, plan, target in plans(planner, device, cases, may_slice):
        tokens, _, h, units, target_units, size = case
        cluster, slices = plan["cluster"], plan["slices"]
        if cluster == 0:  # a single block for all units has not enough shared memory
            assert not may_slice and tokens * units * (size + 4) > device[1] / 2, case
            continue
        case = (case, plan, target)
        assert 1 <= cluster <= device[2] and cluster * slices <= device[0], case
        assert may_slice or slices == 1, case
        # Every unit in one slice, no slice empty; every column in one block, none empty.
        assert plan["units"] * slices >= units > plan["units"] * (slices - 1), case
        assert plan["columns"] * cluster >= h > plan["columns"] * (cluster - 1), case
        assert plan["workspace"] == (slices * tokens * h * 4 if slices > 1 else 0), case
        if target_units:
            assert (target["cluster"], target["slices"]) == (cluster, 1), case
            assert target["units"] >= target_units and target["columns"] == plan["columns"], case
        for each in (plan, target) if target_units else (plan,):
            assert each["shared"] <= device[1], case
            assert each["units"] % (16 * cluster) == 0 and each["columns"] % 8 == 0, case
            assert each["pass"] == each["columns"] or each["pass"] % 64 == 0, case
            assert each["tokens"] >= tokens and each["tokens"] in (8, 16, 32, 64), case


@needs_compiler
def test_a_plan_that_fits_nowhere_has_no_blocks(planner):
    ((_, plan, _),) = plans(planner, RTX, [(64, 768, 768, 4096, 0, 2)], may_slice=False)
    assert plan["cluster"] == 0


# --- machine code --------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.skipif(
    "PEMT_FAST_CUDA=0" in (cuda_library.missing_reason() or ""), reason="left out on purpose"
)
class TestMachineCode:
    """Of the library that `make build` has compiled: nvcc is here, so it must be there."""

    @pytest.fixture
    def listing(self):
        def show(what, architecture):
            assert cuda_library.missing_reason() is None, cuda_library.missing_reason()
            # Of Triton's wheel: not every installation of nvcc has one.
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            done = subprocess.run(
                [tool, what, "-arch", f"sm_{architecture}", cuda_library.FILE],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            kernels = re.split(r"Function\s*:?\s*(?=_Z)", done.stdout)[1:]
            assert len(kernels) == 20  # 4 numbers of tokens: float32, two dtypes aligned and not
            return kernels

        return show

    @pytest.mark.parametrize("architecture", ["80", "90a", "100"], ids="sm_{}".format)
    def test_no_instance_spills(self, listing, architecture):
        for kernel in listing("-res-usage", architecture):
            usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", kernel))
            assert (usage["STACK"], usage["LOCAL"]) == ("0", "0"), kernel

    @pytest.mark.parametrize("architecture", ["80", "90a", "100"], ids="sm_{}".format)
    def test_products_of_16_bits_are_those_of_the_tensor_cores(self, listing, architecture):
        for kernel in listing("-sass", architecture):
            name = kernel.split("\n", 1)[0]
            assert ("HMMA.16816.F32" in kernel) == ("decodeIf" not in name), name
            assert ("UCGABAR_ARV" in kernel) == (architecture != "80"), name

    def test_the_library_needs_neither_torch_nor_its_cuda(self):
        """So that a torch for another CUDA, or for none, does not matter."""
        content = cuda_library.FILE.read_bytes()
        for name in (b"libcudart.so", b"libtorch", b"libc10"):
            assert name not in content
