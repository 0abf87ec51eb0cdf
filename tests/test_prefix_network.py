"""Operators by hand, the mixture, its schedule, and searches that have to find a planted one."""

import functools
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch

from pemt_fast.nn.prefix_network import (
    ConstantPrefix,
    Logits,
    MixedCell,
    PrefixNetwork,
    SearchedPrefix,
    SearchSchedule,
)
from pemt_fast.nn.prefix_operators import OPERATORS

# The modules of benchmarks/ import one another by name, as scripts beside each other do.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import planted  # noqa: E402

sys.path.remove(str(Path(__file__).parents[1] / "benchmarks"))

ALL = tuple(OPERATORS)
WIDTH, RANK, OUT = 6, 2, 10
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}
every_operator = pytest.mark.parametrize("name", ALL)


def made(name, *, width=WIDTH, rank=RANK):
    """An operator in float64 whose biases matter too."""
    operator = OPERATORS[name](width, rank).double()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return operator


def rows(length, width=WIDTH):
    return torch.randn(length, width, dtype=torch.float64)


# --- operators -----------------------------------------------------------------------------------


def affine(h, w, b):
    return torch.einsum("pi,oi->po", h, w) + b


def mlp(activation):
    return lambda op, h, seed: affine(activation(affine(h, op.w1, op.b1)), op.w2, op.b2)


def gated_by_hand(op, h, seed):
    value, gate = (affine(h, op.w[part], op.b[part]) for part in (slice(WIDTH), slice(WIDTH, None)))
    return value / (1 + torch.exp(-gate))


def convolution_by_hand(op, h, seed):
    half = op.w.shape[-1] // 2
    out = op.b.repeat(len(h), 1)
    for position in range(len(h)):
        for offset in range(-half, half + 1):
            if 0 <= position + offset < len(h):
                out[position] += op.w[:, :, offset + half] @ h[position + offset]
    return out


BY_HAND = {
    "identity": lambda op, h, seed: h,
    "skip": lambda op, h, seed: seed,
    "linear": lambda op, h, seed: affine(h, op.w, op.b),
    "low_rank": lambda op, h, seed: torch.einsum("pi,ri,or->po", h, op.a, op.b),
    "gated": gated_by_hand,
    "mlp_relu": mlp(lambda x: x * (x > 0)),
    "mlp_gelu": mlp(lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
    "mlp_silu": mlp(lambda x: x / (1 + torch.exp(-x))),
    "mlp_tanh": mlp(lambda x: 1 - 2 / (torch.exp(2 * x) + 1)),
    "conv3": convolution_by_hand,
    "conv5": convolution_by_hand,
    "none": lambda op, h, seed: torch.zeros(h.shape, dtype=h.dtype),
}


@every_operator
@pytest.mark.parametrize("length", [1, 4, 9], ids="P{}".format)  # 1 and 4: less than conv5 sees
def test_operator_is_its_formula(name, length):
    operator, h, seed = made(name), rows(length), rows(length)
    with torch.no_grad():
        found, expected = operator(h, seed), BY_HAND[name](operator, h, seed)
    assert found.shape == (length, WIDTH)
    torch.testing.assert_close(found, expected, **FLOAT64)


@every_operator
def test_an_operator_can_be_pickled(name):
    operator, h, seed = made(name), rows(4), rows(4)
    again = pickle.loads(pickle.dumps(operator))
    assert torch.equal(again(h, seed), operator(h, seed))


@pytest.mark.parametrize(("name", "reach"), [("conv3", 1), ("conv5", 2)])
def test_a_convolution_sees_its_neighbours_and_no_more(name, reach):
    operator, h = made(name), rows(9).requires_grad_()
    (seen,) = torch.autograd.grad(operator(h, h.detach())[4].sum(), h)
    positions = seen.abs().sum(-1).nonzero().flatten().tolist()
    assert positions == list(range(4 - reach, 4 + reach + 1))


WIDE, MANY = 64, 256
LINEAR_PARTS = {
    **{
        name: lambda op, h: [op(h, torch.zeros_like(h))]
        for name in ("linear", "low_rank", "conv3", "conv5")
    },
    "gated": lambda op, h: [h @ w.t() for w in op.w.chunk(2)],
    **{
        f"mlp_{name}": lambda op, h: [h @ op.w1.t(), h @ op.w2.t()]
        for name in ("relu", "gelu", "silu", "tanh")
    },
}


@pytest.mark.parametrize("name", LINEAR_PARTS)
def test_linear_parts_start_with_the_variance_of_their_input(name):
    operator, h = OPERATORS[name](WIDE, 32), 3 * torch.randn(MANY, WIDE)
    for part in LINEAR_PARTS[name](operator, h):
        ratio = float(part.detach().var() / h.var())
        assert 0.85 < ratio < 1.15  # measured: 0.97 to 1.04
    biases = [p for key, p in operator.named_parameters() if p.ndim == 1 and key.startswith("b")]
    assert len(biases) == (0 if name == "low_rank" else 2 if name.startswith("mlp") else 1)
    assert not any(bias.any() for bias in biases)


# --- the mixture and what steers it --------------------------------------------------------------


def test_a_mixed_cell_is_the_weighted_sum_of_all_operators():
    cell, h, seed = MixedCell(ALL, WIDTH, RANK).double(), rows(7), rows(7)
    weights = torch.randn(len(ALL), dtype=torch.float64).softmax(0)
    expected = sum(
        weight * BY_HAND[name](cell.operators[name], h, seed)
        for name, weight in zip(ALL, weights, strict=True)
    )
    torch.testing.assert_close(cell(h, seed, weights), expected, **FLOAT64)


def test_a_network_is_a_chain_of_cells_and_a_projection():
    schedule = SearchSchedule((2.0, 0.5), 0.3)
    logits = Logits(2, ALL, schedule)
    network = PrefixNetwork(ALL, None, 2, WIDTH, RANK, OUT, out_std=1.0, logits=logits).double()
    seed = rows(7)
    with torch.no_grad():
        logits.alpha.normal_()
    schedule.at(0.25)
    h, alphas = seed, logits.alpha.detach().clone()
    alphas[0, ALL.index("skip")] = -torch.inf  # the identity in the first cell
    for cell, alpha in zip(network.cells, alphas, strict=True):
        weights = (alpha / (2.0 ** (1 - 2 * 0.25))).softmax(0)
        none = weights[ALL.index("none")].clone()
        weights *= (1 - 0.75 * none) / (1 - none)
        weights[ALL.index("none")] = 0.75 * none
        h = cell(h, seed, weights)
    # The temperature is a float32 number at the moment it is set.
    torch.testing.assert_close(network(seed), h @ network.out.t(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("progress", "temperature", "entropy_weight"),
    [(0.0, 4.0, 0.0), (0.25, 2.0, 0.05), (0.5, 1.0, 0.1), (1.0, 0.25, 0.2)],
)
def test_temperature_falls_by_a_factor_and_entropy_weight_rises_by_a_sum(
    progress, temperature, entropy_weight
):
    schedule = SearchSchedule((4.0, 0.25), 0.2)
    schedule.at(progress)
    assert float(schedule.temperature) == pytest.approx(temperature, rel=1e-6)
    assert float(schedule.entropy_weight) == pytest.approx(entropy_weight, rel=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_none_fades_out_in_favour_of_all_others(progress):
    logits = Logits(2, ALL, SearchSchedule((1.0, 1.0), 0.1))
    with torch.no_grad():
        logits.alpha.normal_()
        logits.alpha[0, ALL.index("none")] = 8.0
    logits.schedule.at(progress)
    alpha = logits.alpha.detach().double()
    alpha[0, ALL.index("skip")] = -torch.inf  # the identity in the first cell
    whole, none = alpha.softmax(-1), ALL.index("none")
    expected = whole * (1 - (1 - progress) * whole[:, none:]) / (1 - whole[:, none:])
    expected[:, none] = (1 - progress) * whole[:, none]
    found = logits.weights().detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2).double(), rtol=1e-6, atol=1e-6)
    alone = Logits(1, ("none",), logits.schedule)
    assert alone.weights().tolist() == [[1.0]]


def test_entropy_is_of_what_can_be_decided_for():
    with_none, without = (
        Logits(1, names, SearchSchedule((1.0, 0.1), 0.1)) for names in (ALL, ALL[:-1])
    )
    with torch.no_grad():
        without.alpha.normal_()
        with_none.alpha[:, :-1] = without.alpha
        with_none.alpha[:, -1] = 3.0
    assert ALL[-1] == "none"
    torch.testing.assert_close(with_none.entropy(), without.entropy())


def test_a_schedule_starts_at_its_start_and_is_not_saved():
    schedule = SearchSchedule((4.0, 0.25), 0.2)
    assert (float(schedule.temperature), float(schedule.entropy_weight)) == (4.0, 0.0)
    assert float(schedule.none_share) == 1.0
    assert not schedule.state_dict()
    assert list(Logits(2, ALL, schedule).state_dict()) == ["alpha"]


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
    ids=str,
)
def test_weights_are_a_softmax_in_float32_or_more(dtype, wide):
    logits = Logits(2, ALL[2:7], SearchSchedule((0.5, 0.5), 0.0))
    assert torch.equal(logits.weights(), torch.full((2, 5), 0.2))
    logits.alpha = torch.nn.Parameter(torch.randn(2, 5).to(dtype))
    powers = torch.exp(logits.alpha.detach().double() / 0.5)
    assert logits.weights().dtype == wide
    expected = (powers / powers.sum(-1, keepdim=True)).to(wide)
    torch.testing.assert_close(logits.weights().detach(), expected)


def test_entropy_is_a_part_of_its_largest_value():
    logits = Logits(2, ALL, SearchSchedule((1.0, 0.1), 0.1))
    assert logits.entropy().item() == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        logits.alpha[0, 3] = 200.0
    assert logits.entropy().item() == pytest.approx(0.5, abs=1e-6)
    with torch.no_grad():
        logits.alpha[1, 0] = 200.0
    assert logits.entropy().item() == 0.0
    assert Logits(1, ("linear",), logits.schedule).entropy().item() == 0.0


def test_a_decided_cell_has_a_gradient():
    """The others' weights underflow to 0 at α / τ apart by more than 104."""
    logits = Logits(1, ALL[2:5], SearchSchedule((1.0, 0.1), 0.1))
    with torch.no_grad():
        logits.alpha[0, 0] = 11.0
    logits.schedule.at(1.0)
    logits.entropy().backward()
    assert torch.equal(logits.alpha.grad, torch.zeros(1, 3))


def test_none_is_decided_for_only_where_it_is_alone():
    alpha = torch.tensor([[1.0, 2.0, 9.0], [0.0, 0.0, 0.0], [3.0, -1.0, 2.0]])
    schedule = SearchSchedule((1.0, 0.1), 0.1)

    def decided(*operators):
        logits = Logits(3, operators, schedule)
        logits.alpha = torch.nn.Parameter(alpha.clone())
        found = logits.decided()
        assert torch.equal(logits.alpha, alpha)
        return found

    assert decided("skip", "linear", "none") == ("linear", "skip", "skip")
    assert decided("skip", "linear", "conv3") == ("conv3", "skip", "skip")
    assert decided("none", "linear", "conv3") == ("conv3", "linear", "conv3")
    assert Logits(2, ("none",), schedule).decided() == ("none", "none")


def test_skip_is_closed_where_it_is_the_identity():
    schedule = SearchSchedule((1.0, 0.1), 0.1)
    logits = Logits(2, ("skip", "identity", "linear"), schedule)
    with torch.no_grad():
        logits.alpha[:, 0] = 5.0
    assert logits.decided() == ("identity", "skip")
    torch.testing.assert_close(logits.weights()[0].detach(), torch.tensor([0.0, 0.5, 0.5]))
    assert logits.weights()[1, 0] > 0.9
    logits.entropy().backward()
    assert bool(logits.alpha.grad.isfinite().all()) and logits.alpha.grad[0, 0] == 0
    alone = Logits(1, ("skip", "linear"), schedule)
    assert alone.decided() == ("skip",)
    torch.testing.assert_close(alone.weights().detach(), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("chosen", [("conv3", "skip", "gated"), ("mlp_gelu", "low_rank", "linear")])
def test_taken_operators_are_those_of_the_searched_network(chosen):
    logits = Logits(3, ALL, SearchSchedule((1e-3, 1e-3), 0.0))
    searched = PrefixNetwork(ALL, None, 3, WIDTH, RANK, OUT, out_std=1.0, logits=logits).double()
    with torch.no_grad():
        for parameter in searched.parameters():
            parameter.normal_()
        logits.alpha.zero_()
        for cell, name in enumerate(chosen):
            logits.alpha[cell, ALL.index(name)] = 1.0
    taken = PrefixNetwork(ALL, chosen, 3, WIDTH, RANK, OUT, out_std=1.0).double()
    taken.take(searched, logits.decided())
    seed = rows(7)
    expected = searched(seed).detach()
    torch.testing.assert_close(taken(seed), expected, **FLOAT64)
    assert taken.logits is None and not any("alpha" in name for name in taken.state_dict())
    with torch.no_grad():  # copies: what becomes of them is nothing to the searched network
        for parameter in taken.parameters():
            parameter.zero_()
    assert torch.equal(searched(seed), expected)


@pytest.mark.parametrize("std", [0.1, 2.0])
def test_keys_and_values_start_with_their_standard_deviation(std):
    network = PrefixNetwork((), ("identity",), 1, WIDE, RANK, MANY, out_std=std)
    assert SearchedPrefix(network, MANY, WIDE)().std().item() == pytest.approx(std, rel=0.1)
    assert ConstantPrefix(MANY, WIDE, std)().std().item() == pytest.approx(std, rel=0.1)


def test_prefixes_of_one_network_differ_by_their_seeds():
    network = PrefixNetwork((), ("conv3",), 1, WIDTH, RANK, OUT, out_std=1.0)
    first, second = (SearchedPrefix(network, 5, WIDTH) for _ in range(2))
    assert first().shape == (5, OUT) and not torch.allclose(first(), second())
    with torch.no_grad():
        second.seed.copy_(first.seed)
    assert torch.equal(first(), second())


# --- planted operators ---------------------------------------------------------------------------


def every_planted(test):
    seeds = pytest.mark.parametrize("seed", planted.SEEDS)
    return pytest.mark.slow(pytest.mark.parametrize("name", planted.PLANTED)(seeds(test)))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def search(name, seed):
    return planted.search(name, seed)


@every_planted
def test_the_planted_operator_is_found(name, seed, one_thread):
    found = search(name, seed)
    assert found.operators == (name,)
    assert found.loss < 0.03  # measured: at most 0.0161


@every_planted
def test_the_operator_found_learns_anew_what_the_mixture_learned(name, seed, one_thread):
    found = search(name, seed)
    torch.manual_seed(seed + 50)
    anew = planted.learn(planted.network_of(found.operators), found.seeds, found.target)
    assert anew <= found.loss + 0.03  # measured: at most 0.0183


@every_planted
def test_the_operator_found_is_all_that_is_left_of_the_mixture(name, seed, one_thread):
    found = search(name, seed)
    with torch.no_grad():
        loss = planted.loss_of(planted.taken(found), found.seeds, found.target, slice(None))
    assert float(loss) <= found.loss + 0.05  # measured: at most 0.0313


@every_planted
def test_the_operator_found_goes_on_from_its_values(name, seed, one_thread):
    found = search(name, seed)
    onward = planted.learn(planted.taken(found), found.seeds, found.target)
    assert onward <= found.loss + 0.01  # measured: at most 0.00001
