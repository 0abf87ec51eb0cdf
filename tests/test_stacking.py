"""`stack_weights`: the base and its adapters as one matrix, whatever happens to the modules."""

import copy
import io
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from t5_factory import pemt_config, randomise, tiny_batch, tiny_t5
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pemt_fast
from pemt_fast.nn import stacking
from pemt_fast.nn.mixture import AdapterMixture
from pemt_fast.nn.stacking import is_stacked, stack_weights, unstack_weights
from pemt_fast.ops import linear_mixture

D, H, RANKS = 12, 7, (2, 3)


class Tail(nn.Module):
    """A linear and a mixture beside it, as they stand in a model."""

    def __init__(self, *, stacked=True, base=None):
        super().__init__()
        torch.manual_seed(0)
        self.base = base or nn.Linear(D, H)
        self.mixture = AdapterMixture(D, H, RANKS, activation="gelu", bias=True)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        if stacked:
            assert stack_weights(self.base, self.mixture)

    @property
    def stacked(self):
        return is_stacked(self.base, self.mixture)

    def forward(self, x, impl="torch"):
        m = self.mixture
        gate = x.new_tensor([0.25, 0.75])
        return linear_mixture(
            x, self.base.weight, gate, m.w_down, m.w_up, m.b_down, m.b_up,
            activation=m.activation, bias=self.base.bias, impl=impl, ranks=m.ranks,
        )  # fmt: skip


@pytest.fixture
def tail():
    return Tail()


def assert_right(tail, **tolerances):
    """What comes out is what the values of the parameters say."""
    x = torch.randn(5, D, dtype=tail.base.weight.dtype)
    torch.testing.assert_close(tail(x), tail(x, impl="reference"), **tolerances)


def values(tail):
    return {name: tensor.clone() for name, tensor in tail.state_dict().items()}


def assert_equal_values(tail, expected):
    torch.testing.assert_close(tail.state_dict(), expected, rtol=0, atol=0)


def test_parameters_stay_the_same_objects_with_the_same_values():
    tail = Tail(stacked=False)
    before, parameters = values(tail), dict(tail.named_parameters())
    assert not tail.stacked
    assert stack_weights(tail.base, tail.mixture)
    assert tail.stacked
    after = dict(tail.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert not any(parameter.requires_grad for parameter in after.values())
    storage = tail.base.weight.untyped_storage()
    assert storage.data_ptr() == tail.mixture.w_down.untyped_storage().data_ptr()
    assert storage.nbytes() == tail.base.weight.nbytes + tail.mixture.w_down.nbytes
    assert_equal_values(tail, before)
    assert_right(tail)


def test_stacking_again_changes_nothing(tail):
    address = tail.base.weight.data_ptr()
    assert stack_weights(tail.base, tail.mixture)
    assert tail.base.weight.data_ptr() == address


def test_unstacking_gives_each_its_own_storage_and_the_same_bits(tail):
    before, parameters = values(tail), list(tail.parameters())
    unstack_weights(tail.base, tail.mixture)
    assert not tail.stacked
    for parameter in (tail.base.weight, tail.mixture.w_down):
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert all(a is b for a, b in zip(tail.parameters(), parameters, strict=True))
    assert_equal_values(tail, before)
    unstack_weights(tail.base, tail.mixture)
    assert_right(tail)
    assert stack_weights(tail.base, tail.mixture)


def test_training_either_of_them(tail):
    other = Tail(stacked=False)
    for module in (tail, other):
        module.base.weight.requires_grad_()
        module.mixture.w_down.requires_grad_()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.randn(5, D)).square().mean().backward()
            optimizer.step()
    assert tail.stacked
    torch.testing.assert_close(tail.state_dict(), other.state_dict())


# --- what happens to modules ---------------------------------------------------------------------


def test_loading_a_state_dict_writes_into_the_matrix(tail):
    new = Tail(stacked=False)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    tail.load_state_dict(new.state_dict())
    assert tail.stacked
    assert_equal_values(tail, values(new))
    assert_right(tail)


@pytest.mark.parametrize("which", ["base.weight", "mixture.w_down", "all"])
def test_assigning_a_state_dict_ends_it_and_stays_right(tail, which):
    expected = values(tail)
    names = expected if which == "all" else [which]
    new = {name: expected[name] + 1 for name in names}
    expected |= {name: tensor.clone() for name, tensor in new.items()}
    tail.load_state_dict(new, assign=True, strict=False)
    assert not tail.stacked
    assert_equal_values(tail, expected)
    assert_right(tail)
    assert not stack_weights(tail.base, tail.mixture)  # `new` looks at the same memory
    del new
    assert stack_weights(tail.base, tail.mixture)
    assert_equal_values(tail, expected)


def test_assigning_a_stacked_state_dict(tail):
    twin = Tail(stacked=False)
    twin.load_state_dict(tail.state_dict(), assign=True)
    assert_equal_values(twin, values(tail))
    assert_right(twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
def test_to_another_dtype_and_back(tail, dtype):
    tail.to(dtype)
    assert not tail.stacked
    assert_right(tail, **({"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {}))
    assert stack_weights(tail.base, tail.mixture)
    tail.float()
    assert stack_weights(tail.base, tail.mixture)
    assert_right(tail)


def test_to_another_device(tail):
    before = values(tail)
    tail.to("meta")
    assert not tail.stacked
    assert not stack_weights(tail.base, tail.mixture)
    tail.to_empty(device="cpu").load_state_dict(before)
    assert_right(tail)
    assert stack_weights(tail.base, tail.mixture)


def test_to_where_it_is(tail):
    tail.to("cpu", torch.float32)
    assert tail.stacked


def test_deepcopy(tail):
    twin = copy.deepcopy(tail)
    assert twin.base.weight.data_ptr() != tail.base.weight.data_ptr()
    with torch.no_grad():
        twin.base.weight.add_(1)
        twin.mixture.w_down.add_(1)
    assert_right(twin)
    assert_equal_values(tail, values(Tail(stacked=False)))
    assert stack_weights(twin.base, twin.mixture)
    assert_right(twin)


def test_pickle(tail):
    file = io.BytesIO()
    torch.save(tail, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert twin.stacked  # torch saves storages
    assert_equal_values(twin, values(tail))
    with torch.no_grad():
        twin.mixture.w_down.add_(1)
    assert_right(twin)


def test_torch_save_of_a_state_dict(tail):
    file = io.BytesIO()
    torch.save(tail.state_dict(), file)
    file.seek(0)
    twin = Tail()
    twin.load_state_dict(torch.load(file))
    assert twin.stacked
    assert_equal_values(twin, values(tail))


def test_safetensors(tail, tmp_path):
    save_file(tail.state_dict(), tmp_path / "stacked.safetensors")
    save_file(Tail(stacked=False).state_dict(), tmp_path / "apart.safetensors")
    saved, apart = ((tmp_path / f"{name}.safetensors") for name in ("stacked", "apart"))
    assert saved.read_bytes() == apart.read_bytes()
    twin = Tail()
    twin.load_state_dict(load_file(saved))
    assert twin.stacked
    assert_equal_values(twin, values(tail))
    save_file({"weight": tail.base.weight.detach()}, tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").stat().st_size < saved.stat().st_size / 2


def test_weights_of_safetensors_can_be_stacked(tail, tmp_path):
    save_file(tail.state_dict(), tmp_path / "model.safetensors")
    twin = Tail(stacked=False)
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert_right(twin)
    if stack_weights(twin.base, twin.mixture):
        assert_equal_values(twin, values(tail))


def test_t5_round_trip(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=D, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "apart")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == D]
    mixtures = [AdapterMixture(D, 16, RANKS, activation="relu", bias=False) for _ in layers]
    for layer, mixture in zip(layers, mixtures, strict=True):
        assert stack_weights(layer, mixture)
    model.save_pretrained(tmp_path / "stacked")
    files = [tmp_path / name / "model.safetensors" for name in ("apart", "stacked")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for loaded in (model, transformers.T5ForConditionalGeneration.from_pretrained(files[1].parent)):
        torch.testing.assert_close(loaded.state_dict(), before, rtol=0, atol=0)
    fresh = [m for m in loaded.modules() if isinstance(m, nn.Linear) and m.in_features == D]
    assert all(
        stack_weights(a, b) for a, b in zip(fresh, map(copy.deepcopy, mixtures), strict=True)
    )
    # The adapters inside the model's own state dict, as a tail has them.
    model.mixtures = nn.ModuleList(mixtures)
    model.save_pretrained(tmp_path / "both")
    saved = load_file(tmp_path / "both" / "model.safetensors")
    for i, mixture in enumerate(mixtures):
        assert torch.equal(saved[f"mixtures.{i}.w_down"], mixture.w_down)
    for name in before.keys() & saved.keys():
        assert torch.equal(saved[name], before[name])


# --- bases that stay as they are -----------------------------------------------------------------


class Quantised(nn.Linear):
    pass


class Identity(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def shares(linear):
    linear.alias = linear.weight.detach()
    return linear


def view_of_more(linear):
    whole = torch.randn(2 * H, D)
    linear.weight.data, linear.rest = whole[:H], whole[H:]
    return linear


def transposed(linear):
    linear.weight.data = torch.randn(D, H).t()
    return linear


def memory_of_processes(linear):
    linear.weight.share_memory_()
    return linear


BASES = {
    "quantised": (Quantised, "the base is a Quantised, not a plain nn.Linear"),
    "no-linear": (lambda d, h: nn.Identity(), "the base is a Identity, not a plain nn.Linear"),
    "dtype": (lambda d, h: nn.Linear(d, h).bfloat16(), "weight is torch.bfloat16, w_down torch.fl"),
    "device": (lambda d, h: nn.Linear(d, h, device="meta"), "weight is a meta tensor"),
    "alias": (lambda d, h: shares(nn.Linear(d, h)), "weight shares its storage with another"),
    "part": (lambda d, h: view_of_more(nn.Linear(d, h)), "weight shares its storage with another"),
    "strides": (lambda d, h: transposed(nn.Linear(d, h)), "weight is not contiguous"),
    "width": (lambda d, h: nn.Linear(d + 1, h), "weight has 13 columns, w_down 12"),
    "processes": (lambda d, h: memory_of_processes(nn.Linear(d, h)), "is shared between processes"),
}


@pytest.fixture
def logged(caplog):
    stacking._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="pemt_fast")
    return caplog


@pytest.mark.parametrize(("make", "reason"), BASES.values(), ids=BASES)
def test_refused_with_a_reason_once(make, reason, logged):
    for _ in range(2):
        tail = Tail(stacked=False, base=make(D, H))
        addresses = [parameter.data_ptr() for parameter in tail.parameters()]
        assert not stack_weights(tail.base, tail.mixture)
        assert not tail.stacked
        assert [parameter.data_ptr() for parameter in tail.parameters()] == addresses
        unstack_weights(tail.base, tail.mixture)
    assert len(logged.messages) == 1
    assert reason in logged.messages[0]


def test_fake_tensors_are_refused(logged):
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = Tail(stacked=False)
        assert not stack_weights(fake.base, fake.mixture)
        assert not fake.stacked
    real = Tail(stacked=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not stack_weights(real.base, real.mixture)
    assert len(logged.messages) == 2
    assert type(real.base.weight.data) is torch.Tensor
    assert_right(real)


def test_a_module_that_is_used_twice_stays_one():
    first, second = nn.Linear(D, H), nn.Linear(D, H)
    second.weight = first.weight
    tail = Tail(base=first)
    assert second.weight is tail.base.weight


def test_in_inference_mode_parameters_stay_trainable():
    tail = Tail(stacked=False)
    with torch.inference_mode():
        assert stack_weights(tail.base, tail.mixture)
    assert not tail.base.weight.is_inference()
    tail.base.weight.requires_grad_()
    tail(torch.randn(5, D)).sum().backward()
    assert tail.base.weight.grad is not None


def test_the_memory_of_a_former_partner_does_not_count(tail):
    # The old matrix lives on as long as its other half does; nobody else looks at it.
    tail.base.weight = nn.Parameter(torch.randn(H, D), requires_grad=False)
    assert not tail.stacked
    assert stack_weights(tail.base, tail.mixture)
    assert_right(tail)


# --- in a model ----------------------------------------------------------------------------------


def stacked_model(**changes):
    model = pemt_fast.get_model(tiny_t5(), pemt_config(impl="torch", **changes))
    return randomise(model)


def tails_of(model):
    return [m for m in model.modules() if hasattr(m, "mixture")]


def all_stacked(model):
    return all(is_stacked(tail.base, tail.mixture) for tail in tails_of(model))


def separate(model):
    """The same model with the two matrices apart."""
    apart = copy.deepcopy(model)
    for tail in tails_of(apart):
        unstack_weights(tail.base, tail.mixture)
    assert not any(is_stacked(tail.base, tail.mixture) for tail in tails_of(apart))
    return apart


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_a_model_is_stacked_and_computes_the_same(kind):
    model = stacked_model(source_kind=kind)
    assert len(tails_of(model)) == 4 and all_stacked(model)
    apart, batch = separate(model), tiny_batch()
    for loss in (model(**batch).loss, apart(**batch).loss):
        loss.backward()
    torch.testing.assert_close(model(**batch).logits, apart(**batch).logits)
    others = dict(apart.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(
        model.generate(batch["input_ids"], num_beams=2, max_length=6),
        apart.generate(batch["input_ids"], num_beams=2, max_length=6),
    )


def test_a_model_stays_stacked_wherever_it_goes(tmp_path):
    model = stacked_model()
    assert all_stacked(model.to(torch.float64)) and all_stacked(model.float())
    assert all_stacked(copy.deepcopy(model))
    torch.save(model, tmp_path / "model.pt")
    assert all_stacked(torch.load(tmp_path / "model.pt", weights_only=False))
    model.save_pretrained(tmp_path)
    again = pemt_fast.load(tiny_t5(), tmp_path)
    assert all_stacked(again)
    assert torch.equal(again(**tiny_batch()).logits, model(**tiny_batch()).logits)


def test_unload_gives_wo_its_own_memory_with_the_same_bits(tmp_path):
    t5 = tiny_t5()
    before = {name: tensor.clone() for name, tensor in t5.state_dict().items()}
    wo = t5.encoder.block[0].layer[-1].DenseReluDense.wo
    weight = wo.weight
    model = pemt_fast.get_model(t5, pemt_config(impl="torch"))
    with torch.no_grad():  # a live view: a checkpoint of T5 read now is what computes
        plain = model(**tiny_batch()).logits
        t5.load_state_dict({f"{n}": 2 * v for n, v in t5.state_dict().items()})
        assert not torch.equal(model(**tiny_batch()).logits, plain)
        t5.load_state_dict({f"{n}": v / 2 for n, v in t5.state_dict().items()})
    assert model.unload() is t5
    assert t5.encoder.block[0].layer[-1].DenseReluDense.wo is wo and wo.weight is weight
    assert weight.untyped_storage().nbytes() == weight.nbytes
    after = t5.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    t5.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * sum(
        tensor.nbytes for tensor in before.values()
    )


def test_merged_and_stacked():
    model = stacked_model(sources=["a"], source_prompt_lengths=(3,))
    batch = tiny_batch()
    before = model(**batch).logits
    model.merge()
    assert not all_stacked(model)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-5)
    model.unmerge()
    assert all_stacked(model) and torch.equal(model(**batch).logits, before)


def test_a_base_that_is_no_plain_linear_falls_back_loudly_once(caplog):
    class Quantised(torch.nn.Linear):
        """Stands for a layer of another library."""

    expected = randomise(pemt_fast.get_model(tiny_t5(), pemt_config()))(**tiny_batch()).logits
    t5 = tiny_t5()
    for stack in (t5.encoder, t5.decoder):
        for block in stack.block:
            block.layer[-1].DenseReluDense.wo.__class__ = Quantised
    with caplog.at_level(logging.WARNING, logger="pemt_fast"):
        model = randomise(pemt_fast.get_model(t5, pemt_config(impl="torch")))
    said = [r.getMessage() for r in caplog.records if "Quantised" in r.getMessage()]
    assert said == [
        "the base and its adapters stay two matrices: the base is a Quantised, not a plain "
        "nn.Linear"
    ]
    torch.testing.assert_close(model(**tiny_batch()).logits, expected, rtol=1e-5, atol=1e-6)


def test_hooks_on_wo_are_called():
    model = stacked_model()
    seen = []
    handle = tails_of(model)[0].base.register_forward_hook(lambda *_: seen.append(1))
    expected = model(**tiny_batch()).logits
    handle.remove()
    torch.testing.assert_close(model(**tiny_batch()).logits, expected)
    assert seen == [1]
