"""LoRA, its mixtures and the Poly family on T5 and on a decoder-only model."""

import copy
import dataclasses

import pytest
import torch
from linear_models import METHODS, MODELS, SHARED, TASKS, adapted, tiny_inputs, tiny_model

import pemt_fast
from pemt_fast.nn.adapted_linear import AdaptedLinear
from pemt_fast.nn.routers import CustomizedRouter, Router, SkillRouter, TaskEmbeddingRouter
from pemt_fast.nn.routing import RoutingState
from pemt_fast.nn.skill_linear import SkillLinear

MIXED = [2, 0, 1, 0]
TASKED = [name for name in METHODS if name not in SHARED]
every_model = pytest.mark.parametrize("kind", MODELS)
every_method = pytest.mark.parametrize("method", METHODS)
every_tasked = pytest.mark.parametrize("method", TASKED)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, AdaptedLinear)]


def close(actual, expected, rtol=1e-5, atol=2e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def gradients(model, **batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- attaching -----------------------------------------------------------------------------------


@every_model
@every_method
def test_fresh_adapters_change_nothing(method, kind):
    inputs = tiny_inputs(kind)
    with torch.no_grad():
        plain = tiny_model(kind)(**inputs).logits
        model = adapted(method, kind, random=False)
        close(model(**inputs, task_ids=MIXED).logits, plain, atol=1e-6)
        experts = {"t5": 8, "llama": 6}[kind] if method == "mix-lora" else 0
        assert len(layers_of(model)) == {"t5": 12, "llama": 4}[kind] + experts
        changed = adapted(method, kind)(**inputs, task_ids=MIXED).logits
    assert not torch.allclose(changed, plain, atol=1e-2)


@every_model
@every_method
def test_adapters_and_nothing_else_are_trained(method, kind):
    model = adapted(method, kind)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.endswith(".base.weight") for name in trained)
    assert trained == set(gradients(model, **tiny_inputs(kind), task_ids=MIXED))


@every_model
@every_method
def test_unload_and_disabled_give_the_untouched_model(method, kind):
    plain_model, inputs = tiny_model(kind), tiny_inputs(kind)
    names = list(plain_model.state_dict())
    with torch.no_grad():
        plain = plain_model(**inputs).logits
        model = pemt_fast.get_model(plain_model, METHODS[method]())
        with model.disabled():
            assert torch.equal(model(**inputs).logits, plain)
        assert model.unload() is plain_model
        assert torch.equal(plain_model(**inputs).logits, plain)
    assert list(plain_model.state_dict()) == names
    assert all(p.requires_grad for p in plain_model.parameters())


def test_target_modules():
    model = pemt_fast.get_model(tiny_model("t5"), pemt_fast.LoraConfig(target_modules="all-linear"))
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    assert names == {"q", "k", "v", "o", "wi", "wo"}
    pattern = r"decoder\.block\.\d+\.layer\.1\.EncDecAttention\.[qo]"
    model = pemt_fast.get_model(tiny_model("t5"), pemt_fast.LoraConfig(target_modules=pattern))
    assert len(layers_of(model)) == 4


# --- tasks ---------------------------------------------------------------------------------------


@every_model
@every_tasked
def test_a_mixed_batch_computes_what_each_task_computes_alone(method, kind):
    model, inputs = adapted(method, kind), tiny_inputs(kind)
    with torch.no_grad():
        mixed = model(**inputs, task_ids=torch.tensor(MIXED)).logits
        alone = [model(**inputs, task_ids=[task] * 4).logits for task in range(TASKS)]
        for row, task in enumerate(MIXED):
            close(mixed[row], alone[task][row])
        assert not torch.allclose(alone[0], alone[1], atol=1e-3)
        # A task that was not trained is none of them.
        unseen = model(**inputs, task_ids=[pemt_fast.UNSEEN_TASK] * 4).logits
    assert not any(torch.allclose(unseen, one, atol=1e-3) for one in alone)


@every_method
def test_methods_without_tasks_take_no_notice_of_them(method):
    model, inputs = adapted(method), tiny_inputs("t5")
    if method in SHARED:
        assert torch.equal(model(**inputs, task_ids=[7] * 4).logits, model(**inputs).logits)
    else:
        with pytest.raises(ValueError, match="task_ids must give the task of each of the 4"):
            model(**inputs)


@every_tasked
def test_gradients_of_a_task_come_from_its_sequences(method):
    model, inputs = adapted(method), tiny_inputs("t5")
    mixed = gradients(model, **inputs, task_ids=MIXED)
    rows = {task: [b for b, t in enumerate(MIXED) if t == task] for task in range(TASKS)}
    total = {}
    labels = (inputs["labels"] != -100).sum()
    for task, own in rows.items():
        part = {name: tensor[own] for name, tensor in inputs.items()}
        share = (part["labels"] != -100).sum() / labels
        for name, grad in gradients(model, **part, task_ids=[task] * len(own)).items():
            total[name] = total.get(name, 0) + share * grad
    for name, grad in mixed.items():
        close(grad, total[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"do_sample": True}], ids=str)
@every_model
@every_tasked
def test_generation_equals_one_task_at_a_time(method, kind, options):
    model, inputs = adapted(method, kind), tiny_inputs(kind)
    del inputs["labels"]

    def run(task_ids):
        torch.manual_seed(5)
        ids = model.generate(
            **inputs, task_ids=task_ids, max_new_tokens=6, suppress_tokens=[0, 1], **options
        )
        return ids[:, -6:]

    mixed = run(MIXED)
    for task in range(TASKS):
        alone = run([task] * 4)
        for row in (b for b, t in enumerate(MIXED) if t == task):
            assert torch.equal(mixed[row], alone[row])


@pytest.mark.parametrize("known", [False, True], ids=["looked-at", "not-looked-at"])
@pytest.mark.parametrize("method", ["poly", "mhr", "c-poly", "c-poly-average"])
def test_unseen_tasks_in_training_with_noise(method, known):
    """They get the uniform average without noise, the others the noise they get without them."""
    router = (
        adapted(method).train().adapted_layers()["encoder.block.0.layer.0.SelfAttention.q"].router
    )
    task_ids = torch.tensor([1, pemt_fast.UNSEEN_TASK, 2])

    def rows(ids, **options):
        torch.manual_seed(7)
        return router(ids, len(ids), **options)[0]

    mixed, seen = rows(task_ids), rows(task_ids.clamp_min(0), may_be_unseen=known)
    torch.testing.assert_close(mixed[[0, 2]], seen[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(mixed[1], router.of_task(pemt_fast.UNSEEN_TASK), rtol=0, atol=0)


def test_routers_compute_in_float32():
    routers = (SkillRouter(3, 4), CustomizedRouter(3, 4, 1), TaskEmbeddingRouter(3, 4))
    for router in routers:
        narrow = router.bfloat16()
        table = narrow.table()
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, narrow.double().table().float())


def test_a_router_without_noise_is_the_same_in_training():
    for router in (SkillRouter(3, 4, noise=False), CustomizedRouter(3, 4, 1, noise=False)):
        task_ids = torch.tensor([1, 2, pemt_fast.UNSEEN_TASK])
        (trained, rows), (expected, _) = (router.train(mode)(task_ids, 3) for mode in (True, False))
        assert torch.equal(trained, expected) and rows.tolist() == [1, 2, 3]
        torch.testing.assert_close(trained[3, :4], torch.full((4,), 0.25))
        assert not bool(trained[3, 4:].any())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
@every_method
def test_generation_asks_the_routers_once(method, beams, kind, monkeypatch):
    """And makes the tokens of the forward pass, which asks them every time."""
    model, inputs = adapted(method, kind), tiny_inputs(kind)
    del inputs["labels"]
    task_ids = [2, pemt_fast.UNSEEN_TASK, 0, 1]
    options = {"max_new_tokens": 6, "num_beams": beams, "suppress_tokens": [0, 1]}
    calls = []

    def counted(self, *args, _forward=Router._select):
        calls.append(self)
        return _forward(self, *args)

    monkeypatch.setattr(Router, "_select", counted)
    prepared = model.generate(**inputs, task_ids=task_ids, **options)
    routers = [getattr(layer, "router", None) for layer in layers_of(model)]
    assert len(calls) == sum(router is not None for router in routers)
    for layer in layers_of(model):
        monkeypatch.setattr(layer, "name", "nothing is prepared under this name")
    assert torch.equal(model.generate(**inputs, task_ids=task_ids, **options), prepared)


def test_generation_in_training_prepares_nothing(monkeypatch):
    """Its noise is new in every step."""
    model, inputs = adapted("poly").train(), tiny_inputs("t5")
    del inputs["labels"]
    prepared = []
    monkeypatch.setattr(SkillLinear, "prepare", lambda *_: prepared.append(1))
    model.generate(**inputs, task_ids=MIXED, max_new_tokens=2)
    assert not prepared
    model.eval().generate(**inputs, task_ids=MIXED, max_new_tokens=2)
    assert prepared


@pytest.mark.parametrize("method", ["poly", "mhr"])
def test_fewer_sequences_than_tasks_prepare_no_more_factors_than_they_need(method):
    model = adapted(method)
    name, layer = next(iter(model.adapted_layers().items()))
    state = RoutingState(task_ids=torch.tensor([2, pemt_fast.UNSEEN_TASK]), num_tasks=TASKS)
    x = torch.randn(2, 3, 32)
    with torch.no_grad(), model.routing.use(state):
        expected = layer(x)
        state.prepared[name] = factors = layer.prepare(state, 2)
        assert len(factors.down) == len(factors.up) == 2
        close(layer(x), expected)
        close(layer(x.repeat_interleave(3, 0)), expected.repeat_interleave(3, 0))


@pytest.mark.parametrize("method", ["poly", "mhr", "mtl-lora"])
def test_what_is_prepared_keeps_its_shape_without_unseen_tasks(method):
    """A compiled step would be compiled again."""
    layer = next(iter(adapted(method).adapted_layers().values()))
    shapes = set()
    for last, may_be_unseen in ((pemt_fast.UNSEEN_TASK, True), (1, False)):
        task_ids = torch.tensor([2, 0, 1, 0, last])
        state = RoutingState(task_ids=task_ids, num_tasks=TASKS, may_be_unseen=may_be_unseen)
        factors = layer.prepare(state, 5)
        shapes.add((factors.down.shape, factors.up.shape, factors.task_ids.shape))
    assert len(shapes) == 1


# --- what breaks elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@every_model
@every_method
def test_gradient_checkpointing(method, kind, reentrant):
    """Also with noise: the recomputed layer draws what it drew before."""
    # In float64: the re-entrant form first runs without gradients, where the kernels for float32
    # read their weights in another order.
    model, inputs = adapted(method, kind, dropout=0.2).train().double(), tiny_inputs(kind)
    torch.manual_seed(11)
    plain = gradients(model, **inputs, task_ids=MIXED)
    if method == "mix-lora" and reentrant:
        with pytest.raises(ValueError, match="use_reentrant=True loses the gradient"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        return
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(11)
    checkpointed = gradients(model, **inputs, task_ids=MIXED)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        close(checkpointed[name], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("moe-lora", "t5"), ("mtl-lora", "t5"), ("mix-lora", "t5"), ("poly", "t5"),
        ("mhr", "llama"), ("c-poly", "llama"), ("multi-lora", "llama"),
    ],
)  # fmt: skip
def test_compiles_to_one_graph(method, kind):
    torch._dynamo.reset()
    model, inputs = adapted(method, kind), tiny_inputs(kind)
    task_ids = torch.tensor(MIXED)
    expected = gradients(model, **inputs, task_ids=task_ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, **inputs, task_ids=task_ids)
    for name, grad in expected.items():
        close(found[f"_orig_mod.{name}"], grad, atol=1e-6)


@every_model
@every_method
def test_merged_computes_the_same(method, kind):
    model, inputs = adapted(method, kind), tiny_inputs(kind)
    if method == "mix-lora":
        with pytest.raises(ValueError, match="depend on the token and do not merge"):
            model.merge()
        return
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for task in (0, 2, pemt_fast.UNSEEN_TASK):
            expected = model(**inputs, task_ids=[task] * 4).logits
            model.merge(task)
            close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
            if method in TASKED:
                with pytest.raises(ValueError, match="is merged already"):
                    model.merge(1)
                with pytest.raises(ValueError, match="task must be one of"):
                    model.merge()
            model.unmerge()
            assert torch.equal(model(**inputs, task_ids=[task] * 4).logits, expected)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@every_model
@every_method
def test_files(method, kind, tmp_path):
    model, inputs = adapted(method, kind, adapter_dtype="float32"), tiny_inputs(kind)
    expected = model(**inputs, task_ids=MIXED).logits
    model.save_pretrained(tmp_path)
    again = pemt_fast.load(tiny_model(kind), tmp_path)
    assert torch.equal(again(**inputs, task_ids=MIXED).logits, expected)
    assert again.adapter_config == model.adapter_config
    assert torch.equal(copy.deepcopy(again)(**inputs, task_ids=MIXED).logits, expected)


@pytest.mark.parametrize("prepared", [False, True], ids=["forward", "generate"])
@every_method
def test_the_named_implementation_runs_or_says_why_not(method, prepared):
    model, inputs = adapted(method, impl="cuda"), tiny_inputs("t5")
    tasks = {} if method in SHARED else {"task_ids": torch.tensor([0, 2, 1, 0])}
    with pytest.raises(RuntimeError, match=r"^impl='cuda' cannot run: "):
        if prepared:
            model.generate(**{n: t for n, t in inputs.items() if n != "labels"}, **tasks)
        else:
            model(**inputs, **tasks)


@every_method
def test_half_precision(method):
    inputs = tiny_inputs("t5")
    expected = adapted(method)(**inputs, task_ids=MIXED).logits
    for adapter_dtype in (None, "float32"):
        model = pemt_fast.get_model(
            tiny_model("t5").bfloat16(),
            dataclasses.replace(METHODS[method](), adapter_dtype=adapter_dtype),
        )
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in adapted(method).named_parameters():
                own[name].copy_(parameter)
        found = model(**inputs, task_ids=MIXED).logits
        assert found.dtype == torch.bfloat16
        error = (found.detach().float() - expected.detach()).norm() / expected.detach().norm()
        assert float(error) < 0.1
        gradients(model, **inputs, task_ids=MIXED)


# --- MixLoRA -------------------------------------------------------------------------------------


def mix_lora_by_hand(layer, x):
    """Every expert on every token, then the two of each token; and the balancing loss."""
    p = torch.softmax(x @ layer.w_gate.t(), -1)
    share, out = torch.zeros(p.shape[-1]), torch.zeros_like(x)
    linears = dict(layer.base.named_children())
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            best = sorted(range(p.shape[-1]), key=lambda e: -float(p[b, s, e]))[: layer.top_k]
            total = sum(p[b, s, e] for e in best)
            for e in best:

                def expert(name, h, e=e):
                    linear = linears[name]
                    rows = linear.mixture.rows(e)
                    low = h @ linear.mixture.w_down[rows].t() @ linear.mixture.w_up[rows]
                    return linear.base(h) + linear.scale * low

                out[b, s] += p[b, s, e] / total * expert("wo", torch.relu(expert("wi", x[b, s])))
                share[e] += 1 / (x.shape[0] * x.shape[1])
    return out, p.shape[-1] * (share * p.mean((0, 1))).sum()


def test_mix_lora_equals_its_formula():
    model = adapted("mix-lora")
    layer = model.base_model.encoder.block[0].layer[-1].DenseReluDense
    x = torch.randn(2, 3, 32)
    state = RoutingState(wants_loss=True)
    with torch.no_grad(), model.routing.use(state):
        found = layer(x)
        expected, balance = mix_lora_by_hand(layer, x)
    close(found, expected)
    close(next(iter(state.losses.values())), balance)
    inputs = tiny_inputs("t5")
    plain = model(**inputs).loss
    balanced = adapted("mix-lora", balance_weight=1.0)(**inputs).loss
    assert 1.0 < float(balanced.detach() - plain.detach()) < 6.0  # top_k when balanced


# --- relations between methods -------------------------------------------------------------------


def copy_skills(source, target):
    """The parameters of a Poly model into a C-Poly model of the same skills."""
    for theirs, ours in zip(layers_of(source), layers_of(target), strict=True):
        with torch.no_grad():
            ours.router.common.logits.copy_(theirs.router.logits)
            ours.a.copy_(theirs.a)
            ours.b.copy_(theirs.b)


def test_c_poly_without_specific_skills_is_poly():
    poly, inputs = adapted("poly"), tiny_inputs("t5")
    c_poly = adapted("c-poly-average", num_common=4, num_specific=0, target_modules=("q", "v"))
    copy_skills(poly, c_poly)
    for mode in (True, False):
        torch.manual_seed(2)
        expected = poly.train(mode)(**inputs, task_ids=MIXED).logits
        torch.manual_seed(2)
        found = c_poly.train(mode)(**inputs, task_ids=MIXED).logits
        close(found, expected, rtol=1e-6, atol=1e-6)


def test_c_poly_without_common_skills_is_one_adapter_per_task():
    c_poly, inputs = adapted("c-poly-separate"), tiny_inputs("t5")
    for task in range(TASKS):
        lora = adapted("lora", r=2, alpha=1.0)
        with torch.no_grad():
            for ours, theirs in zip(layers_of(lora), layers_of(c_poly), strict=True):
                rows = theirs.mixture.rows(task)
                ours.mixture.w_down.copy_(theirs.mixture.w_down[rows])
                ours.mixture.w_up.copy_(theirs.mixture.w_up[rows])
            close(c_poly(**inputs, task_ids=[task] * 4).logits, lora(**inputs).logits)


def test_a_hundred_tasks_are_one_call_per_layer():
    config = pemt_fast.CPolyConfig(100, num_common=3, num_specific=1)
    assert config.num_skills == 103
    model = pemt_fast.get_model(tiny_model("t5"), config)
    layer = layers_of(model)[0]
    assert layer.mixture.w_down.shape == (206, 32)
    inputs = tiny_inputs("t5")
    mixed = gradients(model.train(), **inputs, task_ids=[99, 0, 50, 7])
    assert all(grad.isfinite().all() for grad in mixed.values())


def test_weights_of_other_tasks_skills_train_only_if_asked():
    inputs = tiny_inputs("t5")
    fixed = gradients(adapted("c-poly"), **inputs, task_ids=MIXED)
    assert not any("specific" in name for name in fixed)
    model = adapted("c-poly-trained", random=False)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.mixture.w_up.normal_()
    grads = gradients(model, **inputs, task_ids=[0] * 4)
    specific = torch.stack([g for n, g in grads.items() if n.endswith("specific")])
    assert bool((specific[:, 0] != 0).any(0).all())  # of task 0, also where they are still 0
    assert not bool(specific[:, 1:].any())


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pemt_fast.CPolyConfig(2, 0, 0), "must not both be 0"),
        (lambda: pemt_fast.CPolyConfig(0), "num_tasks must be an integer of at least 1, got 0"),
        (lambda: pemt_fast.CPolyConfig(2, combine="mean"), r"combine must be one of \['sum'"),
        (lambda: pemt_fast.PolyConfig(2, num_skills=0), "num_skills must be an integer"),
        (lambda: pemt_fast.LoraConfig(r=0), "r must be an integer of at least 1, got 0"),
        (lambda: pemt_fast.LoraConfig(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: pemt_fast.MoeLoraConfig(2, r=6), "r must be a multiple of num_experts = 8, got 6"),
        (lambda: pemt_fast.MtlLoraConfig(2, temperature=0), "temperature must be positive, got 0"),
        (lambda: pemt_fast.PolyConfig(2, task_names=["a"]), "task_names must hold one name per"),
    ],
)
def test_bad_configs_name_the_field(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("query",)}, r"target_modules \('query',\) name no layer; there are"),
        ({"target_modules": ("SelfAttention",)}, "SelfAttention is a T5Attention"),
    ],
)
def test_layers_that_are_not_there(changes, message):
    model = tiny_model("t5")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pemt_fast.get_model(model, pemt_fast.LoraConfig(**changes))
    assert list(model.state_dict()) == names


def test_splits_that_do_not_divide_name_the_layer():
    with pytest.raises(ValueError, match=r"SelfAttention.q: num_splits must divide .* 32 .* got 3"):
        pemt_fast.get_model(tiny_model("t5"), pemt_fast.PolyConfig(2, num_splits=3))


def test_unknown_tasks_and_architectures():
    model, inputs = adapted("poly", task_names=("cb", "rte", "wic")), tiny_inputs("t5")
    assert model.tasks == ("cb", "rte", "wic")
    by_name = model(**inputs, task_ids=["wic", "cb", "rte", "cb"]).logits
    assert torch.equal(by_name, model(**inputs, task_ids=MIXED).logits)
    for wrong in ([0, 1, 3, 0], ["cb", "rte", "boolq", "cb"], [0, -2, 0, 0]):
        with pytest.raises(ValueError, match="task_ids must be among 0: cb, 1: rte, 2: wic"):
            model(**inputs, task_ids=wrong)
    plain = tiny_model("t5")
    plain.config.model_type = "elsewhere"
    with pytest.raises(ValueError, match="target_modules must be given for 'elsewhere'"):
        pemt_fast.get_model(plain, pemt_fast.LoraConfig())
