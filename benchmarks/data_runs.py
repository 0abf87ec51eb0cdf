# SPDX-License-Identifier: Apache-2.0
"""What the runs on real data share: options, the commands they run, words on the backbone.

Used by `real_run.py` and `multi_task_run.py`, which write pages of `docs/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def new_parser(description: str, *, work: str, page: str) -> argparse.ArgumentParser:
    """The options that both have, with the defaults of one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSONL data sets")
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--page", type=Path, default=Path(page))
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; the folder to work in is there then."""
    options = parser.parse_args()
    if not (options.data / "corpus").is_dir():
        parser.error(f"--data: {options.data} has no folder corpus with text files")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def run(arguments: list[str]) -> float:
    """Run `pemt-fast …` from this environment; returns seconds."""
    program = Path(sys.executable).with_name("pemt-fast")
    started = time.perf_counter()
    subprocess.run([str(program), *arguments], check=True)
    return time.perf_counter() - started


def remembered(path: Path, arguments: list[str]) -> float:
    """Run unless `path` says that it was done; the seconds of the run that did the work."""
    if path.is_file():
        return json.loads(path.read_text())["seconds"]
    seconds = run(arguments)
    path.write_text(json.dumps({"seconds": seconds}))
    return seconds


def backbone(work: Path) -> tuple[str, float]:
    """The T5 in `work` in words, up to the text it was pretrained on, and its held-out loss."""
    pretrained = json.loads((work / "t5" / "pretrain.json").read_text())
    config = pretrained["config"]
    shape = ", ".join(
        f"{k} {config[k]}" for k in ("d_model", "d_ff", "num_heads", "layers", "decoder_layers")
    )
    words = f"""The backbone: T5 from scratch ({shape}, {pretrained["vocab_size"]} tokens,
{pretrained["parameters"] / 1e6:.1f} M parameters), {config["steps"]} steps of span corruption"""
    return words, pretrained["held_out_loss"]
