# SPDX-License-Identifier: Apache-2.0
"""`pemt-fast demo`: PEMT from nothing in a few minutes on a laptop, on tasks the program makes.

1. A small T5 is built and trained on four tagged tasks on strings, then frozen.
2. Stage 1 trains four sources: reverse, sort, shift, even/odd.
3. Stage 2 adapts to few-shot targets. `reverse` is one of the sources; `reverse_shift` is the
   composition of two of them. A single adapter trained on the same examples is the comparison.
4. The operator is timed against the published loop over experts.

Everything goes through the code that real runs use: `stages.py`, `fit.py`.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from pemt_fast.data import SYNTHETIC_TASKS, Splits, make_examples, synthetic_tokenizer, tokenize
from pemt_fast.data.synthetic import BACKBONE_TASKS, SYNTHETIC_SOURCES
from pemt_fast.ops import adapter_mixture
from pemt_fast.t5 import T5Model
from pemt_fast.testing import adapter_mixture_loop
from pemt_fast.timing import interleave, median_ms, ratio
from pemt_fast.training.fit import environment, write_json
from pemt_fast.training.options import TrainOptions
from pemt_fast.training.stages import (
    Backbone,
    TaskData,
    score_untouched,
    train_single,
    train_source,
    train_target,
)

# Says that a directory was written by the demo.
MARKER = ".pemt-fast-demo"

# Prompt positions of every run; the descriptions are longer than a toy model needs.
PROMPT_LENGTH = 6

# Which known sources a target is made of: what a good gate should find.
RELATED = {"reverse": ("reverse",), "reverse_shift": ("reverse", "shift")}


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take about three minutes on two cores.

    Attributes:
        backbone_steps: Updates of the backbone.
        source_steps: Updates per source.
        target_steps: Updates per target run.
        target_examples: Few-shot examples of a target.
        test_examples: Test examples per task.
        targets: Target tasks, keys of `RELATED`.
        seeds: One PEMT and one single-adapter run per seed and target.
        rank: Bottleneck of the sources and of the single adapter.
        timing_rounds: Rounds of the operator timing.
        progress: Show progress bars.
    """

    backbone_steps: int = 900
    source_steps: int = 500
    target_steps: int = 300
    target_examples: int = 64
    test_examples: int = 256
    targets: tuple[str, ...] = ("reverse", "reverse_shift")
    seeds: tuple[int, ...] = (1, 2)
    rank: int = 8
    timing_rounds: int = 15
    progress: bool = True


def train_backbone(
    tokenizer: PreTrainedTokenizerBase, config: DemoConfig, directory: Path
) -> T5Model:
    """A small T5 that can copy, rotate, pick even and odd letters and shift, when told by a tag."""
    set_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(  # type: ignore[call-arg]
            vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=256, num_heads=4, num_layers=2,
            num_decoder_layers=2, dropout_rate=0.0, decoder_start_token_id=0,
        )
    )  # fmt: skip
    rows = []
    for i, task in enumerate(BACKBONE_TASKS):
        rows += tokenize(make_examples(task, 8000, seed=i), tokenizer)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(directory), max_steps=config.backbone_steps, learning_rate=2e-3,
        warmup_steps=100, per_device_train_batch_size=64, save_strategy="no", report_to="none",
        logging_steps=100, disable_tqdm=not config.progress, log_level="error",
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = Seq2SeqTrainer(model, arguments, collator, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def synthetic_data(name: str, train: int, test: int, seed: int) -> TaskData:
    """Examples of a synthetic task; validation and test never change with the seed."""
    task = SYNTHETIC_TASKS[name]
    splits = Splits(
        make_examples(name, train, seed=seed, split="train"),
        make_examples(name, 64, seed=0, split="validation"),
        make_examples(name, test, seed=0, split="test"),
    )
    return TaskData(name, task.description, splits, task.metrics, PROMPT_LENGTH)


def time_operator(rounds: int, dtype: torch.dtype) -> dict[str, float]:
    """The mixture of a T5-base feed-forward layer, forward and backward, frozen experts."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x = make(8, 128, 3072).requires_grad_()
    gate = torch.softmax(torch.randn(8, 6, generator=generator), -1).requires_grad_()
    w_down, w_up = make(6, 64, 3072, scale=0.02), make(6, 64, 768, scale=0.1)
    base, grad = make(8, 128, 768), make(8, 128, 768)

    def run(function: object) -> torch.Tensor:
        out = function(x, gate, w_down, w_up, activation="identity", base=base)  # type: ignore[operator]
        torch.autograd.grad(out, (x, gate), grad)
        return out

    loop, ours = run(adapter_mixture_loop), run(adapter_mixture)
    error = ((loop - ours).float().norm() / loop.float().norm()).item()
    if not error < 0.02:
        raise RuntimeError(f"the operator disagrees with the loop: relative error {error:.3g}")
    seconds = interleave(
        {"loop": lambda: run(adapter_mixture_loop), "ours": lambda: run(adapter_mixture)},
        rounds=rounds,
    )
    return {
        "loop_ms": median_ms(seconds["loop"]),
        "ours_ms": median_ms(seconds["ours"]),
        "speedup": ratio(seconds, "loop", "ours"),
        "relative_difference": error,
    }


def _mean(runs: Sequence[dict], metric: str) -> float:
    return statistics.mean(r["test"][metric] for r in runs)


def _clear(folder: Path) -> None:
    """Empty the directory of an earlier demo; refuse one that holds anything else."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ValueError(f"{folder}: not empty and not from an earlier demo; choose another")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def run_demo(
    directory: str | Path,
    config: DemoConfig | None = None,
    *,
    report: Callable[[str], object] = lambda line: None,
) -> dict:
    """Run the whole demo and write `demo.json` and the gate maps below `directory`.

    Args:
        directory: An empty or new directory, or that of an earlier demo, which is replaced.
        config: Sizes.
        report: Called with a line per step.

    Returns:
        Test scores (percent) per target of PEMT, the single adapter and the untouched model, gate
        weight per source, source scores, operator times.
    """
    config = config or DemoConfig()
    folder = Path(directory)
    _clear(folder)
    threads = torch.get_num_threads()
    # The toy model's matmuls are too small to share; threads that wait for each other would crawl
    # on a busy machine.
    torch.set_num_threads(1)
    try:
        results = _train_all(folder, config, report)
    finally:
        torch.set_num_threads(threads)
    report("operator timing")
    results["operator"] = {
        "float32": time_operator(config.timing_rounds, torch.float32),
        "bfloat16": time_operator(config.timing_rounds, torch.bfloat16),
    }
    results["environment"] = environment()
    write_json(folder / "demo.json", results)
    return results


def _train_all(folder: Path, config: DemoConfig, report: Callable[[str], object]) -> dict:
    """Backbone, sources and targets."""
    tokenizer = synthetic_tokenizer()
    report(f"backbone: a small T5 on {len(BACKBONE_TASKS)} tagged tasks")
    t5 = train_backbone(tokenizer, config, folder / "backbone")
    backbone = Backbone(lambda: t5, tokenizer, "demo")
    source_options = TrainOptions(
        learning_rate=1e-2, steps=config.source_steps, eval_every=config.source_steps,
        batch_size=64, eval_batch_size=256, progress=config.progress,
    )  # fmt: skip
    sources = {}
    for name in SYNTHETIC_SOURCES:
        data = synthetic_data(name, 4000, config.test_examples, seed=11)
        path = folder / "sources" / name
        report(f"stage 1, source {name}: {data.description}")
        sources[name] = train_source(backbone, data, source_options, path, rank=config.rank)
    targets = {name: _run_target(name, backbone, config, folder, report) for name in config.targets}
    return {"sources": {name: r["test"] for name, r in sources.items()}, "targets": targets}


def _run_target(
    name: str,
    backbone: Backbone,
    config: DemoConfig,
    folder: Path,
    report: Callable[[str], object],
) -> dict:
    pemt, single = [], []
    for seed in config.seeds:
        report(f"stage 2, target {name}, seed {seed}: PEMT, then a single adapter")
        options = TrainOptions(
            learning_rate=1e-2, steps=config.target_steps, eval_every=config.target_steps,
            batch_size=32, eval_batch_size=256, seed=seed, progress=config.progress,
        )  # fmt: skip
        data = synthetic_data(name, config.target_examples, config.test_examples, seed=seed)
        paths = [folder / "sources" / source for source in SYNTHETIC_SOURCES]
        run = folder / "targets" / name / f"seed-{seed}"
        pemt.append(train_target(backbone, data, paths, options, run / "pemt"))
        single.append(train_single(backbone, data, options, run / "single", rank=config.rank))
    untouched = score_untouched(backbone, data, options)
    return {
        "related": list(RELATED[name]),
        "examples": config.target_examples,
        "seeds": list(config.seeds),
        "scores": {
            "PEMT": {m: _mean(pemt, m) for m in untouched},
            "single adapter": {m: _mean(single, m) for m in untouched},
            "untouched model": untouched,
        },
        "gate": {s: statistics.mean(r["gate"][s] for r in pemt) for s in SYNTHETIC_SOURCES},
        "gates": pemt[0]["gates"],
        "image": str(Path("targets") / name / f"seed-{config.seeds[0]}" / "pemt" / "gates.png"),
    }
