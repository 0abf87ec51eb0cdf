"""The kernels of `task_sparsity_loss` against float64, and which of them runs.

What the loss is stands in `test_sparsity_loss.py`; here is what a pass over rows can get wrong: the
ends of rows and of adapters, tokens that do not count, memory, threads. C++ kernels run with every
instruction set of this machine (4, 8 or 16 lanes), the Triton kernel in its interpreter, which
cannot round to bfloat16.
"""

import itertools

import pytest
import torch
from guards import GuardedMemory
from implementations import TRITON, needs_extension

from pemt_fast.ops import dispatch, extension, sparsity_rows, task_sparsity_loss
from pemt_fast.ops.sparsity_rows import Operands, Wanted
from pemt_fast.testing import assert_within_budget, lay_out, poisoned_empty

kernels = extension.load()
# "brgemm" and "amx" have the passes of "avx512_bf16".
ISAS = [] if kernels is None else sorted({*kernels.cpu_isas()} - {"brgemm", "amx"})
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BITWISE = {"rtol": 0, "atol": 0, "equal_nan": True}
LEAVES = ("z", "gate", "hidden", "w_up", "b_up", "residual")
EVERYTHING = ("b_up", "residual", "mask")


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in ISAS), TRITON])
def impl(request):
    """Each kernel there is, the C++ ones once per instruction set."""
    name, _, isa = request.param.partition("-")
    if isa:
        best = kernels.cpu_isa()
        kernels.use_cpu_isa(isa)
    yield name
    if isa:
        kernels.use_cpu_isa(best)


def make(lead, ranks, H, extras=(), *, dtype=torch.float32, seed=0, trains=LEAVES, layout=None):
    """Keywords of a call; the mask leaves out the first token and every third."""
    generator = torch.Generator().manual_seed(seed)
    N, E = sum(ranks), len(ranks)
    shapes = {
        "z": (*lead, H), "gate": (lead[0], E), "hidden": (*lead, N), "w_up": (N, H),
        "b_up": (E, H), "residual": (*lead, H),
    }  # fmt: skip
    keywords = {"ranks": ranks}
    for name, shape in shapes.items():
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if name == "gate":
            values = values.softmax(-1)
        values = (values / 2 if name == "w_up" else values).to(dtype)
        if layout and name != "w_up":
            values = lay_out(values, layout)
        if name in LEAVES[:4] or name in extras:
            keywords[name] = values.requires_grad_(name in trains)
    if "mask" in extras:
        keywords["mask"] = (torch.arange(lead[0] * lead[1]) % 3 != 0).view(lead)
    return keywords


def run(keywords, impl):
    loss = task_sparsity_loss(**keywords, impl=impl)
    leaves = {name: t for name, t in keywords.items() if getattr(t, "requires_grad", False)}
    if not leaves:
        return {"loss": loss}
    grads = torch.autograd.grad(loss, tuple(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


def double(keywords):
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in keywords.items()
    }


def assert_budget(impl, *args, draws=8, **options):
    """The budget of `pemt_fast.testing`; its eager twin is the torch form in the same dtype."""
    results = []
    for seed in range(draws):
        keywords = make(*args, seed=seed, **options)
        exact, eager = run(double(keywords), "torch"), run(keywords, "torch")
        actual = run(keywords, impl)
        results.append((actual, exact, eager))
    for name in results[0][0]:
        assert_within_budget(name, *(torch.stack([r[i][name] for r in results]) for i in range(3)))


def skip_rounding(impl, dtype):
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16")


# Sequences and tokens, ranks, width: one token; odd ends; whole vectors of each width and one more;
# more adapters than lanes; several blocks of tokens.
SHAPES = [
    ((1, 1), (2,), 3), ((3, 5), (3, 3, 3, 3), 11), ((2, 9), (3, 4, 2, 5), 33),
    ((1, 17), (16, 16), 64), ((2, 8), (20, 40, 33, 16), 130), ((1, 3), (2,) * 17, 16),
    ((1, 6), (3,) * 16 + (40,), 48), ((2, 3), (70, 129, 2), 257),
    ((4, 20), (8, 8), 24),
]  # fmt: skip


def name_of(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else f"H{value}"


@pytest.mark.parametrize("extras", [(), ("mask",), EVERYTHING], ids=["bare", "mask", "everything"])
@pytest.mark.parametrize(("lead", "ranks", "H"), SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_within_the_error_budget(impl, dtype, lead, ranks, H, extras):
    skip_rounding(impl, dtype)
    assert_budget(impl, lead, ranks, H, extras, dtype=dtype)


def test_one_unit_has_no_gradient(impl):
    """Its output keeps its direction: the two terms of `d_hidden` cancel but for their rounding."""
    keywords = make((2, 9), (1,) * 17, 16, trains=("hidden",))
    z, hidden, w_up = (keywords[name].detach().flatten(0, -2) for name in ("z", "hidden", "w_up"))
    share, products = keywords["gate"].mean(0), z @ w_up.t()
    norms = z.norm(dim=1, keepdim=True) * (hidden * w_up.norm(dim=1)).abs()
    terms = (share * products / norms).abs() / 18
    found = run(keywords, impl)["hidden"].flatten(0, 1)
    assert bool((found.abs() <= 8 * torch.finfo(torch.float32).eps * terms).all())


@pytest.mark.parametrize("extras", [("b_up",), ("residual",)], ids=["bias", "residual"])
def test_offsets_by_themselves(impl, extras):
    assert_budget(impl, (2, 7), (5, 9), 20, extras)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.parametrize("extras", [(), EVERYTHING], ids=["bare", "everything"])
def test_strides(impl, layout, extras):
    # Between the rows of a sliced tensor is NaN.
    assert_budget(impl, (2, 7), (5, 9), 20, extras, layout=layout)


@pytest.mark.parametrize("low", ["z", "gate", "hidden", "w_up"])
def test_mixed_dtypes(impl, low):
    keywords = make((2, 7), (5, 9), 20)
    keywords[low] = keywords[low].detach().half().requires_grad_()
    actual, exact = run(keywords, impl), run(double(keywords), "torch")
    eager = run(keywords, "torch")
    for name, value in actual.items():
        if name != "loss":
            assert_within_budget(name, value, exact[name], eager[name])


@pytest.mark.parametrize("small", ["z", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_clamped_norms(impl, dtype, small):
    """Rows of zeros, and rows whose norm is 0.9e-8: those still have a direction."""
    skip_rounding(impl, dtype)
    keywords = make((2, 7), (5, 9), 20, dtype=dtype, trains=("z", "gate", "hidden"))
    with torch.no_grad():
        hidden, w_up = keywords["hidden"], keywords["w_up"]
        outputs = [h @ w for h, w in zip(hidden.split((5, 9), -1), w_up.split((5, 9)), strict=True)]
        if small == "z":
            norms = keywords["z"].norm(dim=-1, keepdim=True)
        else:
            norms = torch.cat([m.norm(dim=-1, keepdim=True) for m in outputs], -1)
            norms = norms.repeat_interleave(torch.tensor([5, 9]), -1)
        keywords[small][1, 1:3] *= 0.9e-8 / norms[1, 1:3]
        keywords[small][0, 3] = 0
    actual, exact = run(keywords, impl), run(double(keywords), "torch")
    eager = run(keywords, "torch")
    for name in ("z", "hidden"):
        # Beside a small vector the other gradient is 1e8 times as large: each row by itself.
        for row in range(14):
            of = [found[name].flatten(0, 1)[row] for found in (actual, exact, eager)]
            assert_within_budget(name, *of)


def test_an_adapter_of_zeros(impl):
    keywords = make((1, 3), (4, 4), 8, ("mask",))
    with torch.no_grad():
        keywords["w_up"][:4] = 0
    found = run(keywords, impl)
    assert all(bool(value.isfinite().all()) for value in found.values())
    torch.testing.assert_close(found["loss"], run(keywords, "torch")["loss"])


# --- tokens that do not count --------------------------------------------------------------------


def test_of_masked_tokens_nothing_is_read(impl):
    keywords = make((2, 8), (5, 9), 20, ("mask",), trains=("z", "gate", "hidden"))
    masked = ~keywords["mask"]
    with torch.no_grad():
        for name in ("z", "hidden"):
            keywords[name][masked] = 0
    expected = run(keywords, impl)
    with torch.no_grad():
        for name in ("z", "hidden"):
            keywords[name][masked] = float("nan")
    actual = run(keywords, impl)
    torch.testing.assert_close(actual, expected, **BITWISE)
    assert not actual["z"][masked].any() and not actual["hidden"][masked].any()
    assert actual["z"][~masked].any()


@pytest.mark.parametrize("extras", [(), ("b_up", "residual")], ids=["bare", "bias-residual"])
def test_all_tokens_masked(impl, extras):
    keywords = make((2, 8), (5, 9), 20, extras)
    keywords["mask"] = torch.zeros(2, 8, dtype=torch.bool)
    for name, value in run(keywords, impl).items():
        assert not value.any() and value.isfinite().all(), name


@pytest.mark.parametrize("mask", [(), ("mask",)], ids=["no-mask", "mask"])
def test_no_tokens(impl, mask):
    for name, value in run(make((2, 0), (5, 9), 20, mask), impl).items():
        assert not value.any() and value.isfinite().all(), name


# --- memory, bits, threads -----------------------------------------------------------------------

SIZES = {"T": 25, "ranks": (5, 17, 20), "H": 33}


def operands(T, ranks, H, dtype=torch.float32, extras=True):
    def draw(*shape, dtype=dtype):
        return torch.randn(*shape).to(dtype)

    N, E = sum(ranks), len(ranks)
    hidden = draw(T, N)
    # As if each w_up[e]·w_up[e]ᵀ were one, so that squares are positive.
    return Operands(
        draw(T, H), hidden, draw(T, N), hidden.clone(), hidden / 4 if extras else None,
        draw(T, E, dtype=torch.float32) if extras else None, torch.rand(T, E) if extras else None,
        torch.arange(T) % 4 > 0 if extras else None, torch.rand(E),
    )  # fmt: skip


FLAGS = [Wanted(*flags) for flags in itertools.product([False, True], repeat=5)]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_cpu_kernel_writes_its_results_and_nothing_else(isa, dtype):
    given, best = operands(SIZES["T"], SIZES["ranks"], SIZES["H"], dtype), kernels.cpu_isa()
    kernels.use_cpu_isa(isa)
    try:
        with GuardedMemory() as memory:
            # Operands between guards of NaN: what is read beyond a row's end is seen.
            inside = Operands(*(torch.empty_like(t, dtype=t.dtype).copy_(t) for t in given))
            guarded = sparsity_rows.rows(inside, SIZES["ranks"], 32.0, Wanted(*(True,) * 5), "cpu")
        plain = sparsity_rows.rows(given, SIZES["ranks"], 32.0, Wanted(*(True,) * 5), "cpu")
    finally:
        kernels.use_cpu_isa(best)
    assert len(memory.buffers) >= 7 and memory.overruns() == []
    for one, other in zip(guarded, plain, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, **BITWISE)


@pytest.mark.parametrize("wanted", FLAGS, ids=lambda w: "".join(str(int(f)) for f in w))
def test_only_what_is_wanted_and_the_same_bits(impl, wanted):
    given = operands(SIZES["T"], SIZES["ranks"], SIZES["H"])
    everything = sparsity_rows.rows(given, SIZES["ranks"], 32.0, Wanted(*(True,) * 5), impl)
    found = sparsity_rows.rows(given, SIZES["ranks"], 32.0, wanted, impl)
    flags = (True, wanted.factors, *wanted)
    for one, other, flag in zip(found, everything, flags, strict=True):
        assert (one is not None) == flag
        if flag:
            torch.testing.assert_close(one, other, **BITWISE)


@needs_extension
@pytest.mark.parametrize("T", [16, 17, 200], ids=lambda T: f"T{T}")
def test_cpu_bits_do_not_depend_on_threads(T):
    given, ranks, wanted = operands(T, (64, 33), 400), (64, 33), Wanted(*(True,) * 5)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        found.append(sparsity_rows.rows(given, ranks, 256.0, wanted, "cpu"))
    torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **BITWISE)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_long_rows(impl, dtype):
    # A lane of AVX-512 takes 32 terms of a sum, 512 units or 2048 columns, before it goes on.
    skip_rounding(impl, dtype)
    ranks, wanted = (1100, 7), Wanted(*(True,) * 5)
    given = operands(3, ranks, 4200, dtype)
    exact = Operands(*(t if t.dtype == torch.bool else t.double() for t in given))
    results = [
        sparsity_rows.rows(*call)
        for call in ((given, ranks, 4.0, wanted, impl), (exact, ranks, 4.0, wanted, "torch"),
                     (given, ranks, 4.0, wanted, "torch"))
    ]  # fmt: skip
    for name, *found in zip(results[0]._fields, *results, strict=True):
        assert_within_budget(name, *found)


# --- the operators and the choice between them ---------------------------------------------------


@needs_extension
def test_registered_operator_of_the_rows():
    for extras in (False, True):
        given = operands(SIZES["T"], SIZES["ranks"], SIZES["H"], torch.bfloat16, extras)
        torch.library.opcheck(
            torch.ops.pemt_fast.task_sparsity_loss_rows.default,
            (*given, SIZES["ranks"], 32.0, (True, True, extras, True, extras)),
        )
    with pytest.raises(RuntimeError, match="sizes that do not belong together"):
        sparsity_rows.rows(given, (5, 17, 21), 32.0, Wanted(), "cpu")


def test_registered_operator_of_the_loss(impl):
    keywords = make((2, 3), (5, 9), 20, EVERYTHING)
    names = ("z", "gate", "hidden", "w_up", "b_up", "residual", "mask", "ranks")
    call = tuple(keywords[name] for name in names)
    torch.library.opcheck(torch.ops.pemt_fast.task_sparsity_loss.default, (*call, impl))


def test_compiles_as_one_graph(impl):
    keywords = make((2, 3), (5, 9), 20, ("mask",))
    expected = run(keywords, impl)
    torch._dynamo.reset()

    def loss(z, gate, hidden, w_up):
        return 2 * task_sparsity_loss(
            z, gate, hidden, w_up, mask=keywords["mask"], ranks=(5, 9), impl=impl
        )

    leaves = [keywords[name] for name in LEAVES[:4]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled / 2, expected["loss"], **BITWISE)
    for grad, name in zip(torch.autograd.grad(compiled, leaves), LEAVES, strict=False):
        torch.testing.assert_close(grad / 2, expected[name])


def called(monkeypatch):
    """The implementations that were asked, in order."""
    seen, rows = [], sparsity_rows.rows
    from pemt_fast.ops import sparsity_terms

    def watch(*args):
        seen.append(args[-1])
        return rows(*args)

    monkeypatch.setattr(sparsity_terms, "rows", watch)
    return seen


@needs_extension
def test_auto_takes_the_kernel_where_it_can(monkeypatch):
    seen = called(monkeypatch)
    keywords = make((2, 3), (5, 9), 20)
    task_sparsity_loss(**keywords)
    task_sparsity_loss(**double(keywords))
    monkeypatch.setenv("PEMT_FAST_IMPL", "torch")
    task_sparsity_loss(**keywords)
    assert seen == ["cpu" if dispatch.CPU_KERNELS_ARE_FAST else "torch", "torch", "torch"]


def test_without_the_extension_auto_is_torch(monkeypatch):
    seen = called(monkeypatch)
    monkeypatch.setattr(dispatch, "CPU_KERNELS_ARE_FAST", False)
    task_sparsity_loss(**make((2, 3), (5, 9), 20))
    assert seen == ["torch"]


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_named_kernel_that_cannot_run_says_why(name):
    with pytest.raises(RuntimeError, match=f"impl='{name}' cannot run: .*float64"):
        task_sparsity_loss(**double(make((2, 3), (5, 9), 20)), impl=name)


@pytest.mark.gpu
@pytest.mark.parametrize("extras", [(), ("mask",), EVERYTHING], ids=["bare", "mask", "everything"])
@pytest.mark.parametrize("ranks", [(64,) * 6, (5, 70, 17)], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_on_a_gpu(dtype, ranks, extras):
    keywords = {
        name: t.detach().cuda().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
        for name, t in make((3, 50), ranks, 200, extras, dtype=dtype).items()
    }
    actual, exact = run(keywords, "triton"), run(double(keywords), "torch")
    eager = run(keywords, "torch")
    for name, value in actual.items():
        assert_within_budget(name, value, exact[name], eager[name])
    torch.testing.assert_close(run(keywords, "triton"), actual, **BITWISE)
