"""Training with task ids: groups of the trainer, files, tasks that need skills of their own."""

import pytest
import torch
from linear_models import TASKS, adapted, tiny_inputs
from safetensors.torch import load_file
from torch import nn
from transformers import Seq2SeqTrainingArguments

import pemt_fast
from pemt_fast.nn.routing import Routing, RoutingState
from pemt_fast.training.task_sampler import TaskSampler

ROWS = 8


def dataset():
    inputs = tiny_inputs("t5", ROWS // 2)
    rows = [{name: t[b].tolist() for name, t in inputs.items()} for b in range(ROWS // 2)] * 2
    return [{**row, "task_ids": b % TASKS} for b, row in enumerate(rows)]


def train(model, folder, task_temperature=None, **options):
    arguments = Seq2SeqTrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-3,
        report_to=[], save_steps=4, use_cpu=True, weight_decay=0.01, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = pemt_fast.AdapterTrainer(
        model, arguments, train_dataset=dataset(), task_temperature=task_temperature
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["poly", "c-poly", "lora"])
def test_the_trainer_trains_routers_at_their_own_rate(method, tmp_path):
    model = adapted(method)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = train(model, tmp_path)
    rates = {g["initial_lr"]: g for g in trainer.optimizer.param_groups if g["params"]}
    routers = {id(p) for p in model.router_parameters()}
    if method == "lora":
        assert rates.keys() == {1e-3} and not routers
    else:
        assert rates.keys() == {1e-3, 0.1}
        assert {id(p) for p in rates[0.1]["params"]} == routers
        assert rates[0.1]["weight_decay"] == 0.0 and rates[1e-3]["weight_decay"] == 0.01
    moved = {
        n for n, p in model.named_parameters() if n in before and not torch.equal(before[n], p)
    }
    assert moved == before.keys()
    saved = load_file(tmp_path / "checkpoint-4" / "pemt_fast_model.safetensors")
    assert saved.keys() == model.adapter_state_dict().keys()
    groups = model.parameter_groups(1e-3, weight_decay=0.01)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == (
        [(1e-3, 0.01)] if method == "lora" else [(1e-3, 0.01), (0.1, 0.0)]
    )
    assert sum(len(g["params"]) for g in groups) == len(before)


# --- batches of several tasks --------------------------------------------------------------------

SIZES = (800, 150, 50)
IDS = [task for task, size in enumerate(SIZES) for _ in range(size)]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e6])
def test_tasks_are_drawn_at_a_temperature(temperature):
    sampler = TaskSampler(IDS, temperature=temperature, num_samples=20_000)
    found = torch.bincount(torch.tensor([IDS[i] for i in sampler])) / 20_000
    expected = torch.tensor([float(size) ** (1 / temperature) for size in SIZES])
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.015)
    assert len(sampler) == 20_000 and len(TaskSampler(IDS)) == len(IDS)


def test_no_example_comes_again_before_all_of_its_task_came():
    drawn = [i for i in TaskSampler(IDS, temperature=1e6) if IDS[i] == 2]
    assert len(drawn) > 2 * SIZES[2]
    for start in range(0, len(drawn) - SIZES[2], SIZES[2]):
        assert len(set(drawn[start : start + SIZES[2]])) == SIZES[2]


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed=0, epoch=0):
        sampler = TaskSampler(IDS, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order() == order()
    assert order() != order(epoch=1) and order() != order(seed=1)


def test_bad_samplers():
    with pytest.raises(ValueError, match="temperature must be at least 1, got 0.5"):
        TaskSampler(IDS, temperature=0.5)
    with pytest.raises(ValueError, match="at least one example"):
        TaskSampler([])


def test_the_trainer_mixes_tasks(tmp_path):
    trainer = train(adapted("poly"), tmp_path, task_temperature=10.0)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, TaskSampler) and len(sampler) == ROWS


# --- tasks that need skills of their own ---------------------------------------------------------

T, D, H, R = 8, 32, 24, 2


def wanted():
    """A rank-2 change that all tasks share and one per task, in directions of their own."""
    generator = torch.Generator().manual_seed(0)
    rows, _ = torch.linalg.qr(torch.randn(D, D, generator=generator))
    columns, _ = torch.linalg.qr(torch.randn(H, H, generator=generator))
    parts = [columns[:, R * k : R * k + R] @ rows[R * k : R * k + R] for k in range(T + 1)]
    return torch.stack([parts[0] + own for own in parts[1:]])  # [T, H, D]


def fit(config):
    """Mean squared error per task and token after training on all tasks at once."""
    torch.manual_seed(1)
    base, routing, changes = nn.Linear(D, H, bias=False), Routing(), wanted()
    base.requires_grad_(False)
    layer = config.wrap(base, routing)
    fast = [p for n, p in layer.named_parameters() if "router" in n and p.requires_grad]
    slow = [p for n, p in layer.named_parameters() if "router" not in n and p.requires_grad]
    groups = [{"params": slow, "lr": 2e-2}, *([{"params": fast, "lr": 0.1}] if fast else [])]
    optimizer = torch.optim.Adam(groups)
    task_ids = torch.arange(T)
    generator = torch.Generator().manual_seed(2)

    def error(tokens):
        x = torch.randn(T, tokens, D, generator=generator)
        target = base(x) + torch.einsum("tsd,thd->tsh", x, changes)
        with routing.use(RoutingState(task_ids=task_ids)):
            return (layer(x) - target).square().sum(-1).mean()

    for _ in range(600):
        optimizer.zero_grad()
        error(16).backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        return float(error(2000)), sum(p.numel() for p in slow)


def test_c_poly_learns_what_its_rivals_cannot():
    """By construction: x ~ N(0, 1), so an error is the squared norm of what is missing.

    Without task ids the best change is the mean over the tasks; it misses `R·(1 − 1/T)`. The tasks
    need 18 directions, 2 of which they share. Four skills of rank 2 span 8: Poly and MoE-LoRA miss
    at least 10 of the tasks' own, each of a squared norm of 1.
    """
    c_poly, size = fit(pemt_fast.CPolyConfig(T, num_common=3, num_specific=1, r=R))
    assert c_poly < 0.05
    lora, lora_size = fit(pemt_fast.LoraConfig(r=(3 + T) * R, alpha=(3 + T) * R))
    assert lora_size >= size and lora > 0.95 * R * (1 - 1 / T)
    poly, _ = fit(pemt_fast.PolyConfig(T, num_skills=4, r=R))
    moe, _ = fit(pemt_fast.MoeLoraConfig(T, num_experts=4, r=4 * R, alpha=4.0 * R))
    bound = (
        2 * T - 6
    ) / T  # of the 16 directions of single tasks 6 more fit beside the shared ones
    assert poly > 0.95 * bound and moe > 0.95 * bound
    assert min(lora, poly, moe) > 10 * c_poly
