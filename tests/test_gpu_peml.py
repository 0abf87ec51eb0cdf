"""What must also hold on a CUDA device: PEML's prefix attention, its search, and a linear inside
`skill_mixture`.

All of them are skipped where there is no such device. `make test-gpu` runs them.
"""

import pytest
import torch
from gpu_cases import DEVICE
from linear_models import MODELS, tiny_inputs, tiny_model
from skill_inputs import make_skills
from t5_factory import randomise

import pemt_fast

pytestmark = pytest.mark.gpu
STAGES = ("searched", "discretised", "materialised")
every_model = pytest.mark.parametrize("kind", MODELS)
every_stage = pytest.mark.parametrize("stage", STAGES)


def peml(kind, stage, device, implementation="sdpa"):
    """The same values on every device."""
    torch.manual_seed(1)
    base = tiny_model(kind)
    base.set_attn_implementation(implementation)
    config = pemt_fast.PemlConfig(r=2, prefix_length=5, prefix_width=8, prefix_depth=2)
    model = randomise(pemt_fast.get_model(base, config), scale=0.1)
    if stage != "searched":
        model.discretise()
    if stage == "materialised":
        model.materialise()
    return model.to(device)


def inputs(kind, device):
    return {name: t.to(device) for name, t in tiny_inputs(kind).items()}


def results(model, batch):
    out = model.train()(**batch)
    out.loss.backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach().cpu(), **grads}


@every_stage
@every_model
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_the_cpu(implementation, kind, stage):
    found = results(peml(kind, stage, DEVICE, implementation), inputs(kind, DEVICE))
    exact = results(peml(kind, stage, "cpu", implementation).double(), inputs(kind, "cpu"))
    for name, expected in exact.items():
        error = (found[name].double() - expected).norm()
        assert error < 1e-4 * expected.norm() + 1e-7, f"{name}: {error:.1e}"


@every_stage
@every_model
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "static"],
)
def test_generation_equals_the_cpu(options, kind, stage):
    made = []
    for device in (DEVICE, "cpu"):
        batch = inputs(kind, device)
        model = peml(kind, stage, device)
        given = options if device == DEVICE or "num_beams" in options else {}
        ids = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, **given
        )
        made.append(ids.cpu())
    assert torch.equal(*made)


@every_stage
@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision(dtype, kind, stage):
    found = results(peml(kind, stage, DEVICE).to(dtype), inputs(kind, DEVICE))
    exact = results(peml(kind, stage, "cpu"), inputs(kind, "cpu"))
    error = (found["logits"].float() - exact["logits"]).norm() / exact["logits"].norm()
    assert error < 0.1
    assert all(bool(t.isfinite().all()) for t in found.values())


@every_model
def test_a_search_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    model, batch = peml(kind, "searched", DEVICE), inputs(kind, DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    for progress in (0.0, 1.0):
        model.search_at(progress)
        torch.testing.assert_close(
            compiled(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_linear_inside_skill_mixture(dtype):
    given = make_skills(8, 33, M=5, P=2, K=8, R=4, D=64, H=96, linear=True, dtype=dtype)
    exact = given.to(torch.float64).gradients(impl="reference")
    names = {**given.tensors(), "grad_out": given.grad_out, "task_ids": given.task_ids}
    moved = given.replace(
        **{n: t.detach().to(DEVICE).requires_grad_(t.requires_grad) for n, t in names.items()}
    )
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for name, found in moved.gradients().items():
        error = (found.cpu().double() - exact[name]).norm() / exact[name].norm()
        assert error < bound, f"{name}: {error:.1e}"
