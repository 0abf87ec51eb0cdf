# SPDX-License-Identifier: Apache-2.0
"""The single bottleneck adapter on T5, as AdapterHub has it: `nn/sublayer.py`.

Source: github adapter-hub/adapters, configuration/adapter_config.py (`SeqBnConfig`,
`DoubleSeqBnConfig`, `ParBnConfig`), methods/modeling.py, methods/bottleneck.py,
models/t5/modeling_t5.py. T5 has no layer norm behind a sub-layer, so their layer-norm switches
leave only the question of what the adapter reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pemt_fast.methods.task_config import ADAPTER_DTYPES, TaskConfig
from pemt_fast.nn.bottleneck import BottleneckAdapter
from pemt_fast.nn.routing import Routing
from pemt_fast.nn.sublayer import AdaptedSublayer
from pemt_fast.ops.validation import ACTIVATIONS
from pemt_fast.t5 import (
    Attachment,
    T5Model,
    block_number,
    check_t5,
    cross_attention_paths,
    feed_forward_sites,
    self_attention_paths,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pemt_fast.linear_model import LinearAdapterModel

# AdapterHub's name of an initialisation -> ours in `BottleneckAdapter.reset_parameters`.
_INITS = {"bert": "bert", "mam_adapter": "lora", "houlsby": "houlsby"}

# Form -> what the fields that are None become.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "sequential": {
        "activation": "relu", "reduction_factor": 16, "scale": 1.0,
        "init_weights": "bert", "attention": False,
    },
    "double_sequential": {
        "activation": "silu", "reduction_factor": 16, "scale": 1.0,
        "init_weights": "bert", "attention": True,
    },
    "parallel": {
        "activation": "relu", "reduction_factor": 2, "scale": 4.0,
        "init_weights": "mam_adapter", "attention": False,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(TaskConfig):
    """A bottleneck adapter behind sub-layers of T5; `task_ids` make no difference.

    A sub-layer computes `h = x + f`, `f = dropout(FF(layer_norm(x)))`, and with the adapter
    `A(u) = W_up·act(W_down·u + b_down) + b_up`

    * `sequential` (`seq_bn`, Pfeiffer et al., 2020): `z = h + s·A(h)`;
    * `double_sequential` (`double_seq_bn`, Houlsby et al., 2019): `z = h + s·A(f)`, at
      self-attention too;
    * `parallel` (`par_bn`, He et al., 2021): `z = h + s·A(x)`, `x` before the layer norm.

    Fields that are None take the form's value: activation relu, silu, relu; reduction 16, 16, 2;
    scale 1, 1, 4; initial values bert, bert, mam_adapter.

    Attributes:
        form: See above.
        reduction_factor: The bottleneck is `d_model // reduction_factor`.
        bottleneck: That width itself, instead.
        activation: A name of `adapter_mixture`.
        scale: s.
        dropout: On `s·A`, in training.
        feed_forward: Adapters at the feed-forward sub-layers (AdapterHub's `output_adapter`).
        attention: At the self-attention sub-layers (`mh_adapter`).
        cross_attention: At the cross-attention sub-layers (`cross_adapter`).
        leave_out: Numbers of the blocks without adapters; the decoder's follow the encoder's.
        init_weights: `bert` (both N(0, 0.02)), `houlsby` (both N(0, 0.01) cut at ±0.02) or
            `mam_adapter` (down Kaiming-uniform, up zero: the model starts unchanged); biases zero.
        num_tasks, task_names: As in `TaskConfig`.
        adapter_dtype: Dtype of the adapters; None: the model's.
        impl: Implementation of the operator, see `adapter_mixture`.
    """

    method: ClassVar[str] = "bottleneck"
    uses_tasks: ClassVar[bool] = False

    num_tasks: int = 1
    form: str = "sequential"
    reduction_factor: float | None = None
    bottleneck: int | None = None
    activation: str | None = None
    scale: float | None = None
    dropout: float = 0.0
    feed_forward: bool = True
    attention: bool | None = None
    cross_attention: bool = False
    leave_out: Sequence[int] = ()
    init_weights: str | None = None
    adapter_dtype: str | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one_of("form", tuple(_DEFAULTS))
        self.require_one_of("activation", (None, *ACTIVATIONS))
        self.require_one_of("init_weights", (None, *_INITS))
        self.require_one_of("adapter_dtype", (None, *ADAPTER_DTYPES))
        self.require_probability("dropout")
        if self.bottleneck is not None:
            self.require_at_least("bottleneck", 1)
        if self.reduction_factor is not None and not self.reduction_factor > 0:
            raise ValueError(f"reduction_factor must be positive, got {self.reduction_factor}")
        if not all(isinstance(block, int) and block >= 0 for block in self.leave_out):
            raise ValueError(f"leave_out must hold numbers of blocks, got {self.leave_out!r}")

    def complete(self, d_model: int) -> BottleneckConfig:
        """The config with nothing left to the form or to the model's width."""
        defaults = _DEFAULTS[self.form]
        config = replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})
        assert config.reduction_factor is not None
        width = config.bottleneck or int(d_model // config.reduction_factor)
        if width < 1:
            raise ValueError(
                f"reduction_factor must be at most d_model = {d_model}, "
                f"got {config.reduction_factor}"
            )
        return replace(config, bottleneck=width)

    def attach(
        self, model: T5Model, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> LinearAdapterModel:
        """Build the method on `model`; called by `get_model` and `load`."""
        from pemt_fast.linear_model import LinearAdapterModel

        check_t5(model)
        config, routing = self.complete(model.config.d_model), Routing()
        adapted = [(path, config.wrap(model, path, routing)) for path in config.places(model)]
        attachment = Attachment(model)
        for path, module in adapted:
            owner, _, last = path.rpartition(".")
            attachment.replace_module(model.get_submodule(owner), last, module)
        return LinearAdapterModel(model, config, routing, attachment).train(model.training)

    def places(self, model: T5Model) -> list[str]:
        """Dotted paths of the modules that get an adapter."""
        blocks = len(model.encoder.block) + len(model.decoder.block)
        if unknown := [block for block in self.leave_out if block >= blocks]:
            raise ValueError(f"leave_out must name blocks below {blocks}, got {unknown}")
        paths = [site.path for site in feed_forward_sites(model)] if self.feed_forward else []
        paths += self_attention_paths(model) if self.attention else []
        paths += cross_attention_paths(model) if self.cross_attention else []
        paths = [path for path in paths if block_number(model, path) not in self.leave_out]
        if not paths:
            raise ValueError(
                "feed_forward, attention, cross_attention and leave_out leave no sub-layer that "
                "would get an adapter"
            )
        # What leaves the sub-layer's dropout is f, before the residual is added.
        return [f"{path}.dropout" if self.form == "double_sequential" else path for path in paths]

    def wrap(self, model: T5Model, path: str, routing: Routing) -> AdaptedSublayer:
        """What stands in the place of the module at `path`; of a complete config."""
        assert self.bottleneck and self.activation and self.scale is not None
        assert self.init_weights is not None
        adapter = BottleneckAdapter(
            model.config.d_model, self.bottleneck, model.config.d_model,
            activation=self.activation, bias=True, scale=self.scale, impl=self.impl,
        )  # fmt: skip
        adapter.reset_parameters(_INITS[self.init_weights])
        dtype = getattr(torch, self.adapter_dtype) if self.adapter_dtype else model.dtype
        sublayer = model.get_submodule(path.removesuffix(".dropout"))
        adapter.to(device=next(sublayer.parameters()).device, dtype=dtype)
        return AdaptedSublayer(
            model.get_submodule(path), adapter, routing,
            reads_input=self.form == "parallel", dropout=self.dropout,
        )  # fmt: skip
