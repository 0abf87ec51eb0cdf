"""Pretrains a small T5 on a folder of text, runs both stages of PEMT on real data, writes the page.

    python benchmarks/real_run.py --data ../shared/data --work build/real --page docs/real_run.md

The page holds the commands, their times and the result tables that the commands wrote; nothing in
it is typed by hand. Finished parts are skipped, so the script continues after a kill.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from data_runs import backbone, new_parser, parse, remembered

# The sources' training rows under their names, as T5 v1.0 was pretrained: on text alone a backbone
# of this size learns too little for a frozen model to be adapted (sources stayed at chance).
PRETRAIN_TASKS = "sst2,mnli,qqp"
TRAIN = (
    "--sources sst2,mnli,qqp --target yelp_polarity --few-shot 16 --baseline --source-rank 16 "
    "--source-steps 200 --target-steps 100 --source-lr 5e-3 --target-lr 5e-3 --batch-size 32 "
    "--eval-every 100 --max-source-length 64 --limit-eval 200"
)


def page(work: Path, commands: list[str], seconds: list[float]) -> str:
    """The Markdown page."""
    words, loss = backbone(work)
    listing = "\n".join(f"{c}\n# {s:.0f} s" for c, s in zip(commands, seconds, strict=True))
    return f"""# A run on real data

Written by `benchmarks/real_run.py`; numbers are those of the run. The rows are small samples of the
data sets (a few thousand, see the tables), the backbone is pretrained in minutes: this shows that
everything works end to end on real text, not how well the method does.

```
{listing}
```

{words}
mixed with the training rows of {PRETRAIN_TASKS.replace(",", ", ")} under their names,
as T5 v1.0 was; held-out loss {loss:.3f}.

{(work / "runs" / "summary.md").read_text()}"""


def main() -> None:
    description = __doc__.splitlines()[0]
    options = parse(new_parser(description, work="build/real", page="docs/real_run.md"))
    t5, runs = options.work / "t5", options.work / "runs"
    pretrain = (
        f"pretrain --text {options.data}/corpus --data {options.data} --tasks {PRETRAIN_TASKS}"
    )
    pretrain += f" --task-share 0.9 --out {t5}"
    train = f"train --model {t5} --data {options.data} --out {runs} {TRAIN}"
    seconds = [
        remembered(options.work / f"{name}.json", shlex.split(command))
        for name, command in (("pretrain", pretrain), ("train", train))
    ]
    commands = [f"pemt-fast {command}" for command in (pretrain, train)]
    options.page.write_text(page(options.work, commands, seconds))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
