"""Checkpoints of microsoft/mttl against its forward pass in plain torch.

The files are written here with the names and shapes of the source. Old layout, commit ce4ca51:
mttl/models/poly.py (PolyLoRALinear, PolytroponSelector, modify_with_poly), lora.py (LoRALinear),
utils.py and get_optimizer.py (which tensors a Lightning checkpoint keeps: a shared selector under
the first of its layers). New layout, commit 3724abf: mttl/models/modifiers/lora.py (LoRA,
SkilledLoRA), containers/{base,lora_containers}.py, containers/selectors/poly_selector.py, and the
files of base_model.py, library/expert_library.py and lightning/expert_module.py.
"""

import json
import re

import pytest
import torch
from linear_models import tiny_inputs, tiny_llama, tiny_model
from torch import nn

import pemt_fast
from pemt_fast import UNSEEN_TASK, load_mttl
from pemt_fast.interop import mttl_files

TASKS, SKILLS, RANK = 3, 4, 2
TASK_IDS = torch.tensor([2, 0, 1, 0])
LAYERS = r".*(SelfAttention|EncDecAttention)\.[qv]|.*DenseReluDense\.(wi|wo)"

# Granularity -> which layers share a selector, by the beginning of their names.
SHARED_BY = {
    "finegrained": lambda name: name,
    "layerwise": lambda name: name.split(".")[:5],
    "blockwise": lambda name: name.split(".")[:3],
    "coderwise": lambda name: name.split(".")[0],
    "coarsegrained": lambda name: "",
}


def layers_of(model, pattern=LAYERS):
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in linear.items() if re.fullmatch(pattern, name)}


def random(*shape, scale=0.4):
    return scale * torch.randn(*shape)


class Written:
    """Tensors of every layer under mttl's names, and what its forward pass adds to the layer.

    `factors(weights)` of a layer are A `[B, D, R]` and B `[B, R, H]` for weights `[B, P, K]`.
    """

    def __init__(self, layout, splits=1, shared="finegrained", rows=TASKS, pattern=LAYERS):
        torch.manual_seed(5)
        self.model = tiny_model("t5")
        self.layout, self.splits, self.scale = layout, splits, 1 / RANK
        self.skills, self.logits, self.saved = {}, {}, {}
        groups = {}
        for name, layer in layers_of(self.model, pattern).items():
            (H, D), P, K, R = layer.weight.shape, splits, SKILLS, RANK
            if layout == "old":
                tensors = {"lora_a": random(P, K, D // P, R), "lora_b": random(P, K, R, H // P)}
            elif layout == "new":
                tensors = {
                    "experts.lora_a": random(K, P, D // P, R),
                    "experts.lora_b": random(K, R, P, H // P),
                }
            else:
                tensors = {f"lora_a.e{k}": random(D, R) for k in range(K)}
                tensors |= {f"lora_b.e{k}": random(R, H) for k in range(K)}
            self.skills[name] = tensors
            self.saved |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
            group = str(SHARED_BY[shared](name))
            if group not in groups:
                groups[group] = random(rows, P * K, scale=2.0)
                if layout != "old":
                    groups[group] = torch.cat([groups[group], torch.zeros(1, P * K)])
                self.saved[f"{name}.selector.module_logits"] = groups[group]
            self.logits[name] = groups[group]

    def factors(self, name, weights):
        tensors = self.skills[name]
        if self.layout == "old":
            a = torch.einsum("bpk,pkdr->bpdr", weights, tensors["lora_a"]).flatten(1, 2)
            b = torch.einsum("bpk,pkrh->brph", weights, tensors["lora_b"]).flatten(2)
        elif self.layout == "new":
            a = torch.einsum("bpk,kpdr->bpdr", weights, tensors["experts.lora_a"]).flatten(1, 2)
            b = torch.einsum("bpk,krph->brph", weights, tensors["experts.lora_b"]).flatten(2)
        else:
            a = sum(
                w * tensors[f"lora_a.e{k}"]
                for k, w in enumerate(weights[:, 0].t()[..., None, None])
            )
            b = sum(
                w * tensors[f"lora_b.e{k}"]
                for k, w in enumerate(weights[:, 0].t()[..., None, None])
            )
        return a, b

    def hook(self, name, task_ids):
        def add(_, inputs, out):
            chosen = torch.sigmoid(self.logits[name][task_ids]).view(-1, self.splits, SKILLS)
            a, b = self.factors(name, chosen / (chosen.sum(-1, keepdim=True) + 1e-12))
            return out + self.scale * inputs[0].bmm(a).bmm(b)

        return add

    @torch.no_grad()
    def forward(self, task_ids=TASK_IDS):
        layers = layers_of(self.model)
        hooks = [layers[n].register_forward_hook(self.hook(n, task_ids)) for n in self.skills]
        logits = self.model(**tiny_inputs("t5")).logits
        for hook in hooks:
            hook.remove()
        return logits


def lightning(path, tensors, prefix="model.", **options):
    """A checkpoint of Lightning: beside the tensors its own counters and the options."""
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    torch.save(
        {
            "epoch": 0, "global_step": 25_000, "pytorch-lightning_version": "2.0.2",
            "state_dict": named, "loops": None, "hparams_name": "kwargs", "callbacks": {},
            "hyper_parameters": {
                "model_modifier": "poly_lora", "lora_rank": RANK, "lora_warmup": False,
                "poly_selector": "poly", "poly_average_correction": False, "n_tasks": TASKS,
                "module_logits_relaxed_bernoulli": True, "module_logits_learning_rate": 0.05,
                "output_dir": "/tmp", "_updated_kwargs": {}, "finetune_type": None, **options,
            },
        },
        path,
    )  # fmt: skip
    return path


def skilled(**changes):
    config = {"class_name": "mttl.models.modifiers.lora.SkilledLoRAConfig", "lora_rank": RANK}
    return {**config, "lora_alpha": 6.0, "lora_dropout": 0.1, "tie_params": None, **changes}


def poly_selector(**changes):
    name = "mttl.models.containers.selectors.poly_selector.PolySelectorConfig"
    config = {"class_name": name, "router_granularity": "*", "lora_merge_after": False}
    return {**config, "n_splits": 1, "task_names": ["a", "b", "c"], **changes}


def hugging_face(folder, tensors, selector, expert=None):
    """The directory that `save_pretrained` of a multi-expert model leaves."""
    torch.save({f"model.{name}": t for name, t in tensors.items()}, folder / "mttl_weights.bin")
    infos = [
        {"expert_name": f"e{k}", "training_config": None, "expert_config": expert or skilled()}
        for k in range(SKILLS)
    ]
    name = "mttl.models.expert_model.MultiExpertModelConfig"
    config = {"class_name": name, "base_model": "t5", "expert_infos": infos}
    (folder / "mttl_config.json").write_text(json.dumps({**config, "selector_config": selector}))
    return folder


@torch.no_grad()
def assert_same(adapted, expected, task_ids=TASK_IDS):
    actual = adapted.eval()(**tiny_inputs("t5"), task_ids=task_ids).logits
    plain = tiny_model("t5")(**tiny_inputs("t5")).logits
    assert float((expected - plain).norm() / plain.norm()) > 0.05  # the adapters do something
    assert float((actual - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "inferred"])
@pytest.mark.parametrize("shared", SHARED_BY)
@pytest.mark.parametrize("splits", [1, 4], ids=["poly", "mhr"])
def test_old_poly(splits, shared, stated, tmp_path):
    written = Written("old", splits, shared)
    options = {"poly_granularity": shared, "n_splits": splits} if stated else {}
    adapted = load_mttl(
        tiny_model("t5"), lightning(tmp_path / "last.ckpt", written.saved, **options)
    )
    assert_same(adapted, written.forward())
    config = adapted.adapter_config
    assert (config.num_tasks, config.num_skills, config.num_splits) == (TASKS, SKILLS, splits)
    assert (config.r, config.alpha, config.noise) == (RANK, 1.0, True)
    assert config.router_learning_rate == 0.05


def test_the_order_of_the_tensors_is_of_no_account(tmp_path):
    written = Written("old", 1, "blockwise")
    backwards = dict(reversed(written.saved.items()))
    path = lightning(tmp_path / "last.ckpt", backwards)
    assert_same(load_mttl(tiny_model("t5"), path), written.forward())


@pytest.mark.parametrize("shared", ["finegrained", "blockwise", "coarsegrained"])
@pytest.mark.parametrize("layout", ["new", "new, mhr", "named"])
def test_new_poly(layout, shared, tmp_path):
    layout, _, mhr = layout.partition(", ")
    splits = 4 if mhr else 1
    written = Written(layout, splits, shared)
    written.scale = 6.0 / RANK
    # The new layout tells selectors apart by a text within the names of the layers.
    granularity = {"finegrained": "*", "blockwise": None}.get(shared, shared)
    options = poly_selector(n_splits=splits, router_granularity=granularity)
    adapted = load_mttl(tiny_model("t5"), hugging_face(tmp_path, written.saved, options))
    assert_same(adapted, written.forward(), ["c", "a", "b", "a"])
    unknown = torch.full((4,), TASKS)
    assert_same(adapted, written.forward(unknown), torch.full((4,), UNSEEN_TASK))
    config = adapted.adapter_config
    assert (config.num_splits, config.alpha, config.dropout, config.noise) == (
        splits,
        6.0,
        0.1,
        False,
    )
    assert config.router_learning_rate == 0.1  # mttl's own, where none is stated


def test_new_granularity_is_the_beginning_of_a_name(tmp_path):
    """`block` is a selector for the encoder and one for the decoder."""
    written = Written("new", 1, "coderwise")
    options = poly_selector(router_granularity="block")
    selectors = {"class_name": "MultiSelectorConfig", "selectors": {"skilled_lora": options}}
    adapted = load_mttl(tiny_model("t5"), hugging_face(tmp_path, written.saved, selectors))
    written.scale = 6.0 / RANK
    assert_same(adapted, written.forward())


def test_new_granularity_is_held_against_the_tensors(tmp_path):
    saved = Written("new", 1, "blockwise").saved
    path = hugging_face(tmp_path, saved, poly_selector(router_granularity="block"))
    assert_refused(path, "with granularity 'block' 2 layers must have .*, found 4, see")


@pytest.mark.parametrize("key", ["module", "expert_weights"])
def test_a_directory_whose_file_keeps_tensors_beside_the_options(key, tmp_path):
    written = Written("new")
    written.scale = 6.0 / RANK
    info = {"expert_name": "one", "expert_config": skilled()}
    torch.save({key: written.saved, "expert_info": info}, tmp_path / "checkpoint.ckpt")
    assert_same(load_mttl(tiny_model("t5"), tmp_path), written.forward())


def test_lightning_of_the_new_layout_has_two_modules_around_the_model(tmp_path):
    written = Written("new")
    written.scale = 2.5 / RANK
    options = {
        "model_modifier": "skilled_lora",
        "lora_alpha": 2.5,
        "router_selector": "poly_router",
    }
    path = lightning(tmp_path / "best.ckpt", written.saved, "model.model.", **options)
    assert_same(load_mttl(tiny_model("t5"), path), written.forward())


def test_one_task_of_a_fine_tuned_model_needs_no_task_ids(tmp_path):
    for layout, options in (("old", {}), ("new", {"lora_alpha": 1.0})):
        written = Written(layout, rows=1 if layout == "old" else 0)
        written.scale = 1 / RANK
        path = tmp_path / f"{layout}.pt"
        torch.save(written.saved, path)
        adapted = load_mttl(tiny_model("t5"), path, options=options)
        assert_same(adapted, written.forward(torch.zeros(4, dtype=torch.int64)), None)


@pytest.mark.parametrize("layout", ["old", "new", "skilled", "named"])
def test_plain_lora(layout, tmp_path):
    """One skill without a selector; of the new layout from a library, with a `.meta` beside it."""
    model, saved, added = tiny_model("t5"), {}, {}
    alpha = 1.0 if layout == "old" else 6.0
    for name, layer in layers_of(model).items():
        H, D = layer.weight.shape
        a, b = random(D, RANK), random(RANK, H)
        added[name] = a @ b * alpha / RANK
        pair = {
            "old": (a.t(), b.t()), "new": (a, b), "named": (a, b),
            "skilled": (a.view(1, 4, -1, RANK), b.view(1, RANK, 4, -1)),
        }[layout]  # fmt: skip
        end = ".only" if layout == "named" else ""
        saved |= {f"{name}.lora_a{end}": pair[0], f"{name}.lora_b{end}": pair[1]}
    if layout == "old":
        path = lightning(tmp_path / "last.ckpt", saved, model_modifier="lora", n_splits=4)
    else:
        path = tmp_path / "only.ckpt"
        torch.save(saved, path)
        meta = {"expert_name": "only", "expert_deleted": False, "expert_config": skilled()}
        torch.save(meta, tmp_path / "only.meta")
    adapted = load_mttl(tiny_model("t5"), path)
    assert isinstance(adapted.adapter_config, pemt_fast.LoraConfig)
    assert adapted.adapter_config.dropout == (0.0 if layout == "old" else 0.1)
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            layer.weight += added[name].t()
        assert_same(adapted, model(**tiny_inputs("t5")).logits, None)


def test_target_modules_are_short_and_mean_no_other_layers(tmp_path):
    for pattern, expected in (
        (LAYERS, ("q", "v", "wi", "wo")),
        (r".*EncDecAttention\.[ko]", ("EncDecAttention.k", "EncDecAttention.o")),
        (r"decoder\..*SelfAttention\.q", tuple(
            f"decoder.block.{n}.layer.0.SelfAttention.q" for n in range(2))),
    ):  # fmt: skip
        written = Written("old", pattern=pattern)
        adapted = load_mttl(tiny_model("t5"), lightning(tmp_path / "last.ckpt", written.saved))
        assert adapted.adapter_config.target_modules == expected
        assert adapted.adapted_layers().keys() == written.skills.keys()


def test_options_are_added_and_win(tmp_path):
    written = Written("old")
    path = lightning(
        tmp_path / "last.ckpt", written.saved, lora_warmup=True,
        module_logits_relaxed_bernoulli=False, module_logits_learning_rate=None, tie_params="",
    )  # fmt: skip
    options = {"lora_warmup": False, "task_names": ["x", "y", "z"]}
    adapted = load_mttl(tiny_model("t5"), path, options=options)
    assert_same(adapted, written.forward(), ["z", "x", "y", "x"])
    assert adapted.adapter_config.noise is False
    assert adapted.adapter_config.router_learning_rate is None
    adapted.save_pretrained(tmp_path / "ours")
    assert_same(pemt_fast.load(tiny_model("t5"), tmp_path / "ours"), written.forward())


def test_a_decoder_only_model_whose_names_begin_as_the_prefix_does(tmp_path):
    saved = {}
    for name, layer in layers_of(tiny_llama(), r".*\.q_proj").items():
        H, D = layer.weight.shape
        saved |= {f"model.{name}.lora_a": random(D, 2), f"model.{name}.lora_b": random(2, H)}
    torch.save(saved, tmp_path / "mttl_weights.bin")
    adapted = load_mttl(tiny_llama(), tmp_path, options={"lora_alpha": 4})
    layer = adapted.adapted_layers()["model.layers.1.self_attn.q_proj"]
    stored = saved["model.model.layers.1.self_attn.q_proj.lora_b"]
    assert torch.equal(layer.mixture.w_up, stored)
    assert adapted.adapter_config.target_modules == ("q_proj",)


# --- what is refused ------------------------------------------------------------------------------


def assert_refused(path, message, error=ValueError, **arguments):
    """The model is left as it was, bit for bit."""
    plain = tiny_model("t5")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(error, match=message):
        load_mttl(plain, path, **arguments)
    after = plain.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not getattr(plain, "_pemt_fast_attached", False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("poly_average_correction", True), ("poly_use_shared_skill", True),
        ("module_logits_l2_norm", True), ("module_logits_straight_through", True),
        ("module_logits_dropout", 0.1), ("lora_warmup", True), ("poly_selector", "moe"),
        ("poly_selector", "private"), ("model_modifier", "poly_ia3"), ("tie_params", "q.lora_a"),
    ],
)  # fmt: skip
def test_options_without_counterpart_are_named(option, value, tmp_path):
    path = lightning(tmp_path / "last.ckpt", Written("old").saved, **{option: value})
    assert_refused(path, f"last.ckpt: {option} .*{value}.*has no counterpart here")


Q = "encoder.block.0.layer.0.SelfAttention.q"
LOGITS = "selector.module_logits"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_b": None}, r"q must have \['lora_a', 'lora_b'\].*\['lora_b'\] are missing"),
        ({f"{Q}.lora_a": None, f"{Q}.lora_b": None}, "q must have"),
        ({f"{Q}.{LOGITS}": None}, f"13 of 14 layers have {LOGITS}, '{Q}' has none"),
        ({f"{Q}.weight": random(32, 32)}, rf"nothing else, found \['model.{Q}.weight'\]"),
        ({f"{Q}.lora_a.x": random(32, 2)}, "missing or too many"),
        ({"encoder.block.7.q.lora_a": random(2)}, "no linear layer 'model.encoder.block.7.q'"),
        ({f"{Q}.lora_a": random(1, 4, 31, 2)}, "no shapes of mttl's .* of widths 32 and 32"),
        ({f"{Q}.lora_a": random(1, 4, 32, 3)}, r"\[1, 4, 32, 3\] and lora_b \[1, 4, 2, 32\]"),
        ({f"{Q}.lora_a": random(32, 2), f"{Q}.lora_b": random(2, 32)}, "have no shapes"),
        (
            {f"{Q}.lora_a": random(2, 4, 16, 2), f"{Q}.lora_b": random(2, 4, 2, 16)},
            r"same in all layers, got \['old', 2, 4, 2\] in .* and \['old', 1, 4, 2\]",
        ),
        (
            {f"{Q}.lora_a": random(1, 4, 32, 3), f"{Q}.lora_b": random(1, 4, 3, 32)},
            r"same in all layers, got \['old', 1, 4, 3\]",
        ),
        ({f"{Q}.{LOGITS}": random(3, 5)}, rf"{LOGITS} must be \[3, 4\], got \[3, 5\]"),
        (
            {"decoder.block.1.layer.2.DenseReluDense.wo." + LOGITS: random(2, 4)},
            r"must be \[3, 4\], got \[2, 4\]",
        ),
        ({f"{Q}.{LOGITS}": [1.0]}, "expected tensors only"),
    ],
)
def test_tensors_that_do_not_fit(changes, message, tmp_path):
    saved = {**Written("old", pattern=r".*\.q|.*\.w[io]").saved, **changes}
    saved = {name: tensor for name, tensor in saved.items() if tensor is not None}
    assert_refused(lightning(tmp_path / "last.ckpt", saved), message)


@pytest.mark.parametrize("shapes", [((32, 3), (3, 32)), ((2, 32), (32, 2))], ids=["rank", "old"])
def test_one_expert_that_is_not_like_the_others(shapes, tmp_path):
    saved = Written("named").saved
    saved |= {
        f"{Q}.lora_{part}.e1": random(*shape) for part, shape in zip("ab", shapes, strict=True)
    }
    torch.save(saved, tmp_path / "bare.pt")
    assert_refused(tmp_path / "bare.pt", f"{Q}.lora_a.e1 .* have no shapes of mttl's")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poly_granularity": "coderwise"}, "'coderwise' 2 layers must have .*, found 4, see"),
        ({"poly_granularity": "nowhere"}, "granularity 'nowhere' says nothing about layer"),
        ({"lora_rank": 8}, "lora_rank is 8, its tensors have 2"),
        ({"n_splits": 64}, "n_splits is 64, its tensors have 1"),
        ({"task_names": ["a", "b"]}, r"task_names must hold one name per task \(3\)"),
    ],
)
def test_options_against_the_tensors(options, message, tmp_path):
    path = lightning(tmp_path / "last.ckpt", Written("old", 1, "blockwise").saved, **options)
    assert_refused(path, message)


def test_what_the_new_layout_cannot_say(tmp_path):
    written = Written("new")
    path = tmp_path / "bare.pt"
    torch.save(written.saved, path)
    assert_refused(path, "does not state lora_alpha, pass options=")
    assert_refused(path, r"options must be of .*, got \['alpha'\]", options={"alpha": 1})
    torch.save({k: v for k, v in written.saved.items() if LOGITS not in k}, path)
    alpha = {"lora_alpha": 1}
    assert_refused(path, "holds 4 skills per layer and no selector.module_logits", options=alpha)
    torch.save({f"{Q}.lora_a": random(32, 32), f"{Q}.lora_b": random(32, 32)}, path)
    assert_refused(path, "have no shapes of mttl's", options=alpha)  # either layout's
    torch.save({f"{Q}.lora_a.one": random(2, 32), f"{Q}.lora_b.one": random(32, 2)}, path)
    assert_refused(path, "have no shapes of mttl's", options=alpha)  # the old layout's
    written.saved[f"{Q}.{LOGITS}"][-1, 0] = 1.0
    torch.save(written.saved, path)
    assert_refused(path, "the last row of .*q.selector.* must be uniform", options=alpha)
    torch.save({}, path)
    assert_refused(path, "holds no tensors")


def test_configs_without_counterpart(tmp_path):
    written = Written("new")
    other = skilled(class_name="mttl.IA3Config")
    torch.save({"state_dict": written.saved, "modifier_config": other}, tmp_path / "one.ckpt")
    assert_refused(tmp_path / "one.ckpt", "model_modifier must be one of .*, got 'IA3Config'")
    for selector, expert, message in (
        (poly_selector(class_name="m.PolySelectorDirectConfig"), None, "PolySelectorDirectConfig"),
        (poly_selector(lora_merge_after=True), None, "lora_merge_after = True has no counterpart"),
        (poly_selector(), skilled(class_name="mttl.IA3Config"), "got 'IA3Config'"),
        ({"selectors": {"lora": {}, "ia3": {}}}, None, "must have one selector, found"),
    ):
        assert_refused(hugging_face(tmp_path, written.saved, selector, expert), message)
    hugging_face(tmp_path, written.saved, poly_selector())
    config = json.loads((tmp_path / "mttl_config.json").read_text())
    config["expert_infos"][1]["expert_config"]["lora_alpha"] = 7.0
    (tmp_path / "mttl_config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, r"experts must be alike, they differ in \['lora_alpha'\]")
    (tmp_path / "mttl_config.json").write_text("{")
    assert_refused(tmp_path, "mttl_config.json: not valid JSON")


class Pickled:
    """Stands for a class of mttl's among the hyper-parameters."""


def test_files_that_cannot_be_read(tmp_path):
    path = lightning(tmp_path / "last.ckpt", Written("old").saved, modifier_config=Pickled())
    message = r"holds objects besides tensors and plain values \(\S*Pickled\)"
    assert_refused(path, message + ".*weights_only=False")
    path.write_bytes(path.read_bytes()[:100])
    assert_refused(path, "last.ckpt: truncated, damaged")
    torch.save([random(2)], path)
    assert_refused(path, "expected a dict of tensors, got list")
    assert_refused(tmp_path, "expected one of .*, found .'last.ckpt'", FileNotFoundError)
    assert_refused(tmp_path / "none.ckpt", "none.ckpt: file not found", FileNotFoundError)


def test_nothing_is_left_attached_when_filling_fails(tmp_path, monkeypatch):
    """Shapes are checked before; should one slip through, the model is taken back."""
    path = lightning(tmp_path / "last.ckpt", Written("old").saved)
    places = mttl_files.adapter_places
    monkeypatch.setattr(
        mttl_files, "adapter_places", lambda model, _, names: places(model, "other.", names)
    )
    assert_refused(path, "does not fit this model, see")


def test_a_model_with_adapters_is_refused(tmp_path):
    path = lightning(tmp_path / "last.ckpt", Written("old").saved)
    adapted = load_mttl(tiny_model("t5"), path)
    with pytest.raises(RuntimeError, match="already carries pemt_fast adapters"):
        load_mttl(adapted.base_model, path)
