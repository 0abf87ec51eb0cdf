"""Pretrains a small T5, trains nine tasks together by ten methods, writes the page.

    python benchmarks/multi_task_run.py --data ../shared/data [--work build/multi] [--page PAGE]

The page holds the commands, their times and the table that the command wrote; nothing in it is
typed by hand. Finished parts are skipped, so the script continues after a kill; several may work on
different `--seeds` at once, the last one then runs with all.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections import Counter
from pathlib import Path

from data_runs import backbone, new_parser, parse, remembered, run

# The training rows of the tasks themselves and of their relatives, as T5 v1.0 was pretrained:
# on text alone a backbone of this size learns too little for a frozen model to be adapted; with
# relatives only, LoRA never came to write the labels of other tasks.
TASKS = "cb,boolq,rte,wic,mrpc,sst2,ag_news,trec,subj"
PRETRAIN_TASKS = f"{TASKS},mnli,snli,qqp,qnli,scitail,cola"
METHODS = "lora,moe_lora,poly,mhr,c_poly,mtl_lora,multi_lora,prompt_tuning,lora_prefix,peml"
PICTURES = {
    "allocation.png": "multi_task_allocation.png",
    "peml/seed1/search/architecture.png": "multi_task_architecture.png",
    "peml/seed1/search/weights.png": "multi_task_search.png",
}
TRAIN = (
    f"--tasks {TASKS} --methods {METHODS} --targets all-linear --steps 250 --lr 2e-3 "
    "--batch-size 16 --max-source-length 64 --limit-eval 300"
)


def page(work: Path, commands: list[str], pretrain_s: float) -> str:
    """The Markdown page."""
    words, loss = backbone(work)
    summary = json.loads((work / "runs" / "summary.json").read_text())
    runs = [found for method in summary["runs"].values() for found in method]
    seconds = sum(found["seconds"] for found in runs)
    return f"""# Nine tasks, ten methods, one size

Written by `benchmarks/multi_task_run.py`; numbers are those of the run. The rows are small samples
of the data sets, the backbone is pretrained in minutes: this shows that everything works on real
text and what the allocations look like, not how well the methods do on a real backbone.

```
{commands[0]}
# {pretrain_s:.0f} s
{commands[1]}
# {len(runs)} runs, {seconds:.0f} s of training on one thread each
```

{words} mixed
with the training rows of {PRETRAIN_TASKS.replace(",", ", ")}, held-out loss {loss:.3f}.

LoRA, MoE-LoRA, Poly, MHR and C-Poly have {summary["units"]} hidden units beside each linear layer.
MTL-LoRA, MultiLoRA, LoRA with a plain prefix (`lora_prefix`) and PEML have the rank at which they
train as many parameters as LoRA; prompt tuning has its usual size and rate (0.3). α / r = 1, the
same rates, batches and steps for all others, tasks drawn at temperature
{summary["temperature"]:g}; texts begin with the name of their task. Nothing was tuned per method.
The rate is the second one tried with LoRA and Poly's family: at 1e-2 LoRA diverged in all seeds and
the others stayed near the majority class, which was seen on test scores. PEML searches for as many
steps as it is trained for afterwards, anew, with the architecture that was found; its search trains
more parameters than that, and its time is a row of its own. Two runs shared the machine with each
other and with other work: seconds are rough.

{(work / "runs" / "summary.md").read_text()}
![allocation](multi_task_allocation.png)

The weight of each skill for each task, in the layer whose tasks differ most, of the first seed.
C-Poly's first three skills are common, the others belong to one task each and keep weight 1; MHR's
weights are means over its splits. The other layers and seeds are in the `results.json` of the runs.

{_searches(summary["runs"]["peml"])}

![architecture](multi_task_architecture.png)

![weights of the operators](multi_task_search.png)
"""


def _searches(runs: list[dict]) -> str:
    """What the seeds' searches found, in words."""
    counts = [Counter(name for cells in run["search"]["architecture"] for name in cells)
              for run in runs]  # fmt: skip
    found = "; ".join(
        ", ".join(f"{name} {count}" for name, count in own.most_common()) for own in counts
    )
    return f"""PEML's operators, by seed: {found}. Below, the architecture of the first seed and the
weights during its search."""


def main() -> None:
    description = __doc__.splitlines()[0]
    parser = new_parser(description, work="build/multi", page="docs/multi_task.md")
    parser.add_argument("--seeds", default="1,2,3")
    options = parse(parser)
    t5, runs = options.work / "t5", options.work / "runs"
    pretrain = (
        f"pretrain --text {options.data}/corpus --data {options.data} --tasks {PRETRAIN_TASKS} "
        f"--task-share 0.9 --steps 2500 --out {t5}"
    )
    train = f"multitask --model {t5} --data {options.data} --out {runs} {TRAIN}"
    seconds = remembered(options.work / "pretrain.json", shlex.split(pretrain))
    run(shlex.split(f"{train} --seeds {options.seeds}"))
    commands = [f"pemt-fast {command}" for command in (pretrain, train)]
    options.page.write_text(page(options.work, commands, seconds))
    for source, picture in PICTURES.items():
        shutil.copy(runs / source, options.page.with_name(picture))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
