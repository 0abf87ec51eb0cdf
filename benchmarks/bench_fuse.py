# SPDX-License-Identifier: Apache-2.0
"""Measure what `fuse` makes of peft's adapters on T5-base: the same model, before and after.

    python benchmarks/bench_fuse.py [--device cuda] [--quick] [--only "LoRA"]

Run it as a path, not with `-m`. Outputs and gradients are compared before anything is timed, the
two forms take turns. Writes JSON and a page of tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from cases import DTYPES
from command_line import check_options, chosen, new_parser, say
from measure import peak_memory_mib, pin_threads, time_interleaved
from records import environment
from t5_cases import CPU_LAYERS, SHAPES
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import pemt_fast
from pemt_fast.timing import ratio

FORWARD, STEP = "forward", "step"
ROUNDS, QUICK_ROUNDS = 9, 2
# Logits and each gradient may be twice as far from float64 as peft's, and so much more: norms of
# differences relative to the norm.
SLACK = {"fp32": 1e-6, "bf16": 1e-2}
PEFT, FUSED = "peft", "fused"


@dataclasses.dataclass(frozen=True)
class FuseCase:
    """Adapters of rank 8 at q and v; `mixed` gives each sequence one of them, without gradients."""

    name: str
    adapters: int = 1
    mixed: bool = False
    poly: bool = False
    B: int = 8
    source: int = 128
    target: int = 16

    @property
    def modes(self) -> tuple[str, ...]:
        """peft refuses to train a mixed batch."""
        return (FORWARD,) if self.mixed else (FORWARD, STEP)


CASES = (
    FuseCase("LoRA, 1 adapter"),
    FuseCase("LoRA, 3 adapters", adapters=3),
    FuseCase("LoRA, 6 adapters", adapters=6),
    FuseCase("LoRA, 6 adapters, mixed batch", adapters=6, mixed=True),
    FuseCase("Poly, 8 skills", poly=True),
)


class Subject:
    """One model with peft's adapters, in training mode; none of them drops out."""

    def __init__(self, case: FuseCase, dtype: torch.dtype, device: str, layers: int) -> None:
        torch.manual_seed(0)
        shape = SHAPES[1]
        config = T5Config(  # type: ignore[call-arg]
            vocab_size=shape.vocabulary, d_model=shape.H, d_kv=shape.d_kv, d_ff=shape.D,
            num_heads=shape.heads, num_layers=layers, num_decoder_layers=layers, dropout_rate=0.0,
            # Not relu: near its kink rounding switches units, and with them gradients.
            decoder_start_token_id=0, feed_forward_proj="gelu",
        )  # fmt: skip
        self.model: Any = _with_adapters(case, T5ForConditionalGeneration(config))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
            parameter.data = parameter.data.bfloat16().float()  # one model for all dtypes
        self.model.to(device, dtype)
        # Poly's router draws numbers in training.
        self.model.train(not (case.mixed or case.poly))
        names = [f"a{i % case.adapters}" for i in range(case.B)]
        self._extra: dict[str, Any] = {"adapter_names": names} if case.mixed else {}
        if case.poly:
            self._extra = {"task_ids": torch.arange(case.B, device=device) % 4}
        self._inputs = {
            "input_ids": torch.randint(2, shape.vocabulary, (case.B, case.source), device=device),
            "labels": torch.randint(2, shape.vocabulary, (case.B, case.target), device=device),
        }

    def use(self, form: str) -> None:
        """Fused or as peft has it."""
        pemt_fast.unfuse(self.model)
        if form == FUSED:
            pemt_fast.fuse(self.model)

    def run(self, form: str, mode: str) -> Callable[[], Any]:
        """One call; changing the form costs some microseconds of it, in both."""

        def call() -> Any:
            self.use(form)
            if mode == FORWARD:
                with torch.no_grad():
                    return self.model(**self._inputs, **self._extra, use_cache=False).logits
            self.model.zero_grad()
            out = self.model(**self._inputs, **self._extra, use_cache=False)
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


def _with_adapters(case: FuseCase, t5: Any) -> Any:
    options: dict[str, Any] = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM", "r": 8}
    if case.poly:
        return peft.get_peft_model(t5, peft.PolyConfig(n_tasks=4, n_skills=8, **options))
    model: Any = peft.get_peft_model(t5, peft.LoraConfig(**options), adapter_name="a0")
    for i in range(1, case.adapters):
        model.add_adapter(f"a{i}", peft.LoraConfig(**options))
    model.base_model.set_adapter([f"a{i}" for i in range(case.adapters)])
    return model


def measure(case: FuseCase, dtype: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a cell."""
    exact = Subject(case, torch.float64, "cpu", options.layers).results(PEFT, mode)
    subject = Subject(case, DTYPES[dtype], options.device, options.layers)
    row: dict[str, Any] = {"case": case.name, "dtype": dtype, "mode": mode}
    theirs, ours = (_errors(subject.results(form, mode), exact) for form in (PEFT, FUSED))
    row["deviation"] = {PEFT: max(theirs.values()), FUSED: max(ours.values())}
    wrong = {n: e for n, e in ours.items() if not e <= 2 * theirs[n] + SLACK[dtype]}
    if wrong:
        name = max(wrong, key=wrong.__getitem__)
        row["error"] = f"{name}: {wrong[name]:.1e} from float64, peft's {theirs[name]:.1e}"
        return row
    runs = {form: subject.run(form, mode) for form in (PEFT, FUSED)}
    seconds = time_interleaved(runs, options.device, rounds=options.rounds)
    row["ms"] = {form: 1e3 * statistics.median(found) for form, found in seconds.items()}
    row["speedup"] = ratio(seconds, PEFT, FUSED)
    row["memory_mib"] = {form: peak_memory_mib(run, options.device) for form, run in runs.items()}
    return row


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    tiny = torch.finfo(torch.float64).tiny
    return {n: float((found[n] - t).norm() / t.norm().clamp_min(tiny)) for n, t in exact.items()}


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    stamp = found["environment"]
    layers = found["layers"]
    lines = [
        "# `fuse(model)` on peft's adapters\n",
        f"T5-base with gelu, {layers} + {layers} layers, 8 × 128 tokens, adapters of rank 8 at q "
        f"and v. {stamp['gpu'] or stamp['cpu']}, {stamp['threads']} threads; torch "
        f"{stamp['torch']}; commit {stamp['commit']}; {stamp['date'][:10]}. Medians of "
        f"{found['rounds']} interleaved rounds, the whole model included. Off by: the largest "
        "distance from float64 of logits or a gradient.\n",
        "| case | dtype | mode | peft ms | fused | × | memory MiB | fused | off by | fused |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        named = f"{row['case']} | {row['dtype']} | {row['mode']}"
        if "error" in row:
            lines.append(f"| {named} | {row['error']} | | | | | | |")
            continue
        times, memory = row["ms"], row["memory_mib"]
        shown = [f"{m:.0f}" if m is not None else "–" for m in (memory[PEFT], memory[FUSED])]
        shown += [f"{row['deviation'][form]:.1e}" for form in (PEFT, FUSED)]
        lines.append(
            f"| {named} | {times[PEFT]:.1f} | {times[FUSED]:.1f} | {row['speedup']:.2f} "
            f"| {' | '.join(shown)} |"
        )
    return "\n".join([*lines, "", *_summary(found["rows"])]) + "\n"


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    """The range of each mode, and how many cells are slower to the two digits shown."""
    lines = []
    for mode in (FORWARD, STEP):
        known = [round(row["speedup"], 2) for row in rows if row["mode"] == mode and "ms" in row]
        if known:
            slower = sum(value < 1 for value in known)
            lines.append(f"* {mode}: {min(known):.2f} to {max(known):.2f} of peft's speed, "
                         f"{slower} of {len(known)} cells slower.")  # fmt: skip
    return lines


def main() -> int:
    """Returns the exit status: 1 if a cell was refused."""
    parser = new_parser("Time fuse(model) on peft's adapters.", quick="one layer, two rounds")
    options = parser.parse_args()
    check_options(parser, options)
    options.layers = 1 if options.quick else CPU_LAYERS if options.device == "cpu" else 12
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    cases: list[FuseCase] = chosen(parser, options.only, CASES)
    stamp = environment(pin_threads(options.threads), options.commit)
    found: dict[str, Any] = {
        "environment": stamp, "layers": options.layers, "rounds": options.rounds, "rows": [],
    }  # fmt: skip
    name = f"{options.device}-fuse-{str(stamp['date'])[:10]}-{stamp['commit'] or 'nogit'}"
    # A folder of its own below the results of the suites that report.py reads.
    path = Path(options.out) / "fuse" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for dtype in DTYPES:
            for mode in case.modes:
                found["rows"].append(measure(case, dtype, mode, options))
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(found), encoding="utf-8")
        say(case.name)
    say(page(found))
    say(f"written: {path}")
    return int(any("error" in row for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
