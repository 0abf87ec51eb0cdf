"""What must also hold on a CUDA device: `skill_mixture`, and the methods on linear layers.

All of them are skipped where there is no such device. `make test-gpu` runs them.
"""

import pytest
import torch
from gpu_cases import DEVICE, IMPLS
from linear_models import METHODS, MODELS, adapted, tiny_inputs

from pemt_fast.ops.skill_mixture import skill_mixture

pytestmark = pytest.mark.gpu
TASK_IDS = [2, 0, 1, 0]
DTYPES = {
    "f32": (torch.float32, 1e-5),
    "bf16": (torch.bfloat16, 2e-2),
    "f16": (torch.float16, 3e-3),
}

# B, S, M, P, K, R, D, H; K = 0: factors of the tasks themselves.
SKILLS = {
    "poly": (8, 33, 5, 1, 4, 8, 64, 96),
    "mhr": (8, 33, 5, 4, 8, 16, 64, 96),
    "many": (16, 1, 100, 1, 103, 2, 64, 96),
    "few-tasks": (32, 9, 2, 2, 16, 4, 64, 96),
    "one-task": (3, 40, 1, 1, 4, 8, 64, 96),
    "factors": (8, 33, 5, 0, 0, 8, 64, 96),
}


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """What `auto` means for every module of a model."""
    monkeypatch.setenv("PEMT_FAST_IMPL", request.param)
    return request.param


def skill_gradients(case, dtype, device, impl):
    B, S, M, P, K, R, D, H = SKILLS[case]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(DTYPES["bf16"][0]).to(device, dtype)

    skills = (P, K) if P else (M,)
    parts = max(P, 1)
    tensors = {
        "x": draw(B, S, D), "mixing": draw(M, P, K, scale=K**-0.5) if P else None,
        "a": draw(*skills, R, D // parts, scale=D**-0.5),
        "b": draw(*skills, R, H // parts, scale=R**-0.5), "base": draw(B, S, H),
    }  # fmt: skip
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_()
    task_ids = (torch.arange(B) * 7 % M).to(device)
    out = skill_mixture(**tensors, task_ids=task_ids, scale=0.3, impl=impl)
    leaves = {name: t for name, t in tensors.items() if t is not None}
    grads = torch.autograd.grad(out, tuple(leaves.values()), draw(B, S, H))
    named = zip(leaves, grads, strict=True)
    return {"out": out.detach(), **{f"d_{name}": grad for name, grad in named}}


@pytest.mark.parametrize("case", SKILLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_skill_mixture_equals_the_reference(dtype, case):
    kind, bound = DTYPES[dtype]
    found = skill_gradients(case, kind, DEVICE, "torch")
    exact = skill_gradients(case, torch.float64, "cpu", "reference")
    for name, expected in exact.items():
        error = (found[name].cpu().double() - expected).norm() / expected.norm()
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", SKILLS)
def test_skill_mixture_gives_the_same_bits_twice(case):
    first, second = (skill_gradients(case, torch.bfloat16, DEVICE, "torch") for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_skill_mixture_does_not_wait_for_the_device():
    skill_gradients("poly", torch.float32, DEVICE, "torch")
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = torch.randn(4, 5, 16, device=DEVICE, requires_grad=True)
        mixing, a = torch.rand(3, 4, device=DEVICE), torch.randn(4, 2, 16, device=DEVICE)
        b = torch.randn(4, 2, 8, device=DEVICE)
        ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        skill_mixture(x, mixing, a, b, task_ids=ids).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_methods_equal_the_cpu(kind, method, impl):
    inputs = tiny_inputs(kind)

    def run(device):
        model = adapted(method, kind).to(device)
        moved = {name: t.to(device) for name, t in inputs.items()}
        out = model(**moved, task_ids=TASK_IDS)
        out.loss.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        return out.logits.detach().cpu(), grads

    logits, grads = run(DEVICE)
    exact_logits, exact = run("cpu")
    torch.testing.assert_close(logits, exact_logits, rtol=1e-4, atol=1e-4)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["poly", "mhr", "c-poly", "mtl-lora", "moe-lora"])
def test_generation_of_mixed_tasks(method, beams, impl):
    """As one task at a time."""
    model = adapted(method).to(DEVICE)
    inputs = {k: t.to(DEVICE) for k, t in tiny_inputs("t5").items() if k != "labels"}
    options = {"max_new_tokens": 6, "num_beams": beams, "suppress_tokens": [0, 1]}
    mixed = model.generate(**inputs, task_ids=TASK_IDS, **options)
    for row, task in enumerate(TASK_IDS):
        alone = model.generate(**inputs, task_ids=[task] * 4, **options)
        assert torch.equal(mixed[row], alone[row])
