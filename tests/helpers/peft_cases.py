"""Every method with small sizes: the arguments of its config, for peft's door and for ours."""

import torch
from linear_models import tiny_inputs, tiny_model

import pemt_fast

_SOURCES = {
    "sources": ["a", "b", "c"], "source_rank": 4, "target_bottleneck": 8,
    "source_prompt_lengths": (6, 3, 4),
}  # fmt: skip
_PEML = {"r": 2, "prefix_length": 5, "prefix_width": 8}
_CELLS = [["linear", "skip"], ["gated", "none"], ["conv3", "mlp_gelu"]] * 2

# Name -> name of the config's class and its arguments.
CASES = {
    "pemt-stage-1": ("PemtConfig", {"stage": 1, "target": "t", "source_rank": 4}),
    "pemt-stage-2": ("PemtConfig", {**_SOURCES, "target": "t", "prompt_length": 5}),
    "pemt-targets": ("PemtConfig", {**_SOURCES, "target": ["t", "u", "v"], "prompt_length": 5}),
    "lora": ("LoraConfig", {"r": 4}),
    "multi-lora": ("MultiLoraConfig", {"r": 4, "num_adapters": 2}),
    "moe-lora": (
        "MoeLoraConfig", {"num_tasks": 3, "num_experts": 2, "r": 4, "embedding_width": 8},
    ),
    "mtl-lora": ("MtlLoraConfig", {"num_tasks": 3, "num_up": 2, "r": 4, "dropout": 0.1}),
    "mix-lora": ("MixLoraConfig", {"r": 2, "num_experts": 3}),
    "poly": ("PolyConfig", {"num_tasks": 3, "num_skills": 4, "r": 2}),
    "mhr": ("PolyConfig", {"num_tasks": 3, "num_skills": 3, "num_splits": 4, "r": 2}),
    "c-poly": ("CPolyConfig", {"num_tasks": 3}),
    "peml-search": ("PemlConfig", {**_PEML, "sharing": "architecture"}),
    "peml-found": ("PemlConfig", {**_PEML, "architecture": _CELLS}),
    "peml-shared": ("PemlConfig", {**_PEML, "sharing": "network", "architecture": _CELLS[:1]}),
    "prefix": ("PemlConfig", {"prefix_length": 5, "prefix_depth": 0, "target_modules": ()}),
    "bottleneck": ("BottleneckConfig", {"bottleneck": 4}),
    "prompt-tuning": ("PromptTuningConfig", {"prompt_length": 5}),
    "prompts": ("PromptTuningConfig", {"prompt_length": 5, "per_task": True, "num_tasks": 3}),
    "full": ("FullFineTuningConfig", {"target_modules": ("layer_norm", "lm_head")}),
}  # fmt: skip
TASK_IDS = [2, 0, 1, 0]


def method_config(case, **changes):
    """Ours."""
    name, arguments = CASES[case]
    return getattr(pemt_fast, name)(**{**arguments, **changes})


def door_config(case, **changes):
    """The door's of the same name."""
    from pemt_fast.integrations import peft as door

    name, arguments = CASES[case]
    return getattr(door, name)(**{**arguments, **changes})


def task_ids(model):
    """Some for the batch of `tiny_inputs`; the first task where the model has only one."""
    return TASK_IDS if len(model.tasks) > 1 else [0] * 4


def through_the_door(case, kind="t5", seed=7, **changes):
    """A tiny model with the method on it, by peft's own call."""
    import peft

    torch.manual_seed(seed)
    return peft.get_peft_model(tiny_model(kind), door_config(case, **changes))


def directly(case, kind="t5", seed=7, **changes):
    """The same by ours."""
    torch.manual_seed(seed)
    return pemt_fast.get_model(tiny_model(kind), method_config(case, **changes))


@torch.no_grad()
def logits(model, kind="t5", **changes):
    """Of the tiny batch, in evaluation mode."""
    model.eval()
    return model(**{**tiny_inputs(kind), "task_ids": task_ids(model), **changes}).logits
