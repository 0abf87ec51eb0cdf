"""Files and outputs of AdapterHub's library `adapters`, for tests that do not have it.

    PYTHONPATH=build/adapterhub .venv/bin/python tests/helpers/adapterhub_exchange.py write FOLDER
    PYTHONPATH=build/adapterhub .venv/bin/python tests/helpers/adapterhub_exchange.py read FOLDER

`write` makes `base.safetensors`, the weights of a tiny T5, and a folder for each of `CASES`: what
the library saves of an adapter, and the model's logits with it. `read` loads every folder below
FOLDER that has an `adapter.safetensors` into that T5 and writes the logits beside it.
tests/golden/adapterhub is what `write` made with adapters 1.3.0.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
    "num_decoder_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 3, 8, 2, 7], [4, 4, 6, 1, 0, 0]])
LABELS = torch.tensor([[3, 8, 1], [6, 1, -100]])
HEAD = "head_beside_it"  # the one folder that keeps the files of the head


def cases():
    """Name -> the library's config, and whether its weights are saved as safetensors."""
    from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig

    return {
        "seq_bn": (SeqBnConfig(reduction_factor=2), True),
        "double_seq_bn": (DoubleSeqBnConfig(reduction_factor=3), True),
        "par_bn": (ParBnConfig(), False),
        "everywhere": (
            SeqBnConfig(
                mh_adapter=True, cross_adapter=True, leave_out=[1, 2], reduction_factor=0.5,
                non_linearity="gelu_new", scaling=0.7, dropout=0.1,
            ),
            True,
        ),
        "attention_only": (
            ParBnConfig(mh_adapter=True, output_adapter=False, init_weights="houlsby"), True
        ),
        "residual_after_sum": (
            BnConfig(
                mh_adapter=False, output_adapter=True, reduction_factor=100, non_linearity="gelu",
                original_ln_before=True, residual_before_ln=False, original_ln_after=False,
            ),
            True,
        ),
        HEAD: (SeqBnConfig(reduction_factor={"0": 4, "default": 4}), False),
    }  # fmt: skip


def inputs():
    return {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": LABELS}


def tiny_t5(base=None):
    """The T5 with the weights in the file `base`, or new ones."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SIZES, initializer_factor=0.5)).eval()
    if base is not None:
        odd = model.load_state_dict(load_file(base), strict=False)
        assert not odd.unexpected_keys and all("embed" in k or "head" in k for k in odd[0]), odd
        model.tie_weights()
    return model


@torch.no_grad()
def logits(model):
    return model(**inputs()).logits


def close(found, expected):
    """Up to rounding of this T5 in float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def with_library(base):
    import adapters

    model = tiny_t5(base)
    adapters.init(model)
    return model


def randomise(model, name):
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        if f".adapters.{name}." in key:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)


def save_flexible(folder, base, name):
    """A model with flexible heads names all of its T5 `transformer.…`."""
    from adapters import SeqBnConfig, T5AdapterModel
    from transformers import T5Config

    model = T5AdapterModel(T5Config(**SIZES))
    model.transformer.load_state_dict(load_file(base), strict=False)
    model.add_adapter(name, config=SeqBnConfig(reduction_factor=2))
    randomise(model, name)
    model.save_adapter(folder / name, name, with_head=False, use_safetensors=True)


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.safetensors"
    save_file(dict(tiny_t5().named_parameters()), base)
    for name, (config, safe) in cases().items():
        model = with_library(base)
        model.add_adapter(name, config=config)
        randomise(model, name)
        model.set_active_adapters(name)
        model.save_adapter(folder / name, name, use_safetensors=safe, with_head=name == HEAD)
        save_file({"logits": logits(model)}, folder / name / "logits.safetensors")
    save_flexible(folder, base, "flexible")
    model = with_library(base)
    model.load_adapter(str(folder / "flexible"), set_active=True, use_safetensors=True)
    save_file({"logits": logits(model)}, folder / "flexible" / "logits.safetensors")


def read(folder):
    for path in sorted(folder.glob("*/adapter.safetensors")):
        model, found = with_library(folder / "base.safetensors"), {}
        model.load_adapter(
            str(path.parent), use_safetensors=True, set_active=True, loading_info=found
        )
        assert not found["missing_keys"] and not found["unexpected_keys"], found
        save_file({"logits": logits(model)}, path.parent / "logits.safetensors")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
