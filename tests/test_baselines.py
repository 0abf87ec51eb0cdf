"""The methods the mixtures are compared with: bottleneck adapters, prompt tuning, full training."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from linear_models import tiny_inputs, tiny_llama, tiny_model
from safetensors.torch import load_file
from t5_factory import D_MODEL, randomise, tiny_t5
from torch import nn
from transformers import Seq2SeqTrainingArguments

import pemt_fast
from pemt_fast.nn.bottleneck import BottleneckAdapter
from pemt_fast.nn.routing import Routing, RoutingState
from pemt_fast.nn.sublayer import AdaptedSublayer

TASKS = 3
MIXED = [2, 0, 1, 0]
FORMS = ("sequential", "double_sequential", "parallel")
METHODS = {
    **{
        form: functools.partial(pemt_fast.BottleneckConfig, form=form, bottleneck=6)
        for form in FORMS
    },
    "prompt": functools.partial(pemt_fast.PromptTuningConfig, prompt_length=5),
    "prompt-per-task": functools.partial(
        pemt_fast.PromptTuningConfig, prompt_length=5, num_tasks=TASKS, per_task=True
    ),
    "full": pemt_fast.FullFineTuningConfig,
    "full-norms": functools.partial(
        pemt_fast.FullFineTuningConfig, target_modules=("layer_norm", "final_layer_norm")
    ),
}
every_method = pytest.mark.parametrize("method", METHODS)


def baseline(method, kind="t5", *, random=True, **changes):
    """A tiny model with a method on it that does something."""
    model = pemt_fast.get_model(tiny_model(kind), METHODS[method](**changes))
    return randomise(model, scale=0.1) if random else model


def close(actual, expected, tolerance=1e-6):
    """Equal up to `tolerance` of the largest value."""
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-12))


def gradients(model, **batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- what all of them do -------------------------------------------------------------------------


@every_method
def test_what_is_trained(method):
    model = baseline(method)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(gradients(model, **tiny_inputs("t5"), task_ids=MIXED))
    assert trained == set(model.adapter_state_dict())
    everything = set(dict(tiny_t5().named_parameters()))
    own = {
        "prompt": {"prompt.prompt"},
        "prompt-per-task": {f"prompt.prompts.{task}" for task in range(TASKS)},
        "full": {f"base_model.{name}" for name in everything},
        "full-norms": {f"base_model.{name}" for name in everything if "layer_norm" in name},
    }
    if method in own:
        assert trained == own[method]
    else:
        sites = 8 if method == "double_sequential" else 4
        assert len(trained) == 4 * sites and all(".adapter." in name for name in trained)


@every_method
def test_unload_and_disabled_give_the_untouched_model(method):
    plain_model, inputs = tiny_t5(), tiny_inputs("t5")
    plain_model.shared.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in plain_model.state_dict().items()}
    with torch.no_grad():
        plain = plain_model(**inputs).logits
        model = pemt_fast.get_model(plain_model, METHODS[method]())
        randomise(model, scale=0.1)
        adapted = model(**inputs, task_ids=MIXED).logits
        assert not torch.allclose(adapted, plain, atol=1e-2)
        for one in (model, copy.deepcopy(model)):
            with one.disabled():
                assert torch.equal(one(**inputs).logits, plain)
                with pytest.raises(RuntimeError, match="can neither be saved nor loaded"):
                    one.save_pretrained("nowhere")
            assert torch.equal(one(**inputs, task_ids=MIXED).logits, adapted)
        assert model.unload() is plain_model
        assert torch.equal(plain_model(**inputs).logits, plain)
    after = plain_model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert plain_model.lm_head.weight is plain_model.shared.weight
    assert not plain_model.shared.weight.requires_grad
    assert all(p.requires_grad for n, p in plain_model.named_parameters() if n != "shared.weight")
    # Free for another one.
    pemt_fast.get_model(plain_model, pemt_fast.LoraConfig())


@every_method
def test_files(method, tmp_path):
    model, inputs = baseline(method), tiny_inputs("t5")
    expected = model(**inputs, task_ids=MIXED).logits
    model.save_pretrained(tmp_path)
    again = pemt_fast.load(tiny_t5(), tmp_path)
    assert torch.equal(again(**inputs, task_ids=MIXED).logits, expected)
    assert again.adapter_config == model.adapter_config
    saved = load_file(tmp_path / "pemt_fast_model.safetensors")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], p) for name, p in trained.items())
    with pytest.raises(ValueError, match="only targets of one method that can share a model"):
        pemt_fast.load(tiny_t5(), [tmp_path, tmp_path])


@every_method
def test_tasks(method):
    model, inputs = baseline(method), tiny_inputs("t5")
    if method != "prompt-per-task":
        assert torch.equal(model(**inputs, task_ids=[7] * 4).logits, model(**inputs).logits)
        return
    with torch.no_grad():
        mixed = model(**inputs, task_ids=torch.tensor(MIXED)).logits
        alone = [model(**inputs, task_ids=[task] * 4).logits for task in range(TASKS)]
    for row, task in enumerate(MIXED):
        close(mixed[row], alone[task][row], 1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    unused = gradients(model, **inputs, task_ids=[0, 2, 0, 0])["prompt.prompts.1"]
    assert not bool(unused.any())
    with pytest.raises(ValueError, match="task_ids must give the task of each of the 4"):
        model(**inputs)
    with pytest.raises(ValueError, match="task_ids must be among 0: cb, 1: rte, 2: wic; got"):
        baseline(method, task_names=["cb", "rte", "wic"])(**inputs, task_ids=[0, 1, 3, 0])


@every_method
def test_greedy_generation_is_what_forward_prefers(method):
    """The cache of `generate` against whole passes."""
    model, inputs = baseline(method), tiny_inputs("t5")
    del inputs["labels"]
    found = model.generate(**inputs, task_ids=MIXED, max_new_tokens=6, suppress_tokens=[0, 1])
    decoded = torch.zeros(4, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(6):
            logits = model(**inputs, decoder_input_ids=decoded, task_ids=MIXED, use_cache=False)
            logits = logits.logits[:, -1]
            logits[:, :2] = -torch.inf
            decoded = torch.cat([decoded, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, decoded)


@every_method
def test_beams_of_a_batch_are_those_of_each_sequence(method):
    model, inputs = baseline(method), tiny_inputs("t5")
    del inputs["labels"]
    options = {"max_new_tokens": 6, "suppress_tokens": [0, 1], "num_beams": 4}
    found = model.generate(**inputs, task_ids=MIXED, num_return_sequences=2, **options)
    assert found.shape == (8, 7)
    for row, task in enumerate(MIXED):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone = model.generate(**one, task_ids=[task], num_return_sequences=2, **options)
        assert torch.equal(found[2 * row : 2 * row + 2], alone)
    with model.disabled():
        plain = model.generate(**inputs, **options)
    assert torch.equal(plain, tiny_t5().generate(**inputs, **options))


@pytest.mark.parametrize("reentrant", [False, True])
@every_method
def test_gradient_checkpointing(method, reentrant):
    changes = {"dropout": 0.2} if method in FORMS else {}
    model, inputs = baseline(method, **changes).train().double(), tiny_inputs("t5")
    torch.manual_seed(11)
    plain = gradients(model, **inputs, task_ids=MIXED)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.base_model.encoder.block[0].gradient_checkpointing
    torch.manual_seed(11)
    checkpointed = gradients(model, **inputs, task_ids=MIXED)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        close(checkpointed[name], grad, 1e-11)


@pytest.mark.parametrize("method", ["sequential", "double_sequential", "prompt-per-task", "full"])
def test_compiles_to_one_graph(method):
    torch._dynamo.reset()
    model, inputs = baseline(method), tiny_inputs("t5")
    task_ids = torch.tensor(MIXED)
    expected = gradients(model, **inputs, task_ids=task_ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, **inputs, task_ids=task_ids)
    for name, grad in expected.items():
        close(found[f"_orig_mod.{name}"], grad, 1e-5)


@every_method
def test_nothing_to_merge(method):
    model = baseline(method)
    with pytest.raises(ValueError, match="Config puts nothing beside a linear layer: there is"):
        model.merge(None if method != "prompt-per-task" else 0)
    assert not model.merged
    if "prompt" not in method:
        with pytest.raises(ValueError, match="model must have adapters on linear layers, got one"):
            pemt_fast.export_peft_lora(model, "nowhere")


@every_method
def test_the_trainer(method, tmp_path, capsys):
    model, inputs = baseline(method), tiny_inputs("t5")
    rows = [{**{n: t[b].tolist() for n, t in inputs.items()}, "task_ids": b % 3} for b in range(4)]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3,
        report_to=[], save_steps=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pemt_fast.AdapterTrainer(model, arguments, train_dataset=rows).train()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(before[n], t)}
    trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert moved == trained
    again = pemt_fast.load(tiny_t5(), tmp_path / "checkpoint-2")
    task_ids = torch.tensor(MIXED)
    expected = model.eval()(**inputs, task_ids=task_ids).logits
    assert torch.equal(again(**inputs, task_ids=task_ids).logits, expected)
    capsys.readouterr()
    model.print_trainable_parameters()
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert capsys.readouterr().out.startswith(f"trainable params: {counted:,} || all params: ")


@every_method
def test_half_precision(method):
    """A bfloat16 model; the adapters in float32 where there are any."""
    inputs = tiny_inputs("t5")
    expected = baseline(method)(**inputs, task_ids=MIXED).logits.detach()
    changes = {} if method.startswith("full") else {"adapter_dtype": "float32"}
    model = pemt_fast.get_model(tiny_t5().bfloat16(), METHODS[method](**changes))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in baseline(method).named_parameters():
            own[name].copy_(parameter)
    trained = torch.float32 if changes else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    found = model(**inputs, task_ids=MIXED).logits.detach()
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.1
    assert {g.dtype for g in gradients(model, **inputs, task_ids=MIXED).values()} == {trained}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pemt_fast.BottleneckConfig(form="serial"), r"form must be one of \['sequential',"),
        (lambda: pemt_fast.BottleneckConfig(bottleneck=0), "bottleneck must be an integer of at"),
        (lambda: pemt_fast.BottleneckConfig(reduction_factor=0), "reduction_factor must be pos"),
        (lambda: pemt_fast.BottleneckConfig(activation="swish"), "activation must be one of .*got"),
        (lambda: pemt_fast.BottleneckConfig(dropout=1), r"dropout must be in \[0, 1\), got 1"),
        (lambda: pemt_fast.BottleneckConfig(init_weights="lora"), "init_weights must be one of"),
        (lambda: pemt_fast.BottleneckConfig(leave_out=[-1]), r"leave_out must hold .*got \(-1,\)"),
        (lambda: pemt_fast.PromptTuningConfig(prompt_length=0), "prompt_length must be an integer"),
        (lambda: pemt_fast.PromptTuningConfig(prompt_init="text"), "prompt_init must be one of"),
        (
            lambda: pemt_fast.PromptTuningConfig(prompt_init="normal", description="words"),
            "description .* must be None with prompt_init='normal', got 'words'",
        ),
        (
            lambda: pemt_fast.PromptTuningConfig(num_tasks=2, description=["a", "b"]),
            r"description must hold one text per prompt \(1\), got \['a', 'b'\]",
        ),
        (lambda: pemt_fast.FullFineTuningConfig(num_tasks=0), "num_tasks must be an integer of at"),
        (lambda: pemt_fast.FullFineTuningConfig(task_names=[]), "task_names must hold one name"),
    ],
)
def test_bad_configs_name_the_field(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (pemt_fast.BottleneckConfig(reduction_factor=33), "must be at most d_model = 32, got 33"),
        (pemt_fast.BottleneckConfig(leave_out=[1, 4]), r"leave_out must name blocks below 4, got"),
        (pemt_fast.BottleneckConfig(feed_forward=False), "leave no sub-layer that would get an"),
        (pemt_fast.PromptTuningConfig(prompt_length=513), "prompt_length must be at most 512"),
        (pemt_fast.PromptTuningConfig(description="words"), "description needs a tokenizer"),
        (
            pemt_fast.FullFineTuningConfig(target_modules=("dense",)),
            r"target_modules \('dense',\) name no module with weights; there are .*'wo'",
        ),
    ],
)
def test_configs_that_do_not_fit_leave_the_model_alone(config, message):
    model = tiny_t5()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        pemt_fast.get_model(model, config)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("config", [pemt_fast.BottleneckConfig(), pemt_fast.PromptTuningConfig()])
def test_methods_for_t5_say_so(config):
    with pytest.raises(TypeError, match="model must be a T5ForConditionalGeneration"):
        pemt_fast.get_model(tiny_llama(), config)


# --- bottleneck adapters -------------------------------------------------------------------------


def hub_adapter(adapter, form):
    """AdapterHub's `adapter_down`, `adapter_up` and scaling with the values of `adapter`."""
    act = nn.SiLU() if form == "double_sequential" else nn.ReLU()
    scaling = 4.0 if form == "parallel" else 1.0
    net = nn.Sequential(nn.Linear(D_MODEL, 6), act, nn.Linear(6, D_MODEL))
    net.load_state_dict({
        "0.weight": adapter.down.weight, "0.bias": adapter.down.bias,
        "2.weight": adapter.up.weight, "2.bias": adapter.up.bias,
    })  # fmt: skip
    return net, lambda u: net(u) * scaling


def hub_sublayer(form, adapter, f, x):
    """What AdapterHub's T5 makes of a sub-layer's output f, after dropout, and its input x."""
    read = {"sequential": f + x, "double_sequential": f, "parallel": x}[form]  # `pre_forward`
    # f around the adapter, in `forward` or of the parallel one in `post_forward`, where x follows.
    return (adapter(read) + f) + x


def hub_t5(ours, form):
    """A tiny T5 with AdapterHub's arithmetic and the adapters of `ours`; and those, by name."""
    model, nets = tiny_t5(), {}
    theirs = dict(ours.base_model.named_modules())
    inside = ".dropout" if form == "double_sequential" else ""
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(getattr(model, stack).block):
            last = len(block.layer) - 1
            places = [last, 0] if form == "double_sequential" else [last]
            for j in places:
                name, layer = f"{stack}.block.{i}.layer.{j}{inside}", block.layer[j]
                net, adapter = hub_adapter(theirs[name].adapter, form)
                nets[name] = net

                def feed_forward(x, layer=layer, adapter=adapter):
                    f = layer.dropout(layer.DenseReluDense(layer.layer_norm(x)))
                    return hub_sublayer(form, adapter, f, x)

                def self_attention(x, attention_mask=None, layer=layer, adapter=adapter, **kwargs):
                    normed = layer.layer_norm(x)
                    out = layer.SelfAttention(normed, mask=attention_mask, **kwargs)
                    f = layer.dropout(out[0])
                    return hub_sublayer(form, adapter, f, x), *out[1:]

                layer.forward = feed_forward if j == last else self_attention
    model.requires_grad_(False)
    for net in nets.values():
        net.requires_grad_(True)
    return model, nn.ModuleDict({name.replace(".", "_"): net for name, net in nets.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_bottleneck_equals_adapterhub(form, dtype):
    ours = baseline(form).to(dtype)
    model, nets = hub_t5(ours, form)
    model, nets = model.to(dtype), nets.to(dtype)
    inputs, tolerance = tiny_inputs("t5"), 1e-12 if dtype == torch.float64 else 2e-6
    embeds = model.shared(inputs.pop("input_ids"))
    read = [embeds.clone().requires_grad_() for _ in range(2)]
    expected, found = model(inputs_embeds=read[0], **inputs), ours(inputs_embeds=read[1], **inputs)
    close(found.logits, expected.logits, tolerance)
    close(found.loss, expected.loss, tolerance)
    expected.loss.backward()
    found.loss.backward()
    close(read[1].grad, read[0].grad, tolerance)
    own = dict(ours.base_model.named_modules())
    for name, module in own.items():
        if isinstance(module, AdaptedSublayer):
            down, _, up = nets[name.replace(".", "_")]
            for mine, theirs in ((module.adapter.down, down), (module.adapter.up, up)):
                close(mine.weight.grad, theirs.weight.grad, tolerance)
                close(mine.bias.grad, theirs.bias.grad, tolerance)


def test_the_forms_have_adapterhubs_defaults():
    torch.manual_seed(0)
    for form, width, std in (
        ("sequential", 2, 0.02),
        ("double_sequential", 2, 0.02),
        ("parallel", 16, None),
    ):
        model = pemt_fast.get_model(tiny_t5(), pemt_fast.BottleneckConfig(form=form))
        config = model.adapter_config
        assert config.bottleneck == width and config.attention is (form == "double_sequential")
        adapters = [m for m in model.modules() if isinstance(m, BottleneckAdapter)]
        assert len(adapters) == (8 if config.attention else 4)
        down = torch.cat([a.down.weight.detach().flatten() for a in adapters])
        up = torch.cat([a.up.weight.detach().flatten() for a in adapters])
        assert not any(bool(layer.bias.any()) for a in adapters for layer in (a.down, a.up))
        if std is None:
            assert not bool(up.any()) and float(down.abs().max()) <= D_MODEL**-0.5
            assert float(down.abs().max()) > 0.95 * D_MODEL**-0.5
            with torch.no_grad():
                inputs = tiny_inputs("t5")
                assert torch.equal(model(**inputs).logits, tiny_t5()(**inputs).logits)
        else:
            assert abs(float(down.std()) / std - 1) < 0.15
            assert abs(float(up.std()) / std - 1) < 0.15
    wide = pemt_fast.BottleneckConfig(form="parallel", reduction_factor=0.5, attention=True)
    model = pemt_fast.get_model(tiny_t5(), wide)
    assert model.adapter_config.bottleneck == 64
    assert sum(isinstance(m, BottleneckAdapter) for m in model.modules()) == 8


@pytest.mark.parametrize("form", FORMS)
def test_the_sublayers_and_blocks_that_get_an_adapter(form):
    everywhere = pemt_fast.BottleneckConfig(
        form=form, attention=True, cross_attention=True, leave_out=(0, 3), init_weights="houlsby"
    )
    model = pemt_fast.get_model(tiny_t5(), everywhere)
    inside = ".dropout" if form == "double_sequential" else ""
    found = {n for n, m in model.base_model.named_modules() if isinstance(m, AdaptedSublayer)}
    blocks = {"encoder.block.1": 2, "decoder.block.0": 3}
    assert found == {f"{b}.layer.{i}{inside}" for b, count in blocks.items() for i in range(count)}
    values = torch.cat([t.flatten() for n, t in model.adapter_state_dict().items() if "wei" in n])
    assert 0.015 < float(values.abs().max()) <= 0.02
    assert abs(float(values.std()) / 0.0088 - 1) < 0.1  # of a normal cut at two deviations


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_still_recorded(form):
    plain_model, model, inputs = tiny_t5(), baseline(form, attention=True), tiny_inputs("t5")
    plain_model.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        plain, found = plain_model(**inputs, **options), model(**inputs, **options)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions",
                 "encoder_hidden_states", "decoder_hidden_states"):  # fmt: skip
        assert [t.shape for t in found[name]] == [t.shape for t in plain[name]]
    close(found.encoder_attentions[0], plain.encoder_attentions[0])
    assert not torch.allclose(found.encoder_attentions[1], plain.encoder_attentions[1], atol=1e-3)


def sublayer(reads_input, dropout=0.0, scale=0.3):
    """A linear layer as sub-layer, with its input times 100 as residual."""

    class Sublayer(nn.Linear):
        def forward(self, x):
            return 100 * x + super().forward(x)

    adapter = BottleneckAdapter(8, 3, 8, activation="gelu", bias=True, scale=scale)
    adapter.reset_parameters("normal")
    routing = Routing()
    routing.state = RoutingState()
    module = AdaptedSublayer(
        Sublayer(8, 8), adapter, routing, reads_input=reads_input, dropout=dropout
    )
    return randomise(module, scale=0.3)


@pytest.mark.parametrize("reads_input", [False, True])
def test_dropout_is_on_what_the_adapter_adds(reads_input):
    module, x = sublayer(reads_input, dropout=0.4).double(), torch.randn(2, 5, 8).double()
    y, adapter = module.base(x), module.adapter
    u = x if reads_input else y
    added = 0.3 * adapter.up(F.gelu(adapter.down(u)))
    close(module.eval()(x), y + added, 1e-13)
    torch.manual_seed(4)
    found = module.train()(x)
    torch.manual_seed(4)
    close(found, y + F.dropout(added, 0.4), 1e-13)
    assert not torch.allclose(found, y + added)


@pytest.mark.parametrize("reads_input", [False, True])
def test_the_residual_keeps_its_width(reads_input):
    """Under autocast, and where T5 in float16 has a float32 residual."""
    module, x = sublayer(reads_input), torch.randn(2, 5, 8)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, y = module(x), module.base(x)
    assert found.dtype == y.dtype == torch.float32
    added = (expected - module.base(x)).detach()
    error = (found - y).detach() - added
    assert float(error.norm() / added.norm()) < 0.02  # 8 bits of the addend
    module.base = nn.Identity()
    module.base.forward = lambda x: x.float()
    assert module(x.half()).dtype == torch.float32


def test_the_model_inside_cannot_be_called():
    with pytest.raises(RuntimeError, match="call the model that get_model returned"):
        baseline("sequential").base_model(**tiny_inputs("t5"))


# --- prompt tuning -------------------------------------------------------------------------------


def peft_prompt(ours):
    peft = pytest.importorskip("peft", reason="peft is a development dependency")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(tiny_t5(), config).eval()
    with torch.no_grad():
        own = theirs.prompt_encoder["default"].embedding.weight
        own[:5].copy_(ours.prompt.prompt)
    return theirs, own


@pytest.mark.parametrize("masked", [True, False])
def test_prompt_tuning_equals_peft(masked):
    ours, inputs = baseline("prompt"), tiny_inputs("t5")
    if not masked:
        del inputs["attention_mask"]
    theirs, own = peft_prompt(ours)
    expected, found = theirs(**inputs), ours(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    close(ours.prompt.prompt.grad, own.grad[:5])
    assert bool((own.grad[:5] != 0).all()) and not bool(own.grad[5:].any())


def test_prompts_start_from_the_vocabulary():
    table = tiny_t5().shared.weight

    def tokenizer(text):
        return {"input_ids": [len(word) for word in text.split()]}

    def prompts(tokenizer=None, **changes):
        config = pemt_fast.PromptTuningConfig(prompt_length=5, **changes)
        return pemt_fast.get_model(tiny_t5(), config, tokenizer).prompt.trained

    (repeated,) = prompts(tokenizer, description="to be or")
    assert torch.equal(repeated, table[[2, 2, 2, 2, 2]])
    (cut,) = prompts(tokenizer, description="a bb ccc dddd eeeee ffffff")
    assert torch.equal(cut, table[[1, 2, 3, 4, 5]])
    several = prompts(tokenizer, description=["a bb", "ccc"], num_tasks=2, per_task=True)
    assert torch.equal(several[0], table[[1, 2, 1, 2, 1]])
    assert torch.equal(several[1], table[[3, 3, 3, 3, 3]])
    (random,) = prompts()
    assert all(any(torch.equal(row, word) for word in table) for row in random)
    assert len({tuple(row.tolist()) for row in random}) > 1
    (normal,) = prompts(prompt_init="normal")
    assert not any(torch.equal(row, word) for row in normal for word in table)
    assert 0.8 < float(normal.detach().std()) < 1.2
    with pytest.raises(ValueError, match="description must hold at least one token, got ''"):
        prompts(tokenizer, description="")


def test_a_saved_prompt_needs_no_tokenizer(tmp_path):
    config = pemt_fast.PromptTuningConfig(prompt_length=2, description="words")
    model = pemt_fast.get_model(tiny_t5(), config, lambda text: {"input_ids": [5]})
    model.save_pretrained(tmp_path)
    again = pemt_fast.load(tiny_t5(), tmp_path)
    assert torch.equal(again.prompt.prompt, tiny_t5().shared.weight[[5, 5]])
    assert again.adapter_config == config


# --- full fine-tuning ----------------------------------------------------------------------------


def untied_t5():
    """As T5 v1.1: encoder and decoder share a table, the head has its own."""
    model = tiny_t5(gated=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    return model


def tied_llama():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


BUILDERS = {"t5": tiny_t5, "t5-untied": untied_t5, "llama": tiny_llama, "llama-tied": tied_llama}
every_model = pytest.mark.parametrize("kind", BUILDERS)


def step(model, inputs, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("targets", [None, ("o", "o_proj", "lm_head")], ids=["all", "some"])
@every_model
def test_full_training_equals_that_of_the_plain_model(kind, targets, tmp_path):
    inputs = tiny_inputs("llama" if "llama" in kind else "t5")
    plain, original = BUILDERS[kind](), BUILDERS[kind]()
    before = {n: t.clone() for n, t in original.state_dict().items()}
    if targets is not None:
        plain.requires_grad_(False)
        for name, module in plain.named_modules():
            if name.rpartition(".")[2] in targets:
                module.requires_grad_(True)
    step(plain, inputs, [p for p in plain.parameters() if p.requires_grad])
    config = pemt_fast.FullFineTuningConfig(target_modules=targets)
    model = pemt_fast.get_model(original, config)
    step(model, inputs, [p for p in model.parameters() if p.requires_grad])
    trained = plain.state_dict()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    tied = kind in ("t5", "llama-tied")
    embedding = original.get_input_embeddings()
    assert (original.lm_head.weight is embedding.weight) == tied
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "pemt_fast_model.safetensors")
    own = {f"base_model.{n}" for n, p in plain.named_parameters() if p.requires_grad}
    assert saved.keys() == own
    again = pemt_fast.load(BUILDERS[kind](), tmp_path)
    for name, tensor in again.base_model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    with model.disabled():
        assert (original.lm_head.weight is embedding.weight) == tied
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    model.unload()
    assert (original.lm_head.weight is embedding.weight) == tied
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.requires_grad for p in original.parameters())


@every_model
def test_full_generation_of_every_model(kind):
    inputs = tiny_inputs("llama" if "llama" in kind else "t5")
    del inputs["labels"]
    model = pemt_fast.get_model(BUILDERS[kind](), pemt_fast.FullFineTuningConfig())
    randomise(model, scale=0.1)
    plain = BUILDERS[kind]()
    plain.load_state_dict(model.base_model.state_dict())
    options = {"max_new_tokens": 5, "num_beams": 3, "suppress_tokens": [0, 1]}
    assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


def test_weights_follow_the_model():
    """The originals are outside of the module tree while their copies are trained."""
    model = pemt_fast.get_model(tiny_t5(), pemt_fast.FullFineTuningConfig())
    model.double()
    plain = model.unload()
    assert {p.dtype for p in plain.parameters()} == {torch.float64}
    assert plain.lm_head.weight is plain.shared.weight
    inputs = tiny_inputs("t5")
    assert torch.equal(plain(**inputs).logits, tiny_t5().double()(**inputs).logits)


def test_quantised_weights_cannot_be_trained():
    model = tiny_t5()
    model.lm_head.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head.weight is torch.int8: load the model without"):
        pemt_fast.get_model(model, pemt_fast.FullFineTuningConfig())
    config = pemt_fast.FullFineTuningConfig(target_modules=r"decoder\.block\.1\.layer\.0")
    model = pemt_fast.get_model(model, config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    start = "base_model.decoder.block.1.layer.0."
    parts = ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o")
    assert trained == {f"{start}{part}.weight" for part in (*parts, "layer_norm")}
