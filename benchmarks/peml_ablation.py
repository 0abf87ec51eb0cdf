"""What each part of PEML's search is worth, on planted problems and on nine tasks; writes the page.

    python benchmarks/peml_ablation.py --data ../shared/data [--work build/multi] [--page PAGE]

Needs the runs of `multi_task_run.py` in the same `--work`, whose PEML is the default here. Finished
parts are skipped, so the script continues after a kill; several may work on different `--only` at
once, the last one then runs without.
"""

from __future__ import annotations

import json
import random
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

import planted
import torch
from data_runs import new_parser, parse, run
from multi_task_run import TASKS, TRAIN
from planted import Form

from pemt_fast.nn.prefix_operators import OPERATORS
from pemt_fast.training.multi_task_report import means

SEEDS = (1, 2, 3)
SEARCHED = {
    "sharing: architecture": "--set sharing=architecture",
    "sharing: network": "--set sharing=network",
    "bi-level, half of the rows each": "--architecture-share 0.5",
    "no entropy": "--set entropy_weight=0",
    "temperature 1 throughout": "--set temperature=[1.0,1.0]",
}
MLP = "one cell, mlp_tanh"
RANDOM = "operators drawn at random"
FIXED = {MLP: '--set sharing=architecture --set prefix_depth=1 --set architecture=[["mlp_tanh"]]'}
# Attention layers of the backbone, and cells of a network.
NETWORKS, DEPTH = 9, 2
SPACE = {
    "prefix_length": [4, 16, 32], "prefix_depth": [1, 2], "prefix_width": [32],
    "sharing": ["none", "network"], "r": [4, 16], "operator_rank": [4],
    "learning_rate": [0.0005, 0.005], "architecture_learning_rate": [0.05],
}  # fmt: skip
PLANTED = {
    "default": Form(),
    "bi-level, half of the rows each": Form(bilevel=True),
    "no entropy": Form(entropy_weight=0.0),
    "temperature 1 throughout": Form(temperature=(1.0, 1.0)),
    "no entropy, temperature 1": Form(temperature=(1.0, 1.0), entropy_weight=0.0),
    "none keeps its weight": Form(none_fades=False),
}


def drawn(seed: int) -> list[list[str]]:
    """Operators for all networks; a network that ends in `none` would have no prefix."""
    names, generator = [name for name in OPERATORS if name != "none"], random.Random(seed)
    return [[generator.choice(names) for _ in range(DEPTH)] for _ in range(NETWORKS)]


def folder_of(work: Path, variant: str) -> Path:
    """Where the runs of a variant are."""
    return work / "ablation" / "".join(c if c.isalnum() else "_" for c in variant)


def commands(work: Path, data: Path, variant: str) -> list[list[str]]:
    """The `pemt-fast multitask` of a variant, one for all seeds or one for each."""
    settings = TRAIN[: TRAIN.index("--methods")] + TRAIN[TRAIN.index("--targets") :]
    common = [
        "multitask", "--methods", "peml", "--model", str(work / "t5"), "--data", str(data),
        "--out", str(folder_of(work, variant)), *shlex.split(settings),
    ]  # fmt: skip
    if variant != RANDOM:
        own = {**SEARCHED, **FIXED}[variant].split()
        return [[*common, "--seeds", ",".join(map(str, SEEDS)), *own]]
    return [
        [*common, "--seeds", str(seed), "--set", f"architecture={json.dumps(drawn(seed))}"]
        for seed in SEEDS
    ]


def tuning(work: Path, data: Path) -> list[str]:
    """The `pemt-fast tune-peml` of the page; further processes of it take `--only-trials`."""
    return [
        "tune-peml", "--model", str(work / "t5"), "--data", str(data), "--out", str(work / "tuned"),
        "--tasks", TASKS, "--space", json.dumps(SPACE), "--trials", "12", "--seeds", "1",
        "--steps", "100", "--batch-size", "16", "--max-source-length", "64", "--limit-eval", "100",
    ]  # fmt: skip


def results(folder: Path) -> list[dict]:
    """Of the runs of one method, by seed."""
    return [json.loads((folder / f"seed{seed}" / "results.json").read_text()) for seed in SEEDS]


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean ± standard deviation."""
    mean = statistics.mean(values)
    return f"{mean:{'+' if sign else ''}.1f} ± {statistics.stdev(values):.1f}"


def real_table(work: Path) -> str:
    """Scores of all variants beside the default, seed by seed."""
    multi = work / "runs"
    found = {
        "default": results(multi / "peml"),
        **{v: results(folder_of(work, v) / "peml") for v in (*SEARCHED, *FIXED, RANDOM)},
        "plain prefix": results(multi / "lora_prefix"),
        "no prefix (LoRA)": results(multi / "lora"),
    }
    default = means(found["default"])
    lines = [
        "| variant | mean score | minus default, by seed | search, s | training, s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for variant, runs in found.items():
        scores = means(runs)
        beside = [a - b for a, b in zip(scores, default, strict=True)]
        searched = [r["search"]["seconds"] for r in runs if "search" in r]
        cells = [
            variant, spread(scores), "" if variant == "default" else spread(beside, sign=True),
            f"{statistics.mean(searched):.0f}" if searched else "–",
            f"{statistics.mean(r['seconds'] for r in runs):.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tuned_section(work: Path, command: list[str]) -> str:
    """What `tune-peml` found, and how its best values do on the test parts."""
    found = json.loads((work / "tuned" / "tuning.json").read_text())
    trials = found["study"]["trials"]
    varied = [name for name, values in found["space"].items() if len(values) > 1]
    lines = [
        f"| trial | {' | '.join(varied)} | validation, % | s |",
        f"| ---: |{' ---: |' * (len(varied) + 2)}",
    ]
    for trial in sorted(trials, key=lambda t: (t["state"] != "complete", -(t["value"] or 0))):
        value = f"{trial['value']:.1f}" if trial["state"] == "complete" else trial["state"]
        chosen = [f"{v:.2g}" if isinstance(v := trial["values"][n], float) else v for n in varied]
        cells = [trial["number"], *chosen, value, f"{trial['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    tests = ", ".join(f"{score:.1f}" for score in found["means"])
    table = "\n".join(lines)
    return f"""```
pemt-fast {shlex.join(command)}
```

with a second process beside it (`--only-trials`). Fewer steps and test rows than above, so the
scores do not compare with those of the table there. The best of {len(trials)} trials has on the
test parts: {tests} %.

{table}"""


def planted_table() -> str:
    """What the forms of the search make of the planted problems."""
    lines = [
        "| variant | found | mixture | its operator as it is | trained anew |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for variant, form in PLANTED.items():
        right, losses = 0, []
        for name in planted.PLANTED:
            for seed in planted.SEEDS:
                found = planted.search(name, seed, form)
                right += found.operators == (name,)
                with torch.no_grad():
                    alone = planted.loss_of(
                        planted.taken(found), found.seeds, found.target, slice(None)
                    )
                torch.manual_seed(seed + 50)
                anew = planted.learn(planted.network_of(found.operators), found.seeds, found.target)
                losses.append((found.loss, float(alone), anew))
        cells = [f"{statistics.median(c):.4f} ({max(c):.4f})" for c in zip(*losses, strict=True)]
        lines.append(f"| {variant} | {right} of {len(losses)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(work: Path, data: Path) -> str:
    """The Markdown page."""
    settings = "; ".join(f"`{words}` ({name})" for name, words in {**SEARCHED, **FIXED}.items())
    return f"""# What PEML's search is worth

Written by `benchmarks/peml_ablation.py`; numbers are those of the runs. The default is that of
`PemlConfig`; each variant differs from it in one thing.

## Planted operators

One cell learns what a network with a known operator makes of fixed seeds: conv3 and conv5 among all
operators, gated and mlp_tanh among six, three seeds each. Losses are parts of the target's mean
square, medians with the largest in brackets: of the mixture at the end of the search, of its
operator with the values it has (`discretise`), and of that operator trained anew.

{planted_table()}

## Nine tasks

The runs of [multi_task.md](multi_task.md), mean of all tasks and three seeds in %; every variant
has the rank at which it trains as many parameters as LoRA. Differences are taken seed by seed.
Runs shared the machine with each other and with other work: seconds are rough.

{real_table(work)}

The runs are `pemt-fast multitask --methods peml` with the options of that page and: {settings}.
`{RANDOM}`: for each network and seed {DEPTH} operators, without any search. `{MLP}` is the usual
reparametrisation of prefix tuning.

## Sizes and rates

{tuned_section(work, tuning(work, data))}
"""


def main() -> None:
    parser = new_parser(__doc__.splitlines()[0], work="build/multi", page="docs/peml_ablation.md")
    parser.add_argument("--only", action="append", choices=[*SEARCHED, *FIXED, RANDOM])
    options = parse(parser)
    if not (options.work / "runs" / "summary.json").is_file():
        parser.error(f"--work: {options.work} has no runs of multi_task_run.py")
    for variant in options.only or [*SEARCHED, *FIXED, RANDOM]:
        for command in commands(options.work, options.data, variant):
            run(command)
    if options.only:
        return
    run(tuning(options.work, options.data))
    torch.set_num_threads(1)
    options.page.write_text(page(options.work, options.data))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
