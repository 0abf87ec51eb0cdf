"""Fifty steps of stage 2 give the same losses and parameters whatever way they are run.

The measure is `PublishedModel`, which makes, stacks and compares every expert's output. Every batch
has other rows, other padding and other lengths.

Where a batch is split (two processes, accumulation), what is trained is the mean of the halves' own
losses, `(L(first two rows) + L(last two rows)) / 2`: each half averages its cross-entropy over its
own labels and, in the Task Sparsity Loss, gates over its own sequences and cosines over its own
tokens. That is not the loss of the whole batch, neither here nor with the released code.

Run as a program, this file is one of the two processes: `test_stage2_training.py RANK FOLDER`.
"""

import copy
import functools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from published_tail import PublishedModel
from t5_factory import VOCAB, pemt_config, randomise, tiny_t5
from torch import distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import pemt_fast

STEPS, ROWS, LEARNING_RATE = 50, 4, 1e-2

VARIANTS = {
    "lora": {},
    "lora-torch": {"impl": "torch"},
    "lora-gated": {"t5": {"gated": True}},
    "lora-unequal-ranks": {"source_ranks": (2, 5, 3)},
    "bottleneck": {"source_kind": "bottleneck"},
    "bottleneck-all-tokens": {"source_kind": "bottleneck", "loss_tokens": "all"},
    "lora-recompute": {"recompute": True},
    "bottleneck-recompute": {"source_kind": "bottleneck", "recompute": True},
}

# The variant, options of `DistributedDataParallel`, and whether activations are checkpointed.
PARALLEL = {
    "plain": ("lora", {"find_unused_parameters": False}, False),
    "checkpointed": ("bottleneck", {"find_unused_parameters": False}, True),
    "static": ("bottleneck", {"static_graph": True}, False),
    "static-checkpointed": ("lora", {"static_graph": True}, True),
}


@pytest.fixture(autouse=True)
def _one_thread():
    # A second one makes everything of this size two to three times as slow.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(variant="lora", *, dropout=0.0):
    """A tiny T5 in training, its gates, target adapters and biases away from zero."""
    changes = dict(VARIANTS[variant])
    t5 = tiny_t5(dropout=dropout, **changes.pop("t5", {}))
    config = pemt_config(prompt_dropout=dropout, **changes)
    model = randomise(pemt_fast.get_model(t5, config))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "mixture.b_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.train()


def make_batch(step):
    """Right-padded rows; labels from a tenth of the vocabulary, so that there is much to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    source, target = 6 + step % 3, 5 - step % 2

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    mask = torch.arange(source) < draw(2, source + 1, ROWS, 1)
    counts = torch.arange(target) < draw(1, target + 1, ROWS, 1)
    return {
        "input_ids": draw(2, VOCAB, ROWS, source) * mask,
        "attention_mask": mask.long(),
        "labels": draw(2, 10, ROWS, target).masked_fill(~counts, -100),
    }


def half(batch, i):
    return {name: t[i * ROWS // 2 : (i + 1) * ROWS // 2] for name, t in batch.items()}


def mean_of_halves(model):
    """`model` on a batch: the mean of the losses of its halves."""

    def forward(**batch):
        first, second = (model(**half(batch, i)) for i in range(2))
        return SimpleNamespace(
            loss=(first.loss + second.loss) / 2, aux_loss=(first.aux_loss + second.aux_loss) / 2
        )

    return forward


@dataclass
class Run:
    """What training did.

    Attributes:
        curve: `[STEPS + evaluations, 2]`, loss and Task Sparsity Loss of every forward pass.
        parameters: Trained parameters at the end.
        moved: By how much each of them moved, the norm of the difference.
    """

    curve: torch.Tensor
    parameters: dict[str, torch.Tensor]
    moved: dict[str, torch.Tensor]


def train(model, forward=None, *, evaluate=None, share=lambda batch: batch, parts=1, steps=STEPS):
    """Train with AdamW, looking at the loss in evaluation mode after every tenth step.

    Args:
        model: Whose parameters are trained.
        forward: What is called for the loss; `model` by default.
        evaluate: The same in evaluation; `forward` by default.
        share: What of each batch is seen.
        parts: 2 to accumulate the gradients of two halves.
        steps: Number of updates.
    """
    forward = forward or model
    evaluate = evaluate or forward
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE)
    curve = []

    def record(outputs):
        means = (torch.stack([o.loss, o.aux_loss]).detach().double() for o in outputs)
        curve.append(sum(means) / len(outputs))

    for step in range(steps):
        batch = share(make_batch(step))
        outputs = []
        for i in range(parts):
            outputs.append(forward(**(half(batch, i) if parts > 1 else batch)))
            (outputs[-1].loss / parts).backward()
        record(outputs)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                record([evaluate(**batch)])
            model.train()
    return Run(
        torch.stack(curve),
        {n: p.detach().clone() for n, p in trained.items()},
        {n: (p.detach() - start[n]).norm() for n, p in trained.items()},
    )


def assert_same_run(actual, expected):
    """Losses within 1e-5 of themselves, parameters within 1e-4 of the way they went.

    Float32 rounds at 6e-8, and AdamW makes a whole step of the smallest gradient; 6e-7 and 5e-6
    were the largest differences measured.
    """
    torch.testing.assert_close(actual.curve, expected.curve, rtol=1e-5, atol=0)
    assert actual.parameters.keys() == expected.parameters.keys()
    for name, parameter in expected.parameters.items():
        distance = (actual.parameters[name] - parameter).norm()
        assert distance <= 1e-4 * expected.moved[name], name


def assert_identical_run(actual, expected):
    assert torch.equal(actual.curve, expected.curve)
    for name, parameter in expected.parameters.items():
        assert torch.equal(actual.parameters[name], parameter), name


@functools.cache
def eager_run(variant="lora"):
    """One process, whole batches, nothing special."""
    return train(build(variant))


@functools.cache
def halves_run(variant):
    """One process, and in one graph the mean of the losses of two halves."""
    model = build(variant)
    return train(model, mean_of_halves(model))


# --- against the published formulas --------------------------------------------------------------


def published(variant, groups=1):
    """`PublishedModel` and its forward pass."""
    model = PublishedModel(build(variant))
    return model, lambda **batch: model(**batch, groups=groups)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_formulas(variant):
    expected = train(*published(variant))
    first, last = expected.curve[0], expected.curve[STEPS - 1 :].mean(0)
    assert (last < 0.97 * first).all(), "nothing was learned"
    assert_same_run(eager_run(variant), expected)


# --- other ways to run one process ---------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "bottleneck"])
def test_gradient_checkpointing(variant):
    model = build(variant)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_run(train(model), eager_run(variant))


@pytest.mark.parametrize("variant", ["lora", "bottleneck"])
def test_dropout_with_checkpointing_is_bit_identical(variant):
    plain = build(variant, dropout=0.1)
    checkpointed, other_seed = copy.deepcopy(plain), copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    for seed, model in ((7, plain), (7, checkpointed), (8, other_seed)):
        torch.manual_seed(seed)
        # Checkpointing turns T5's cache off, which sums gradients in another order.
        runs.append(train(model, functools.partial(model, use_cache=False), steps=20))
    assert_identical_run(runs[1], runs[0])
    assert not torch.isclose(runs[2].curve, runs[0].curve, rtol=1e-3).all()


@pytest.mark.slow
def test_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    model = build()
    counter = CompileCounterWithBackend("aot_eager")  # inductor needs half a minute
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def forward(**batch):
        for tensor in batch.values():
            torch._dynamo.mark_dynamic(tensor, 1)
        return compiled(**batch)

    assert_same_run(train(model, forward, evaluate=model), eager_run())
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- halves of a batch ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "bottleneck"])
def test_accumulation_over_two_halves(variant):
    expected = train(*published(variant, groups=2))
    model = build(variant)
    assert_same_run(train(model, parts=2, evaluate=mean_of_halves(model)), expected)
    # The definition matters: the whole batch has another loss.
    assert not torch.isclose(eager_run(variant).curve, expected.curve, rtol=1e-3).any(1).all()


def test_accumulation_by_the_trainer(tmp_path):
    """One SGD step of transformers' trainer is the mean of the gradients of both halves."""
    model, batch = build(), make_batch(0)
    twin = copy.deepcopy(model)
    mean_of_halves(twin)(**batch).loss.backward()
    trainer = transformers.Seq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, gradient_accumulation_steps=2,
            per_device_train_batch_size=1, lr_scheduler_type="constant", max_grad_norm=0.0,
            use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=[half(batch, 0), half(batch, 1)],
        data_collator=lambda halves: halves[0],
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )  # fmt: skip
    trainer.train()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                model.get_parameter(name), parameter - parameter.grad, rtol=1e-5, atol=1e-6
            )


# --- two processes -------------------------------------------------------------------------------


def run_process(rank, folder):
    """Train in every way of `PARALLEL` on this process's half; each run is a file when it ends."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    for name, (variant, options, checkpoints) in PARALLEL.items():
        model = build(variant)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parallel = DistributedDataParallel(model, **options)
        run = train(model, parallel, share=lambda batch: half(batch, rank))
        torch.save(vars(run), folder / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folder of the runs of two processes, and the end of what they printed."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("two-processes")
    search = [str(Path(__file__).parent / "helpers"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a host need not know its own name
    processes, logs = [], [folder / f"log-{rank}" for rank in range(2)]
    try:
        for rank, path in enumerate(logs):
            with path.open("w") as log:
                command = [sys.executable, __file__, str(rank), str(folder)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            if any(p.poll() for p in processes):
                break  # the other one would wait for it
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder, "\n".join(path.read_text()[-2000:] for path in logs)


@pytest.mark.slow
@pytest.mark.parametrize("way", PARALLEL)
def test_two_processes_are_the_mean_of_their_losses(way, two_processes):
    """Averaging gradients over processes is training on the mean of their losses."""
    folder, log = two_processes
    files = [folder / f"{way}-{rank}.pt" for rank in range(2)]
    assert all(path.is_file() for path in files), log
    first, second = (Run(**torch.load(path)) for path in files)
    for name, parameter in first.parameters.items():
        assert torch.equal(second.parameters[name], parameter), name
    first.curve = (first.curve + second.curve) / 2
    assert_same_run(first, halves_run(PARALLEL[way][0]))


if __name__ == "__main__":
    run_process(int(sys.argv[1]), Path(sys.argv[2]))
