# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast convert`: adapters of one library written as another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pemt_fast.console import console

_From = Literal["pemt_fast", "peft", "mttl", "adapterhub", "published"]
_To = Literal["pemt_fast", "peft_lora", "peft_poly", "adapterhub"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="Directory or file to read.")],
    model: Annotated[str, typer.Option(help="Directory or hub name of the model it is for.")],
    out: Annotated[Path, typer.Option(help="Where to write; must not hold adapters yet.")],
    read_as: Annotated[_From, typer.Option("--from", help="Whose files they are.")],
    write_as: Annotated[_To, typer.Option("--to", help="Whose files to write.")] = "pemt_fast",
    causal: Annotated[bool, typer.Option(help="The model is a decoder-only one.")] = False,
    task: Annotated[str, typer.Option(help="For peft_lora: the task, name or number.")] = "",
    name: Annotated[str, typer.Option(help="For adapterhub: name of the adapter.")] = "adapter",
    published_source: Annotated[
        list[Path] | None,
        typer.Option(help="For published targets: a source, in the order of the gate; repeatable."),
    ] = None,
    extra: Annotated[
        Path | None, typer.Option(help="For published targets: gates and layer norms.")
    ] = None,
) -> None:
    """Read adapters of peft, mttl, AdapterHub, PEMT's authors or this library; write another's."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from pemt_fast.interop.convert import convert as run

    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty")
    auto = AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM
    run(
        auto.from_pretrained(model), source, out, read_as=read_as, write_as=write_as,
        task=int(task) if task.isdigit() else task or None, name=name,
        published_sources=published_source or (), extra=extra,
    )  # fmt: skip
    found = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"written to {out}: {found}", highlight=False, soft_wrap=True)
