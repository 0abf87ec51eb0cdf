# SPDX-License-Identifier: Apache-2.0
"""A prefix of keys and values as peft's `PREFIX_TUNING`, both ways, where it can say the same.

peft stores `prompt_embeddings [P, layers·2·d]`, keys of a layer before its values, and puts them
into the cache, so that the text begins at position P. Ours have no position. Where positions are
rotations, turning the keys by P positions makes both the same: `(R_{P+i}·q)·(R_P·k) = (R_i·q)·k`.

Not expressible: T5 and its relatives. There peft's prefix is in the decoder's self-attention only,
where T5 adds its bias of the relative position to the prefix too; ours has no bias, and is in the
encoder and in cross-attention as well. Nor models with learned positions, which peft's prefix
shifts under the text.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pemt_fast.attach import get_model
from pemt_fast.checkpoint import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE
from pemt_fast.interop.peft_files import write_peft
from pemt_fast.methods.peml import PemlConfig
from pemt_fast.nn.prefix_attention import AttentionPrefix
from pemt_fast.safe_files import allocate_at_most, count_elements, read_json, read_tensors

if TYPE_CHECKING:
    from pemt_fast.peml_model import PemlModel

# What their cosines depend on is the position alone.
_ROPE_TYPES = ("default", "linear", "llama3")


@torch.no_grad()
def export_peft_prefix(model: PemlModel, directory: str | os.PathLike[str]) -> None:
    """Write the prefix of a decoder-only model as one that `peft.PeftModel.from_pretrained` loads.

    The same outputs up to rounding. What is written is the finished prefix: its networks are not.

    Args:
        model: With a `PemlConfig`, whose search is over, on a model with rotary positions. LoRA
            beside the prefix has to be merged, and the merged model saved with it: peft has no
            place for both.
        directory: Created if needed; both files are written under temporary names and renamed.

    Raises:
        ValueError: peft's prefix tuning cannot say the same; the message names the reason.
    """
    prefixes: dict[str, AttentionPrefix] = getattr(model, "prefixes", dict)()
    base = model.base_model
    if not prefixes:
        raise ValueError(f"model must have a prefix, got a {type(model.adapter_config).__name__}")
    if model.adapter_config.searches:
        raise ValueError("model is still searched: discretise() first")
    if model.adapted_layers() and not model.merged:
        raise ValueError(
            "model must have no LoRA beside the prefix, or a merged one: merge() first"
        )
    rotary = _rotary(base)
    layers, shapes = base.config.num_hidden_layers, {(p.heads, p.width) for p in prefixes.values()}
    if len(shapes) > 1 or len(prefixes) != layers:
        raise ValueError(
            f"model must have a prefix of one size in all of its {layers} layers, got "
            f"{len(prefixes)} and the sizes {sorted(shapes)}"
        )
    rows: list[Tensor] = []
    for name, prefix in prefixes.items():
        key, value = prefix()  # [heads, P, width]
        length = key.shape[1]
        key = _turned(key, length, rotary, base.get_submodule(name))
        rows += [part.transpose(0, 1).reshape(length, -1) for part in (key, value)]
    heads, width = shapes.pop()
    config = {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "token_dim": heads * width,
        "num_attention_heads": heads, "num_layers": layers, "num_transformer_submodules": 1,
        "prefix_projection": False, "encoder_hidden_size": heads * width,
    }  # fmt: skip
    prompt = torch.cat(rows, 1).to(rows[1].dtype).contiguous().cpu()
    write_peft(base, config, {"prompt_embeddings": prompt}, directory)


@torch.no_grad()
def load_peft_prefix(model: Any, directory: str | os.PathLike[str]) -> PemlModel:
    """Attach a prefix that peft's `PREFIX_TUNING` wrote to a decoder-only model.

    As a `PemlConfig` without LoRA and without networks; the same outputs up to rounding.

    Args:
        model: Freshly loaded, with rotary positions.
        directory: With `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another kind of adapter, a prefix that cannot be said here, or tensors that do
            not fit; the message names it, and the model is left as it was.
    """
    path, weights = (Path(directory) / n for n in (PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE))
    if (kind := read_json(path).get("peft_type")) != "PREFIX_TUNING":
        raise ValueError(f"{path}: peft_type must be PREFIX_TUNING, got {kind!r}")
    tensors, _ = read_tensors(weights)
    prompt = tensors.get("prompt_embeddings")
    if len(tensors) != 1 or prompt is None or prompt.dim() != 2:
        raise ValueError(
            f"{weights}: expected prompt_embeddings of two dimensions and nothing else, found "
            f"{sorted(tensors)[:3]}"
        )
    rotary, length = _rotary(model), len(prompt)
    config = PemlConfig(prefix_length=length, prefix_depth=0, target_modules=())
    with allocate_at_most(prompt.numel(), count_elements(model.parameters()), path):
        adapted = get_model(model, config)
    prefixes = adapted.prefixes()
    widths = [2 * prefix.heads * prefix.width for prefix in prefixes.values()]
    if sum(widths) != prompt.shape[1]:
        adapted.unload()
        raise ValueError(
            f"{weights}: prompt_embeddings must have {sum(widths)} columns for this model, got "
            f"{prompt.shape[1]}"
        )
    for (name, prefix), rows in zip(prefixes.items(), prompt.split(widths, 1), strict=True):
        source: Any = prefix.source
        key, value = rows.to(source.both).chunk(2, 1)
        key = key.unflatten(1, (prefix.heads, prefix.width)).transpose(0, 1)
        key = _turned(key, -length, rotary, model.get_submodule(name))
        source.both.copy_(torch.cat([key.transpose(0, 1).flatten(1), value.to(key)], 1))
    return adapted


def _rotary(base: Any) -> Any:
    """What makes the cosines of the model's positions."""
    config = base.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "model must be decoder-only: peft's prefix of an encoder-decoder is in the decoder's "
            "self-attention alone and has positions there"
        )
    rotary = getattr(base.get_decoder(), "rotary_emb", None)
    if rotary is None:
        raise ValueError("model must have rotary positions (rotary_emb): peft shifts others")
    kind, scaling = getattr(rotary, "rope_type", None), getattr(rotary, "attention_scaling", 1.0)
    if kind not in _ROPE_TYPES or scaling != 1.0:
        raise ValueError(
            f"rotary positions must be of {list(_ROPE_TYPES)} and unscaled, got {kind!r} scaled by "
            f"{scaling}"
        )
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows:
        raise ValueError(
            f"every layer must attend to everything, there are {sorted(windows)}, which lose sight "
            "of peft's prefix"
        )
    return rotary


def _turned(key: Tensor, positions: int, rotary: Any, attention: Any) -> Tensor:
    """`key [heads, P, width]` turned by so many positions, in float32 at least."""
    rows = key[None].to(torch.promote_types(key.dtype, torch.float32))
    where = torch.full((1, key.shape[1]), positions, device=key.device)
    cos, sin = rotary(rows, where)
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    turned: Tensor = turn(rows, rows, cos, sin)[1]
    return turned[0]
