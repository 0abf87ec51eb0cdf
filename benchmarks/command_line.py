# SPDX-License-Identifier: Apache-2.0
"""What the command lines of all suites share: options, the console, how a run ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, Result
from rich.console import Console

console = Console()
MOST_REFUSALS = 30  # printed in full


def say(text: str, style: str | None = None) -> None:
    """A line as it is."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def new_parser(
    description: str, *, quick: str, rounds: str = "7 or more"
) -> argparse.ArgumentParser:
    """The options that every suite has; `quick` and `rounds` say what these mean in this one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--rounds", type=int, help=f"per cell; {rounds} if not given")
    parser.add_argument("--threads", type=int, help="of the CPU; all cores if not given")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for the results")
    commit = "what this is a copy of, where git does not tell"
    parser.add_argument("--commit", metavar="HASH", help=commit)
    return parser


def check_options(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *numbers: str,
    needs_device: bool = True,
) -> None:
    """Ends with a message if a number, also one of the named, or the device cannot be."""
    for name in ("rounds", "threads", *numbers):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.device == "cuda" and needs_device and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")


def chosen(
    parser: argparse.ArgumentParser, only: str, cases: Sequence[Any], *others: str
) -> list[Any]:
    """The cases with `only` in their name; ends with a message if also none of `others` has it."""
    found = [case for case in cases if only in case.name]
    names = (*others, *(case.name for case in cases))
    if not any(only in name for name in names):
        parser.error(f"--only {only!r} is in none of: {', '.join(names)}")
    return found


def conclude(result: Result, path: Path) -> int:
    """Say where the result is and who was refused; the exit status, 1 if somebody was."""
    say(f"written: {path}")
    refused = [row for row in result.rows if row.error]
    for row in refused[:MOST_REFUSALS]:
        say(f"{', '.join(row.cell)}: {row.provider} was refused: {row.error}", style="red")
    if refused[MOST_REFUSALS:]:
        say(f"and {len(refused) - MOST_REFUSALS} more", style="red")
    return 1 if refused else 0
