"""`pemt-fast doctor` and what it enables, `pemt-fast tune` and what it changes."""

import json
import logging

import pytest
import torch
from implementations import INTERPRETED, needs_triton
from torch import nn

from pemt_fast import adapter_mixture, cli, doctor, tuning
from pemt_fast.ops import dispatch, triton_door, verified
from pemt_fast.testing import adapter_mixture_loop, assert_within_budget, make_inputs

pytestmark = [
    needs_triton,
    pytest.mark.skipif(
        not INTERPRETED, reason="pretends that the CPU is a GPU, in the interpreter"
    ),
]

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The CPU as a GPU about which nothing is known, and `auto` as it is on GPUs."""
    from pemt_fast.kernels import adapter_mixture as launcher
    from pemt_fast.kernels import configs

    def forget():
        for cached in (verified.verified_dtypes, verified._log_once, configs.device_facts):
            cached.cache_clear()
        triton_door.CALLS.clear()
        launcher.PLANS.clear()

    monkeypatch.setenv("PEMT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "AUTO_TABLE", {"cpu": "triton"})
    monkeypatch.setattr(dispatch, "CPU_KERNELS_ARE_FAST", False)
    forget()
    yield
    forget()


def run(monkeypatch, dtypes=(torch.float32,)):
    monkeypatch.setattr(doctor, "DTYPES", dtypes)
    monkeypatch.setattr(doctor, "IMPLS", ("triton",))
    return doctor.doctor([CPU])


def test_auto_takes_what_passed(gpu, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, logger="pemt_fast"):
        assert [dispatch.auto_impl(CPU, torch.float32) for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records] == [
        "impl='auto' means 'torch' on cpu: with these versions the kernels of impl='triton' have "
        "not been compared with the reference there. `pemt-fast doctor` does that and enables them"
    ]
    (finding,) = run(monkeypatch)
    assert finding.passed and 0 < finding.worst <= 1 and not finding.reason
    assert dispatch.auto_impl(CPU, torch.float32) == "triton"
    assert dispatch.auto_impl(CPU, torch.bfloat16) == "torch"
    verified.verified_dtypes.cache_clear()  # another process
    assert dispatch.auto_impl(CPU, torch.float32) == "triton"


@pytest.mark.parametrize("what", ["forward", "backward", "door", "loss"])
def test_wrong_kernels_are_found(gpu, monkeypatch, what):
    from pemt_fast.ops import triton_backend

    if what == "loss":
        from pemt_fast.kernels import sparsity_loss

        rows = sparsity_loss.sparsity_loss_rows
        monkeypatch.setattr(
            sparsity_loss, "sparsity_loss_rows", lambda *a: (rows(*a)[0] * 1.01, rows(*a)[1])
        )
    elif what == "door":
        make = triton_backend.forward_call

        def wrong(*args):
            call = make(*args)
            return lambda *tensors: call(*tensors) * 1.01

        monkeypatch.setattr(triton_backend, "forward_call", wrong)
    elif what == "forward":
        right = triton_backend.forward
        monkeypatch.setattr(
            triton_backend, "forward", lambda *a: (right(*a)[0] * 1.01, *right(*a)[1:])
        )
    else:
        right = triton_backend.backward
        monkeypatch.setattr(
            triton_backend, "backward", lambda *a: right(*a)._replace(d_gate=right(*a)[1] * 1.01)
        )
    (finding,) = run(monkeypatch)
    assert not finding.passed
    assert "exceeds the budget" in finding.reason
    assert dispatch.auto_impl(CPU, torch.float32) == "torch"


def test_a_crash_is_a_finding_and_withdraws(gpu, monkeypatch):
    from pemt_fast.ops import triton_backend

    verified.remember("triton", CPU, [torch.float32])

    def crash(*args):
        raise RuntimeError("ptxas died\nin line 2")

    monkeypatch.setattr(triton_backend, "forward", crash)
    (finding,) = run(monkeypatch)
    assert (finding.passed, finding.reason) == (False, "RuntimeError: ptxas died")
    assert dispatch.auto_impl(CPU, torch.float32) == "torch"


def test_other_versions_have_to_pass_again(gpu, monkeypatch):
    from pemt_fast.kernels import cache

    verified.remember("triton", CPU, [torch.float32])
    monkeypatch.setattr(cache, "identity", lambda device: {"kernels": "changed"})
    verified.verified_dtypes.cache_clear()
    assert dispatch.auto_impl(CPU, torch.float32) == "torch"


def test_a_broken_file_is_named_and_not_used(gpu, tmp_path, caplog):
    (tmp_path / "verified.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger="pemt_fast"):
        assert dispatch.auto_impl(CPU, torch.float32) == "torch"
    assert "verified.json cannot be read and is not used" in caplog.text
    verified.remember("triton", CPU, [torch.float32])
    assert dispatch.auto_impl(CPU, torch.float32) == "triton"


def test_compiled_calls_know_what_passed(gpu):
    class Mixture(nn.Module):
        def forward(self, x, gate, w_down, w_up):
            return adapter_mixture(x, gate, w_down, w_up, activation="relu")

    inputs = make_inputs(
        2, 5, E=2, D=16, R=8, H=16, bias=False, base=False, requires_grad=False, activation="relu"
    )  # fmt: skip
    tensors = (inputs.x, inputs.gate, inputs.w_down, inputs.w_up)
    for dtypes, impl in (([], "torch"), ([torch.float32], "triton")):
        verified.remember("triton", CPU, dtypes)
        torch._dynamo.reset()
        seen = []

        def backend(graph, _, seen=seen):
            seen.extend(node.args for node in graph.graph.nodes if "pemt_fast" in str(node.target))
            return graph

        out = torch.compile(Mixture(), fullgraph=True, backend=backend)(*tensors)
        assert [arguments[9] for arguments in seen] == [impl]
        assert_within_budget(
            "out", out, inputs.to(torch.float64).call(adapter_mixture, impl="reference"),
            inputs.call(adapter_mixture_loop),
        )  # fmt: skip


def test_command(gpu, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    monkeypatch.setattr(doctor, "IMPLS", ("triton",))
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--device", "cpu", "--json"])
    assert ended.value.code == 0
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["impl"], finding["dtype"], finding["passed"]) == ("triton", "float32", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--device", "gpu"], "--device must be cpu, cuda or cuda:0, got 'gpu'"),
        (["tune", "--dtype", "int8"], "--dtype must be among float32, bfloat16, float16, got int8"),
        (["tune"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


# --- tune ----------------------------------------------------------------------------------------


def test_tuned_rows_are_taken(gpu, monkeypatch):
    from pemt_fast.kernels import configs

    wanted = {
        (False, 16): configs.Fused(16, 16), (False, 48): configs.Pair(*[configs.Tile(16, 16)] * 2),
        (True, 16): configs.Fused(16, 16, BH=32), (True, 48): configs.Fused(32, 32),
    }  # fmt: skip
    monkeypatch.setattr(tuning, "WIDTH", 32)
    monkeypatch.setattr(configs, "MORE_SUMS", (configs.Tile(16, 32, 16),))
    monkeypatch.setattr(
        tuning, "_walk_choices", lambda size, way, N: [wanted[way, N], *shipped(size, way, N)]
    )

    def shipped(size, way, N):
        return [configs.choose("hopper", size, way, N, T) for T in (8, 40)]

    calls = []

    def measure(function):
        function()  # what is measured has to run
        calls.append(function)
        # The first choice of each size is the fastest one.
        return 10.0 + len(calls)

    timings = []
    path = tuning.tune(
        CPU, [torch.float32], units=(16, 48), tokens=(8, 40), measure=measure, report=timings.append
    )
    assert path.name == "tuned.json"
    assert {(t.way, t.N, t.T) for t in timings} == {
        (way, N, T) for way in ("forward", "backward", "weights") for N in (16, 48) for T in (8, 40)
    }
    kind, _ = configs.device_facts(CPU)
    assert kind == "hopper, tuned on cpu"
    # Within 3 % the shipped choice stays.
    for (way, N), choice in wanted.items():
        for T in (1, 8, 9, 1000):
            assert configs.choose(kind, 4, way, N, T) in (choice, *shipped(4, way, N))
    assert isinstance(configs.choose_pair(kind, 4, True, 48, 9), configs.Pair)
    assert configs.choose(kind, 2, False, 48, 9) == configs.choose("hopper", 2, False, 48, 9)
    inputs = make_inputs(3, 7, E=2, D=24, R=8, H=20)
    actual = inputs.gradients(impl="triton")
    exact, eager = (
        inputs.to(torch.float64).gradients(impl="reference"),
        inputs.gradients(adapter_mixture_loop),
    )
    for name, result in actual.items():
        assert_within_budget(name, result, exact[name], eager[name])


def test_tuning_prefers_what_is_clearly_faster(gpu, monkeypatch):
    from pemt_fast.kernels import configs

    shipped, slower, faster = (configs.Fused(BM, 16) for BM in (16, 32, 64))
    times = {shipped: 100.0, slower: 98.0, faster: 90.0}

    def fastest(choices):
        return tuning._fastest(choices, shipped, lambda choice: choice, times.__getitem__)[0]

    assert fastest([shipped, slower]) is shipped
    assert fastest([shipped, slower, faster]) is faster
    best = tuning._fastest(["broken", shipped], shipped, lambda c: c, times.__getitem__)
    assert best == (shipped, 100.0, 100.0, 2, 1)
    with pytest.raises(RuntimeError, match="shipped choice"):
        tuning._fastest([faster], shipped, lambda choice: choice, times.__getitem__)


def test_rows_survive_the_file():
    from pemt_fast.kernels import configs

    for key, rows in configs.TABLE.items():
        encoded = json.loads(json.dumps(configs.encode({key[1:]: rows})))
        assert configs._decode(encoded, configs._key(*key[1:])) == rows
    for (_, size), rows in configs.SUMS.items():
        encoded = json.loads(json.dumps(configs.encode({(size, None): rows})))
        assert configs._decode(encoded, configs._key(size, None)) == rows
