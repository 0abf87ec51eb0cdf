"""What must also hold on a CUDA device; skipped where there is none."""

import pytest
import torch
from golden_cases import load_case
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5

import pemt_fast
from pemt_fast import adapter_mixture
from pemt_fast.testing import assert_matches_oracle, make_inputs

pytestmark = pytest.mark.gpu

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
IMPLS = ["torch", "triton"]
DEVICE = "cuda"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["[E]", "[B, E]", "[B, S, E]"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu"])
def test_operator_within_budget(impl, dtype, gate, activation):
    def make(seed):
        return make_inputs(
            2, 63, E=6, D=96, R=24, H=60, gate=gate, dtype=DTYPES[dtype], activation=activation,
            seed=seed, device=DEVICE,
        )  # fmt: skip

    assert_matches_oracle(make, impl=impl)


def test_the_cpu_kernels_refuse_and_auto_takes_torch():
    inputs = make_inputs(2, 5, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"it runs on cpu tensors, x is on {DEVICE}"):
        inputs.call(adapter_mixture, impl="cpu")
    torch.testing.assert_close(inputs.gradients(), inputs.gradients(impl="torch"), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_captured_in_a_graph(impl):
    """No host synchronisation; a replay sees changed inputs, zero gates included."""
    inputs = make_inputs(
        2, 16, E=3, D=64, R=8, H=48, dtype=torch.bfloat16, requires_grad=False, device=DEVICE
    )
    tensors = (inputs.x, inputs.gate, inputs.w_down, inputs.w_up)

    def run():
        return adapter_mixture(*tensors, activation="relu", base=inputs.base, impl=impl)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for change in (lambda: inputs.x.normal_(), lambda: inputs.gate[:, 1].zero_()):
        change()
        graph.replay()
        torch.testing.assert_close(out, run())


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_bit_identical(impl):
    def gradients():
        inputs = make_inputs(4, 257, E=6, D=768, R=64, H=768, dtype=torch.bfloat16, device=DEVICE)
        tensors = (inputs.x, inputs.gate, inputs.w_down, inputs.w_up)
        adapter_mixture(*tensors, activation="relu", impl=impl).sum().backward()
        return [t.grad for t in tensors]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", ["A", "C"])
def test_published_outputs(case):
    model, _, inputs, reference = load_case(case)
    out = model.to(DEVICE)(**{k: v.to(DEVICE) for k, v in inputs.items()})
    torch.testing.assert_close(out.logits.cpu(), reference["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss.cpu(), reference["total_loss"], rtol=1e-4, atol=1e-5)


def test_model_trains_generates_and_compiles():
    model = randomise(pemt_fast.get_model(tiny_t5().to(DEVICE), pemt_config()))
    batch = {k: v.to(DEVICE) for k, v in tiny_batch().items()}
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    ids = model.generate(batch["input_ids"], batch["attention_mask"], num_beams=4, max_length=8)
    assert ids.device.type == DEVICE
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-4, atol=1e-4)
    assert model.unload().shared.weight.device.type == DEVICE
