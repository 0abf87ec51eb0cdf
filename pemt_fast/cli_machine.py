# SPDX-License-Identifier: Apache-2.0
"""The commands about the machine: `pemt-fast info | doctor | tune`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from pemt_fast.console import console, print_table

if TYPE_CHECKING:
    import torch


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (info, doctor, tune):
        app.command()(command)


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine readable.")] = False,
) -> None:
    """What runs here: versions, devices, and why an implementation is unavailable."""
    values = _facts()
    if as_json:
        print(json.dumps(values, indent=2))
        return
    print_table("environment", ("", ""), list(values["environment"].items()))
    extension = values["extension"]
    if extension["built"]:
        isas = [
            ("in use", extension["instruction_set"]),
            ("possible here", ", ".join(extension["instruction_sets"])),
        ]
        print_table(f"extension {extension['name']}", ("instruction set", ""), isas)
    else:
        console.print(extension["why_not"], markup=False, highlight=False, soft_wrap=True)
    library = values["cuda_library"]
    if library["why_not"] is None:
        built = [("compiled by", f"CUDA {library['toolkit']}"), ("for", library["architectures"])]
        print_table("library of CUDA kernels", ("", ""), built)
    else:
        console.print(library["why_not"], markup=False, highlight=False, soft_wrap=True)
    for device, impls in values["unavailable"].items():
        taken = values["auto"][device]
        rows = [
            (
                impl,
                "no" if why else "yes",
                ", ".join(dtype for dtype, auto in taken.items() if auto == impl),
                "; ".join(why),
            )
            for impl, why in impls.items()
        ]
        print_table(f"implementations on {device}", ("impl", "runs", "auto in", "why not"), rows)
    variables = [
        (name, "not set" if found["value"] is None else found["value"], found["meaning"])
        for name, found in values["variables"].items()
    ]
    print_table("environment variables", ("name", "value", "what it does"), variables)


def _facts() -> dict:
    import torch

    from pemt_fast import variables
    from pemt_fast.kernels import cache
    from pemt_fast.ops import cuda_library, extension
    from pemt_fast.ops.dispatch import IMPLS, auto_impl, unavailable_reasons
    from pemt_fast.training.fit import environment

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    named = [impl for impl in IMPLS if impl != "auto"]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    module = extension.load()
    return {
        "environment": environment(),
        "extension": {
            "name": extension.NAME,
            "built": module is not None,
            "why_not": extension.missing_reason(),
            "instruction_set": module.cpu_isa() if module else None,
            "instruction_sets": module.cpu_isas() if module else [],
        },
        "cuda_library": cuda_library.facts(),
        "auto": {
            device: {str(dtype)[6:]: auto_impl(torch.device(device), dtype) for dtype in dtypes}
            for device in devices
        },
        "unavailable": {
            device: {impl: unavailable_reasons(impl, torch.device(device)) for impl in named}
            for device in devices
        },
        "cache": str(cache.folder()),
        "variables": {
            name: {"value": value, "meaning": meaning}
            for name, (value, meaning) in variables.settings().items()
        },
    }


def doctor(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0; all if not given.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Machine readable.")] = False,
) -> None:
    """Compare the kernels with the float64 reference here; auto takes what passes on a GPU."""
    import torch

    from pemt_fast.doctor import Finding
    from pemt_fast.doctor import doctor as examine
    from pemt_fast.kernels import cache

    def report(finding: Finding) -> None:
        if not as_json:
            verdict = "passed" if finding.passed else f"FAILED: {finding.reason}"
            console.print(
                f"{finding.device} {finding.impl} {finding.dtype}: {verdict}, "
                f"{finding.worst:.0%} of the error budget, {finding.seconds:.0f} s",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip

    findings = examine([_device(device)] if device else None, report)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    elif any(finding.impl in ("triton", "cuda") for finding in findings):
        console.print(f"remembered in {cache.folder()}", highlight=False, soft_wrap=True)
    elif not torch.cuda.is_available():
        console.print("torch sees no GPU: the kernels for GPUs were not examined", highlight=False)
    if not findings:
        raise RuntimeError(f"no kernels can run on {device or 'this machine'}: see pemt-fast info")
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


def tune(
    device: Annotated[str, typer.Option(help="cuda or cuda:0.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Comma separated; 16 bits are one kind.")] = "bfloat16",
) -> None:
    """Time every choice of blocks of the Triton kernels on a GPU, and keep the fastest ones."""
    import torch

    from pemt_fast.tuning import Timing
    from pemt_fast.tuning import tune as run

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    names = [name.strip() for name in dtype.split(",")]
    if wrong := sorted(set(names) - set(known)):
        raise ValueError(f"--dtype must be among {', '.join(known)}, got {', '.join(wrong)}")

    def report(timing: Timing) -> None:
        console.print(
            f"{timing.dtype} {timing.way} N {timing.N} T {timing.T}: {timing.best_us:.1f} µs, "
            f"shipped {timing.shipped_us:.1f}; {timing.tried} tried, {timing.failed} did not run; "
            f"{timing.best}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip

    path = run(_device(device), [known[name] for name in names], report=report)
    console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:0, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"--device {name}: torch sees no CUDA device")
        return torch.device("cuda", device.index or 0)
    return device
