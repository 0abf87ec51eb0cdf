"""What must also hold on a CUDA device: models. The operator is in `test_gpu_*.py`.

All of them are skipped where there is no such device. `make test-gpu` runs them.
"""

import pytest
import torch
from golden_cases import load_case
from gpu_cases import DEVICE, IMPLS
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5

import pemt_fast
from pemt_fast import adapter_mixture
from pemt_fast.ops import dispatch
from pemt_fast.testing import make_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """What `auto` means for every module of a model."""
    monkeypatch.setenv("PEMT_FAST_IMPL", request.param)
    return request.param


def tiny_model(**changes):
    return randomise(pemt_fast.get_model(tiny_t5().to(DEVICE), pemt_config(**changes)))


def batch():
    return {name: tensor.to(DEVICE) for name, tensor in tiny_batch().items()}


def test_the_cpu_kernels_refuse():
    with pytest.raises(RuntimeError, match=f"it runs on cpu tensors, x is on {DEVICE}"):
        make_inputs(2, 5, device=DEVICE).call(adapter_mixture, impl="cpu")


def test_auto_is_what_dispatch_says():
    inputs = make_inputs(2, 5, device=DEVICE)
    expected = inputs.gradients(impl=dispatch.auto_impl(inputs.x.device, inputs.x.dtype))
    torch.testing.assert_close(inputs.gradients(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["A", "C"])
def test_published_outputs(impl, case):
    model, _, inputs, reference = load_case(case)
    out = model.to(DEVICE)(**{k: v.to(DEVICE) for k, v in inputs.items()})
    torch.testing.assert_close(out.logits.cpu(), reference["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss.cpu(), reference["total_loss"], rtol=1e-4, atol=1e-5)


def test_model_trains(impl, monkeypatch):
    """Loss and gradients are those of the reference."""

    def run(name):
        monkeypatch.setenv("PEMT_FAST_IMPL", name)
        model = tiny_model()
        loss = model(**batch()).loss
        loss.backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return loss.detach(), trained

    (loss, grads), (exact_loss, exact) = run(impl), run("reference")
    torch.testing.assert_close(loss, exact_loss, rtol=1e-4, atol=1e-5)
    assert grads.keys() == exact.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-3, atol=1e-5, msg=name)


def test_model_in_bfloat16_learns(impl):
    model = tiny_model().bfloat16()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    for _ in range(20):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_model_generates(impl, monkeypatch):
    model, inputs = tiny_model(), batch()

    def ids():
        return model.generate(
            inputs["input_ids"], inputs["attention_mask"], num_beams=4, max_length=8
        )

    found = ids()
    assert found.device.type == DEVICE
    monkeypatch.setenv("PEMT_FAST_IMPL", "reference")
    assert torch.equal(found, ids())
    assert model.unload().shared.weight.device.type == DEVICE


@pytest.mark.parametrize(("impl", "backend"), [("torch", "aot_eager"), ("triton", "inductor")])
def test_model_compiles(impl, backend):
    torch._dynamo.reset()
    model, inputs = tiny_model(impl=impl), batch()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["t", ["a", "b"]], ids=["one-target", "two-targets"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_with_a_captured_decoding_step(impl, targets, beams):
    """A static cache makes transformers compile the step into CUDA graphs."""
    model = tiny_model(target=targets)
    inputs = batch()
    call = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    call |= {"max_new_tokens": 8, "suppress_tokens": [0, 1], "num_beams": beams}
    for rows in ([0, 1, 0], [1, 1, 0]):
        tasks = {} if targets == "t" else {"task_ids": rows}
        expected = model.generate(**call, **tasks)
        found = model.generate(**call, **tasks, cache_implementation="static")
        assert torch.equal(found, expected)


def test_targets_of_a_mixed_batch(impl):
    model = tiny_model(target=["a", "b"])
    inputs = batch()
    with torch.no_grad():
        mixed = model(**inputs, task_ids=torch.tensor([1, 0, 1], device=DEVICE)).logits
        for k, rows in ((0, [1]), (1, [0, 2])):
            alone = model(**inputs, task_ids=[k] * 3).logits
            torch.testing.assert_close(mixed[rows], alone[rows], rtol=1e-4, atol=1e-5)
