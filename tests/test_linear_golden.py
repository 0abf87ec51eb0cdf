"""One adapted layer against what the published code of its method computed.

`tests/golden/linear`: github pUmpKin-Co/MTL-LoRA, commit 7848a70.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pemt_fast
from pemt_fast.nn.routing import Routing, RoutingState

GOLDEN = Path(__file__).parent / "golden" / "linear"
DTYPES = {"float32": ("outputs", 1e-5, 1e-4), "float64": ("outputs64", 1e-12, 1e-12)}


def multi_lora(made, weights):
    config = pemt_fast.MultiLoraConfig(
        r=made["r"], alpha=made["lora_alpha"], num_adapters=made["lora_num"]
    )
    return config, {
        "mixture.w_down": weights["lora_A"].flatten(0, 1),
        "mixture.w_up": weights["lora_B"].transpose(1, 2).flatten(0, 1),
        "scaling": weights["lora_scaling"],
    }


def mtl_lora(made, weights):
    config = pemt_fast.MtlLoraConfig(
        made["lambda_num"], num_up=made["B_num"], temperature=made["B_scale"], r=made["r"],
        alpha=made["lora_alpha"],
    )  # fmt: skip
    return config, {
        "a": weights["lora_A"][0],
        "transforms": weights["lora_lambdas"],
        "b": weights["lora_B"].transpose(1, 2),
        "logits": weights["lora_B_w"],
    }


def moe_lora(made, weights):
    config = pemt_fast.MoeLoraConfig(
        made["task_num"], num_experts=made["expert_num"], r=made["r"], alpha=made["lora_alpha"],
        embedding_width=made["task_embedding_dim"],
    )  # fmt: skip
    experts = range(made["expert_num"])
    return config, {
        "mixture.w_down": torch.cat([weights[f"lora_A.loraA.{e}.weight"] for e in experts]),
        "mixture.w_up": torch.cat([weights[f"lora_B.loraB.{e}.weight"].t() for e in experts]),
        "router.embedding": weights["lora_task_embedding.weight"],
        "router.w_gate": weights["lora_gate.GateL.weight"],
    }


CASES = {"multilora": multi_lora, "mtl_lora": mtl_lora, "moelora": moe_lora}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_published_layer(case, dtype):
    folder = GOLDEN / case
    meta = json.loads((folder / "meta.json").read_text())
    file, output_tolerance, gradient_tolerance = DTYPES[dtype]
    wide = getattr(torch, dtype)
    weights = {n: t.to(wide) for n, t in load_file(folder / "weights.safetensors").items()}
    inputs = load_file(folder / "inputs.safetensors")
    reference = load_file(folder / f"{file}.safetensors")
    config, own = CASES[case](meta["constructor"], weights)
    base = nn.Linear(*weights["weight"].shape[::-1], bias=False).to(wide)
    base.weight.data.copy_(weights["weight"])
    base.requires_grad_(False)
    routing = Routing()
    layer = config.wrap(base, routing).to(wide)
    parameters = {n: p for n, p in layer.named_parameters() if not n.startswith("base.")}
    assert parameters.keys() == own.keys()
    for name, tensor in own.items():
        parameters[name].data.copy_(tensor)
    x = inputs["x"].to(wide).requires_grad_()
    with routing.use(RoutingState(task_ids=inputs["task_ids"])):
        out = layer(x)
    out.backward(inputs["grad_output"].to(wide))
    torch.testing.assert_close(out, reference["output"], rtol=0, atol=output_tolerance)
    grads = {n.removeprefix("grad."): g for n, g in reference.items() if n.startswith("grad.")}
    _, expected = CASES[case](meta["constructor"], {**weights, **grads})
    found = {"x": x.grad, **{name: p.grad for name, p in parameters.items()}}
    for name, grad in {"x": grads["x"], **expected}.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=gradient_tolerance)
    if "output_merged" in reference:
        layer.merge()
        torch.testing.assert_close(
            layer.eval()(x.detach()), reference["output_merged"], rtol=0, atol=output_tolerance
        )
