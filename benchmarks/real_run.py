"""Pretrains a small T5 on a folder of text, runs both stages of PEMT on real data, writes the page.

    python benchmarks/real_run.py --data ../shared/data --work build/real --page docs/real_run.md

The page holds the commands, their times and the result tables that the commands wrote; nothing in
it is typed by hand. Finished parts are skipped, so the script continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

# The sources' training rows under their names, as T5 v1.0 was pretrained: on text alone a backbone
# of this size learns too little for a frozen model to be adapted (sources stayed at chance).
PRETRAIN_TASKS = "sst2,mnli,qqp"
TRAIN = (
    "--sources sst2,mnli,qqp --target yelp_polarity --few-shot 16 --baseline --source-rank 16 "
    "--source-steps 200 --target-steps 100 --source-lr 5e-3 --target-lr 5e-3 --batch-size 32 "
    "--eval-every 100 --max-source-length 64 --limit-eval 200"
)


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


def page(work: Path, commands: list[str], seconds: list[float]) -> str:
    """The Markdown page."""
    pretrained = json.loads((work / "t5" / "pretrain.json").read_text())
    config, loss = pretrained["config"], pretrained["held_out_loss"]
    shape = ", ".join(
        f"{k} {config[k]}" for k in ("d_model", "d_ff", "num_heads", "layers", "decoder_layers")
    )
    listing = "\n".join(f"{c}\n# {s:.0f} s" for c, s in zip(commands, seconds, strict=True))
    return f"""# A run on real data

Written by `benchmarks/real_run.py`; numbers are those of the run. The rows are small samples of the
data sets (a few thousand, see the tables), the backbone is pretrained in minutes: this shows that
everything works end to end on real text, not how well the method does.

```
{listing}
```

The backbone: T5 from scratch ({shape}, {pretrained["vocab_size"]} tokens,
{pretrained["parameters"] / 1e6:.1f} M parameters), {config["steps"]} steps of span corruption
mixed with the training rows of {PRETRAIN_TASKS.replace(",", ", ")} under their names,
as T5 v1.0 was; held-out loss {loss:.3f}.

{(work / "runs" / "summary.md").read_text()}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of JSONL data sets")
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--page", type=Path, default=Path("docs/real_run.md"))
    options = parser.parse_args()
    if not (options.data / "corpus").is_dir():
        parser.error(f"--data: {options.data} has no folder corpus with text files")
    options.work.mkdir(parents=True, exist_ok=True)
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
