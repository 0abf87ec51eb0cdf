# SPDX-License-Identifier: Apache-2.0
"""What `fuse` makes of another library's adapters: compared, timed in turns, shown as a page.

Shared by `bench_fuse.py` (peft) and `bench_fuse_adapterhub.py` (adapters), which build the models.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES
from command_line import check_options, chosen, new_parser, say
from measure import peak_memory_mib, pin_threads, time_interleaved
from records import environment
from t5_cases import CPU_LAYERS, Shape
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import pemt_fast
from pemt_fast.timing import ratio

FORWARD, STEP = "forward", "step"
ROUNDS, QUICK_ROUNDS = 9, 2
# Logits and each gradient may be twice as far from float64 as the library's, and so much more:
# norms of differences relative to the norm.
SLACK = {"fp32": 1e-6, "bf16": 1e-2}
FUSED = "fused"
# A gradient that is 0 but for rounding, next to the largest: there is nothing to compare.
NOTHING = 1e-10

# Library -> title of its page, what its adapters are, and what else the page has to say.
TEXTS = {
    "peft": ("`fuse(model)` on peft's adapters", "adapters of rank 8 at q and v", ""),
    "adapters": (
        "`fuse(model)` on AdapterHub's adapters",
        "seq_bn with reduction factor 16 behind every feed-forward sub-layer",
        " An Average has no bf16 cells: there the library raises.",
    ),
}
WHOSE = {"peft": "peft's", "adapters": "the library's"}


class Subject:
    """One model with another library's adapters; none of them drops out."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model = model
        self._inputs = inputs

    def use(self, form: str) -> None:
        """Fused or as the library has it."""
        pemt_fast.unfuse(self.model)
        if form == FUSED:
            pemt_fast.fuse(self.model)

    def run(self, form: str, mode: str) -> Callable[[], Any]:
        """One call; changing the form costs some microseconds of it, in both."""

        def call() -> Any:
            self.use(form)
            if mode == FORWARD:
                with torch.no_grad():
                    return self.model(**self._inputs, use_cache=False).logits
            self.model.zero_grad()
            out = self.model(**self._inputs, use_cache=False)
            out.loss.backward()
            return out.logits

        return call

    def results(self, form: str, mode: str) -> dict[str, Tensor]:
        """Logits, in a step also every gradient."""
        found = {"logits": self.run(form, mode)().detach()}
        if mode == STEP:
            named = self.model.named_parameters()
            found |= {n: p.grad for n, p in named if p.grad is not None}
        return {n: t.double().cpu().clone() for n, t in found.items()}


def plain_t5(shape: Shape, layers: int) -> Any:
    """A random T5 without dropout."""
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=shape.vocabulary, d_model=shape.H, d_kv=shape.d_kv, d_ff=shape.D,
        num_heads=shape.heads, num_layers=layers, num_decoder_layers=layers, dropout_rate=0.0,
        # Not relu: near its kink rounding switches units, and with them gradients.
        decoder_start_token_id=0, feed_forward_proj="gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def token_inputs(shape: Shape, B: int, source: int, target: int, device: str) -> dict[str, Any]:
    """Random tokens."""
    return {
        "input_ids": torch.randint(2, shape.vocabulary, (B, source), device=device),
        "labels": torch.randint(2, shape.vocabulary, (B, target), device=device),
    }


def measure(
    case: Any,
    dtype: str,
    mode: str,
    options: argparse.Namespace,
    *,
    subject_of: Callable[[Any, torch.dtype, str, int], Subject],
    peer: str,
) -> dict[str, Any]:
    """The row of a cell."""
    exact = subject_of(case, torch.float64, "cpu", options.layers).results(peer, mode)
    subject = subject_of(case, DTYPES[dtype], options.device, options.layers)
    row: dict[str, Any] = {"case": case.name, "dtype": dtype, "mode": mode}
    theirs, ours = (_errors(subject.results(form, mode), exact) for form in (peer, FUSED))
    row["deviation"] = {peer: max(theirs.values()), FUSED: max(ours.values())}
    wrong = {n: e for n, e in ours.items() if not e <= 2 * theirs[n] + SLACK[dtype]}
    if wrong:
        name = max(wrong, key=wrong.__getitem__)
        row["error"] = f"{name}: {wrong[name]:.1e} from float64, {WHOSE[peer]} {theirs[name]:.1e}"
        return row
    runs = {form: subject.run(form, mode) for form in (peer, FUSED)}
    seconds = time_interleaved(runs, options.device, rounds=options.rounds)
    row["ms"] = {form: 1e3 * statistics.median(found) for form, found in seconds.items()}
    row["speedup"] = ratio(seconds, peer, FUSED)
    row["memory_mib"] = {form: peak_memory_mib(run, options.device) for form, run in runs.items()}
    return row


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    tiny = torch.finfo(torch.float64).tiny
    norms = {n: float(t.norm()) for n, t in exact.items()}
    least = NOTHING * max(norms.values())
    return {
        n: float((found[n] - t).norm()) / max(norms[n], tiny)
        for n, t in exact.items()
        if norms[n] >= least
    }


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    stamp, peer = found["environment"], found.get("peer", "peft")
    layers, (title, what, more) = found["layers"], TEXTS[peer]
    lines = [
        f"# {title}\n",
        f"T5-base with gelu, {layers} + {layers} layers, 8 × 128 tokens, {what}. "
        f"{stamp['gpu'] or stamp['cpu']}, {stamp['threads']} threads; torch "
        f"{stamp['torch']}; commit {stamp['commit']}; {stamp['date'][:10]}. Medians of "
        f"{found['rounds']} interleaved rounds, the whole model included. Off by: the largest "
        f"distance from float64 of logits or a gradient.{more}\n",
        f"| case | dtype | mode | {peer} ms | fused | × | memory MiB | fused | off by | fused |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        named = f"{row['case']} | {row['dtype']} | {row['mode']}"
        if "error" in row:
            lines.append(f"| {named} | {row['error']} | | | | | | |")
            continue
        times, memory = row["ms"], row["memory_mib"]
        shown = [f"{m:.0f}" if m is not None else "–" for m in (memory[peer], memory[FUSED])]
        shown += [f"{row['deviation'][form]:.1e}" for form in (peer, FUSED)]
        lines.append(
            f"| {named} | {times[peer]:.1f} | {times[FUSED]:.1f} | {row['speedup']:.2f} "
            f"| {' | '.join(shown)} |"
        )
    return "\n".join([*lines, "", *summary(found["rows"], peer)]) + "\n"


def summary(rows: list[dict[str, Any]], peer: str) -> list[str]:
    """The range of each mode, and how many cells are slower to the two digits shown."""
    lines = []
    for mode in (FORWARD, STEP):
        known = [round(row["speedup"], 2) for row in rows if row["mode"] == mode and "ms" in row]
        if known:
            slower = sum(value < 1 for value in known)
            lines.append(f"* {mode}: {min(known):.2f} to {max(known):.2f} of {WHOSE[peer]} speed, "
                         f"{slower} of {len(known)} cells slower.")  # fmt: skip
    return lines


OVERVIEW = "README.md"


def overview(folder: Path) -> str:
    """The newest result of each library and device in one table."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        stamp = found["environment"]
        key = (found.get("peer", "peft"), stamp["gpu"] or stamp["cpu"])
        if key not in newest or stamp["date"] > newest[key]["environment"]["date"]:
            newest[key] = found
    lines = [
        "# `fuse(model)`: one added line\n",
        "Models with adapters of other libraries, whole T5-base, before and after "
        "`pemt_fast.fuse(model)`: how often faster, and the peak memory of a call beyond what the "
        "model takes. Logits and every gradient were compared with float64 before a cell was "
        "timed; each page has the times, distances and versions. Below 1 is slower.\n",
        "| library | case | dtype | × forward | × step | step, MiB | fused |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for (peer, _), found in newest.items():
        cells: dict[tuple[str, str], dict[str, Any]] = {}
        for row in found["rows"]:
            cells.setdefault((row["case"], row["dtype"]), {})[row["mode"]] = row
        for (case, dtype), modes in cells.items():
            shown = [
                f"{modes[mode]['speedup']:.2f}" if "ms" in modes.get(mode, {}) else "–"
                for mode in (FORWARD, STEP)
            ]
            memory = modes.get(STEP, {}).get("memory_mib") or {}
            for form in (peer, FUSED):
                value = memory.get(form)
                shown.append("–" if value is None else f"{value:.0f}")
            lines.append(f"| {peer} | {case} | {dtype} | {' | '.join(shown)} |")
    lines.append("")
    for (peer, device), found in newest.items():
        lines.append(f"{peer}, {device}, commit {found['environment']['commit']}:\n")
        lines += [*summary(found["rows"], peer), ""]
    return "\n".join(lines).rstrip() + "\n"


def run_command(
    cases: Sequence[Any],
    peer: str,
    measure_cell: Callable[[Any, str, str, argparse.Namespace], dict[str, Any]],
) -> int:
    """The command line; returns the exit status: 1 if a cell was refused."""
    parser = new_parser(f"Time fuse(model) on the adapters of {peer}.", quick="one layer, 2 rounds")
    options = parser.parse_args()
    check_options(parser, options)
    options.layers = 1 if options.quick else CPU_LAYERS if options.device == "cpu" else 12
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    wanted = chosen(parser, options.only, cases)
    stamp = environment(pin_threads(options.threads), options.commit)
    found: dict[str, Any] = {
        "environment": stamp, "peer": peer, "layers": options.layers, "rounds": options.rounds,
        "rows": [],
    }  # fmt: skip
    kind = "fuse" if peer == "peft" else f"fuse-{peer}"
    name = f"{options.device}-{kind}-{str(stamp['date'])[:10]}-{stamp['commit'] or 'nogit'}"
    # A folder of its own below the results of the suites that report.py reads.
    path = Path(options.out) / "fuse" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in wanted:
        for dtype in case.dtypes:
            for mode in case.modes:
                found["rows"].append(measure_cell(case, dtype, mode, options))
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(found), encoding="utf-8")
        say(case.name)
    (path.parent / OVERVIEW).write_text(overview(path.parent), encoding="utf-8")
    say(page(found))
    say(f"written: {path}")
    return int(any("error" in row for row in found["rows"]))
