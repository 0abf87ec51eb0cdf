# SPDX-License-Identifier: Apache-2.0
"""`PemtFastTuner`: an `AttachedModel` where peft expects a tuner.

peft's model holds the tuner, the tuner holds the attached model as `model`, and that holds T5:
`PeftModel.get_base_model()` is the attached model, so every call ends in its `forward` or
`generate`. Nothing is computed here; what peft's machinery asks for is answered by the attached
model's own methods, or refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from pemt_fast.attached import AttachedModel
from pemt_fast.checkpoint import PEFT_PREFIX, PEFT_WEIGHTS_FILE, check_fits
from pemt_fast.integrations.peft.configs import PemtFastConfig, task_key
from pemt_fast.nn.wrapped_linear import WrappedLinear

_ONE = (
    "a model carries one pemt_fast adapter: several tasks share it (task_ids says which a sequence "
    "is for), and another one needs unload() first"
)


class PemtFastLayer(nn.Module, BaseTunerLayer):
    """What peft reads the status of: stands for all that is attached, and holds none of it.

    Args:
        tuner: Whose status it is.
    """

    adapter_layer_names = ("adapters",)

    def __init__(self, tuner: PemtFastTuner) -> None:
        super().__init__()
        self._tuner = (tuner,)  # in a tuple: not a child

    @property
    def adapters(self) -> nn.ModuleDict:
        """What the method trains, under the adapter's name; nothing while it is switched off."""
        (tuner,) = self._tuner
        own = tuner.trained_parameters() if tuner.model.routing.enabled else []
        return nn.ModuleDict({tuner.adapter_name: nn.ParameterList(own)})

    @property
    def active_adapter(self) -> list[str]:
        """The only one."""
        return [self._tuner[0].adapter_name]

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The only one, if its values are in the model's weights."""
        return self.active_adapter if self._tuner[0].model.merged else []

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return not self._tuner[0].model.routing.enabled


class PemtFastTuner(BaseTuner):
    """Made by peft for a `PemtFastConfig`.

    Attributes:
        model: The attached model.
        adapter_name: peft's name for what is attached.
    """

    prefix = "pemt_fast_"
    tuner_layer_cls = PemtFastLayer
    target_module_mapping: dict[str, list[str]] = {}
    # inject_adapter_in_model would leave a model without our forward: peft refuses it by this.
    uses_shared_state = True

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        # Before peft's constructor, which would write into the other adapters' configs.
        if hasattr(model, "peft_config"):
            raise RuntimeError(
                f"model, a {type(model).__name__}, carries adapters of peft already: unload() them "
                "first, several methods on one model do not know of each other"
            )
        super().__init__(model, *args, **kwargs)

    def inject_adapter(
        self, model: Any, adapter_name: str, *args: Any, low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Attach the method to `model`; called once, by the constructor."""
        if isinstance(self.model, AttachedModel):
            raise RuntimeError(f"add_adapter({adapter_name!r}): {_ONE}")
        if low_cpu_mem_usage or _on_meta():
            raise ValueError(
                "low_cpu_mem_usage must be False: adapters on the meta device would have no values"
            )
        # A copy follows the model; what the user passed stays as it is.
        config = cast(PemtFastConfig, copy.copy(self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        self.adapter_name = adapter_name
        self._awaits_weights = config.weights_follow
        attached = config.attach(model)
        config.tokenizer = None
        if config.task_type is None and getattr(model, "can_generate", bool)():
            is_seq2seq = getattr(model.config, "is_encoder_decoder", False)
            config.task_type = task_key("SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM")
        self.model = attached
        self._follow(config)
        self._disabled: Any = None
        # What the method itself freezes, such as the sources of PEMT, is never trained.
        own = attached.adapter_parameters()
        self._frozen = frozenset(name for name, p in own.items() if not p.requires_grad)
        if config.inference_mode:
            self.set_requires_grad(adapter_name, False)
        self.status = PemtFastLayer(self)

    def _follow(self, config: Any) -> None:
        config.__dict__["method_config"] = self.model.adapter_config

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a method of pemt_fast attaches as a whole")

    def trained_parameters(self) -> list[nn.Parameter]:
        """The attached parameters that the method trains, now frozen or not."""
        own = self.model.adapter_parameters()
        return [parameter for name, parameter in own.items() if name not in self._frozen]

    # --- running

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around every forward and generate of peft's model: what cannot be done is refused."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names has no meaning here: one adapter serves all tasks, and task_ids "
                "gives the task of each sequence"
            )
        self._check_has_weights()
        yield

    def _check_has_weights(self) -> None:
        if self._awaits_weights:
            raise RuntimeError(
                "the config came from a file and its weights were not loaded: "
                "PeftModel.from_pretrained(model, directory) loads both; to train anew, make a new "
                "config"
            )

    def disable_adapter_layers(self) -> None:
        """From here on the model computes what the untouched model computes."""
        if self._disabled is None:
            self._disabled = self.model.disabled()
            self._disabled.__enter__()

    def enable_adapter_layers(self) -> None:
        """End of `disable_adapter_layers`."""
        if self._disabled is not None:
            disabled, self._disabled = self._disabled, None
            disabled.__exit__(None, None, None)

    # --- one adapter, trained or not

    def _check_name(self, names: str | Sequence[str] | None) -> None:
        names = [names] if isinstance(names, str) else names
        if names is not None and list(names) != [self.adapter_name]:
            raise ValueError(
                f"there is only the adapter {self.adapter_name!r}, got {names}: {_ONE}"
            )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Train the adapter, or freeze it in `inference_mode`; it is the only one."""
        self._check_name(adapter_name)
        self.set_requires_grad(adapter_name, not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Train what the method trains, or nothing."""
        self._check_name(adapter_names)
        for parameter in self.trained_parameters():
            parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused: `unload` gives the model back."""
        raise RuntimeError(
            f"delete_adapter({adapter_name!r}): unload() takes the only adapter away"
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there is one adapter."""
        raise RuntimeError(f"add_weighted_adapter: {_ONE}")

    # --- merging

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *,
        task: int | str | None = None,
    ) -> None:  # fmt: skip
        """`AttachedModel.merge`: for one task, needed where there are several."""
        self._check_name(adapter_names)
        self.model.merge(task)
        if safe_merge and not _all_finite(self.model):
            self.model.unmerge()
            raise ValueError("safe_merge: merged weights would not be finite; nothing was merged")

    def unmerge_adapter(self) -> None:
        """`AttachedModel.unmerge`."""
        self.model.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None, *, task: int | str | None = None,
    ) -> Any:  # fmt: skip
        """`AttachedModel.merge_and_unload`: for one task, needed where there are several."""
        if safe_merge:
            self.merge_adapter(adapter_names, safe_merge, task=task)
        self._check_name(adapter_names)
        return self.model.merge_and_unload(task)

    def unload(self) -> Any:
        """`AttachedModel.unload`: the untouched model."""
        return self.model.unload()

    # --- files

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor],
        *args: Any, **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        tuner = model.base_model
        tuner._check_has_weights()
        # A finished search has changed the method's config; peft writes it after this.
        tuner._follow(config)
        names = [f"{PEFT_PREFIX}{name}" for name in tuner.model.adapter_state_dict()]
        return {name: state_dict[name] for name in names}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key  # there is none in it

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tuner = model.base_model
        if tuner.model.merged:
            raise RuntimeError("the adapters are merged into the weights: unmerge_adapter() first")
        # Embeddings of a resized vocabulary, which peft saves besides, are the model's own.
        own = {k.removeprefix(PEFT_PREFIX): v for k, v in state_dict.items()}
        others = tuner.model.state_dict().keys() - tuner.model.adapter_state_dict().keys()
        fitting = {name: tensor for name, tensor in own.items() if name not in others}
        check_fits(tuner.model, fitting, PEFT_WEIGHTS_FILE)
        tuner._awaits_weights = False
        return state_dict


def _all_finite(model: Any) -> bool:
    layers = (m for m in model.modules() if isinstance(m, WrappedLinear))
    return all(bool(layer.weight.isfinite().all()) for layer in layers)


def _on_meta() -> bool:
    """Whether new parameters would be on the meta device."""
    probe = nn.Module()
    probe.register_parameter("weight", nn.Parameter(torch.empty(0)))
    return next(probe.parameters()).is_meta


def _passing_on(peft_class: type[PeftModel]) -> type[PeftModel]:
    """`peft_class` with the forward of `PeftModel`, which passes every argument on.

    Its own takes `task_ids` and gives them to peft's Poly only.
    """
    text = f"`peft.{peft_class.__name__}` whose forward and generate take `task_ids`."
    values = {
        "__doc__": text, "__module__": __name__,
        "forward": PeftModel.forward, "generate": PeftModel.generate,
    }  # fmt: skip
    return type(peft_class.__name__, (peft_class,), values)


MODELS = {
    task_key("SEQ_2_SEQ_LM"): _passing_on(PeftModelForSeq2SeqLM),
    task_key("CAUSAL_LM"): _passing_on(PeftModelForCausalLM),
}
