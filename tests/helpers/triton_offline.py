"""Triton without a GPU: what a call launches, and what the compiler makes of each kernel.

`recorded` runs the launching code on tensors of the meta device and keeps every launch instead of
making it, so that exactly what ships is compiled. As a program this file compiles every launch
of `SHIPPED` for one GPU and prints a JSON list; it must run without TRITON_INTERPRET.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pemt_fast.kernels import adapter_mixture, configs, plans, weight_gradients
from pemt_fast.kernels.adapter_mixture import run
from pemt_fast.kernels.sparsity_loss import sparsity_loss_rows
from pemt_fast.kernels.walk import Walk

WIDTH, RANK = 768, 64
MOST_UNITS, MOST_TOKENS = 1024, 65536

# Kind in the table, compute capability, shared memory of one program, what runs large products.
GPUS = [
    ("hopper", 90, 227 << 10, "wgmma"),
    ("hopper", 100, 227 << 10, "tcgen05.mma"),
    ("ampere", 80, 163 << 10, "mma.sync"),
    ("other", 86, 64 << 10, "mma.sync"),
]
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it would have been given, by name."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside of the block go into the list."""
    launches: list[Launch] = []

    def keep(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any):
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        assert set(arguments) == set(self.arg_names), self.arg_names
        launches.append(Launch(self, grid, arguments, options))

    original = JITFunction.run
    JITFunction.run = keep
    try:
        yield launches
    finally:
        JITFunction.run = original


def source_of(launch: Launch) -> ASTSource:
    """The kernel specialised as the just-in-time compiler would do for aligned tensors."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or special:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype] if tensor else "i32"
        if tensor or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(launch: Launch, capability: int) -> dict[str, Any]:
    """Registers, spills, bytes of shared memory, and the tensor core instructions used."""
    compiled = triton.compile(
        source_of(launch), target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    ptx = compiled.asm["ptx"]
    kinds = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx]
    return describe(launch) | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\bSTL\b", sass)),  # stores to local memory
        "shared": compiled.metadata.shared,
        "tensor_cores": kinds,
    }


def describe(launch: Launch) -> dict[str, Any]:
    """What tells launches of the table apart."""
    tile = {name: launch.arguments.get(name) for name in ("BM", "BN", "BK", "BH", "BW", "BT")}
    constants = {name: launch.arguments.get(name) for name in ("N", "BACKWARD", "PRECISION")}
    equal = launch.arguments.get("PER_ADAPTER", launch.arguments.get("RANK"))
    unequal = {"ranks": "unequal"} if equal == 0 else {}
    return {
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        **unequal,
        **{name: value for name, value in (constants | tile).items() if value is not None},
        "dtype": str(launch.arguments[launch.kernel.arg_names[0]].dtype).removeprefix("torch."),
        "warps": launch.options.get("num_warps", 4),
    }


def walk_of(row: configs.Row, element: int, backward: bool, *, unequal: bool = False) -> Walk:
    """The most demanding call that takes this row: everything trains, with all biases and base.

    `unequal`: an adapter of 8 units, and one of all others.
    """
    N, T = min(row.units, MOST_UNITS), min(row.tokens, MOST_TOKENS)
    dtype = {2: torch.bfloat16, 4: torch.float32}[element]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, first, units = tensor(T, WIDTH), tensor(N, WIDTH), [tensor(T, N) for _ in range(3)]
    ranks = (8, N - 8) if unequal else (RANK,) * (N // RANK)
    walk = Walk(
        x=x, gate=tensor(8, len(ranks), dtype=torch.float32), first=first, second=first,
        ranks=ranks, activation="relu", backward=backward, out=x,
        b_up=tensor(len(ranks), WIDTH), saved=units[0],
    )  # fmt: skip
    if backward:
        return walk._replace(d_z=units[1], gated=units[2], needs_gate=True)
    return walk._replace(base=x, b_down=tensor(N))


def run_loss_rows() -> None:
    """The Task Sparsity Loss of frozen sources, and the most demanding one, of unequal ranks."""
    for dtype, ranks, everything in (
        (torch.bfloat16, (RANK,) * 6, False),
        (torch.float32, (8, 200, 48), True),
    ):
        T, N, E = 1024, sum(ranks), len(ranks)

        def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        z, units, sums = tensor(T, WIDTH), tensor(T, N), tensor(T, E, dtype=torch.float32)
        extras = (units, sums, sums, tensor(T, dtype=torch.bool)) if everything else (None,) * 4
        share = tensor(E, dtype=torch.float32)
        wanted = (everything, True, everything, True, True)
        sparsity_loss_rows(z, units, units, units, *extras, share, ranks, 1024.0, *wanted)


def shipped(kind: str) -> list[Launch]:
    """Every launch that a row of the table makes on this kind of GPU, once."""
    found: dict[str, Launch] = {}
    facts = [
        unittest.mock.patch.object(module, "device_facts", lambda device: (kind, 132))
        for module in (adapter_mixture, plans, weight_gradients)
    ]
    adapter_mixture.PLANS.clear()
    with recorded() as launches, contextlib.ExitStack() as patches:
        for patch in facts:
            patches.enter_context(patch)
        for (row_kind, element, backward), rows in configs.TABLE.items():
            for row in rows if row_kind == kind else ():
                walk = walk_of(row, element, backward)
                precisions = ("ieee", "tf32") if element == 4 else ("ieee",)
                for precision in precisions:
                    torch.backends.cuda.matmul.fp32_precision = precision
                    run(walk)
                if element == 2 and row.tokens == configs.ANY:
                    run(walk_of(row, element, backward, unequal=True))
        units = torch.empty(2, 8192, 128, dtype=torch.bfloat16, device="meta")
        rows = torch.empty(8192, WIDTH, dtype=torch.bfloat16, device="meta")
        weight_gradients.weight_gradients(units[0], rows, units[1], rows)
        run_loss_rows()
    for launch in launches:
        if launch.kernel.__name__ != "gate_gradient_kernel":
            found.setdefault(str(sorted(describe(launch).items())), launch)
    return list(found.values())


def table(kind: str, capability: int) -> str:
    """The resources of all launches of one kind of GPU, as Markdown."""
    columns = ("dtype", "direction", "kernel", "tile", "warps", "registers", "spills", "shared KiB",
               "programs per SM", "tensor cores")  # fmt: skip
    lines = [f"## sm_{capability} (`{kind}`)", "", f"| {' | '.join(columns)} |", "|---" * 10 + "|"]
    for launch in shipped(kind):
        found = resources(launch, capability)
        tile = "×".join(str(found[n]) for n in ("BM", "BN", "BK", "BH", "BW", "BT") if n in found)
        threads, shared = 32 * found["warps"], found["shared"]
        # 64 K registers, 2048 threads; a program takes 1 KiB more than it asks for.
        most = (228 if capability >= 90 else 164 if capability == 80 else 100) << 10
        fitting = min(65536 // (found["registers"] * threads), 2048 // threads,
                      most // (shared + 1024))  # fmt: skip
        ways = {True: "backward", False: "forward", None: "weights"}
        direction = ways[found.get("BACKWARD")]
        direction = "both" if found["kernel"] == "sparsity_loss" else direction
        precision = found.get("PRECISION", "") if found["dtype"] == "float32" else ""
        ranks = ", unequal ranks" if "ranks" in found else ""
        cells = (f"{found['dtype']} {precision}".strip(), direction,
                 f"{found['kernel']}, N {found['N']}{ranks}", tile,
                 found["warps"], found["registers"], found["spills"], shared >> 10, fitting,
                 ", ".join(found["tensor_cores"]) or "–")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


INTRODUCTION = f"""# What the compiler makes of the Triton kernels

Generated by `make triton-resources` with Triton {triton.__version__}, without a GPU: every launch
of `kernels/configs.py`, with everything trained and all biases, widths {WIDTH}, rank {RANK}. Facts
of the compiler, no times; nothing here has run. Tiles are BM×BN×BK×BH as in the kernels. Programs
per SM is what registers, threads and shared memory allow.
"""


def main() -> None:
    """Compile all launches of one kind of GPU; print what became of them, or write the page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=["hopper", "ampere", "other"], nargs="?")
    parser.add_argument("capability", type=int, nargs="?")
    parser.add_argument("--page", type=Path, help="write all GPUs of the table to this file")
    parser.add_argument("--every", type=int, default=1, help="compile every so many-th launch")
    options = parser.parse_args()
    if options.page:
        tables = [table(kind, capability) for kind, capability, *_ in GPUS]
        options.page.write_text("\n\n".join([INTRODUCTION.strip(), *tables]) + "\n")
        return
    launches = shipped(options.kind)[:: options.every]
    results = [resources(launch, options.capability) for launch in launches]
    json.dump({"triton": triton.__version__, "kernels": results}, sys.stdout)


if __name__ == "__main__":
    main()
