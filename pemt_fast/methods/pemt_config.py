# SPDX-License-Identifier: Apache-2.0
"""`PemtConfig`: every choice of PEMT, checked when it is made.

Source: Lin et al., "PEMT: Multi-Task Correlation Guided Mixture-of-Experts Enables
Parameter-Efficient Transfer Learning", Findings of ACL 2024, and its code (github
JachinLin2022/PEMT). Where the released code has a defect the better choice is the default and
`published=True` gives the released behaviour; `docs/pemt.md` lists both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from pemt_fast.model import AdapterModel
    from pemt_fast.t5 import T5Model

SOURCE_KINDS = ("lora", "bottleneck")
PROMPT_INITS = ("vocabulary", "normal")
LOSS_TOKENS = ("real", "all")
ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class PemtConfig:
    """PEMT in either stage.

    Attributes:
        sources: Stage 2: the sources in the order of the gate, each a directory written by stage 1
            or a plain name for a freshly initialised one (tests, benchmarks). Stage 1: empty, or
            the target itself.
        target: Name of the task that is trained: the target, or the source in stage 1. Several
            names make a model of several targets over the same sources, each with its own prompt,
            gates, target adapter and layer norms; `task_ids` then says which a sequence is for.
        stage: 1 trains one source adapter and its prompt; 2 adapts to the target.
        source_rank: Bottleneck width of fresh sources (64 in the paper's code).
        source_ranks: One width per source instead; read from the files of trained sources.
        source_kind: `lora` (linear pair at `wo`, scale 1) or `bottleneck` (with gelu, biases and
            the layer's input as residual).
        target_reduction: The target adapter's bottleneck is `d_model // target_reduction`.
        target_bottleneck: That width itself, instead.
        prompt_length: Prompt positions, or one number per target; by default the number of tokens
            of the description.
        source_prompt_lengths: The same per fresh source.
        aux_weight: Weight of the Task Sparsity Loss.
        published: Follow the released code where it has defects: prompt rows from N(0, 1), loss
            over padding too, both factors of a new source adapter Kaiming-uniform, trained layer
            norms in stage 1 of `bottleneck` sources.
        description: One sentence on the task, or one per target; by default that of the known task
            named `target`.
        prompt_init: `vocabulary` (rows of the embedding table) or `normal`; None: by `published`.
        loss_tokens: `real` or `all` positions in the Task Sparsity Loss; None: by `published`.
        prompt_dropout: Dropout on the attention over source prompts, in training.
        train_layer_norms: Train T5's layer norms; None: in stage 2 (in stage 1 see `published`).
        gate_threshold: At inference experts whose gate weight is below it are dropped and the
            others weighted up to a sum of 1; 0 drops none. An expert that no sequence uses costs
            nothing. Can be changed later: `model.gate_threshold`.
        adapter_dtype: Dtype of what is attached; None: the model's.
        recompute: Keep half of what a layer keeps for backward and compute the target adapter and
            the loss twice. For T5's own layers there is gradient checkpointing besides.
        impl: Implementation of the operator, see `adapter_mixture`.
    """

    sources: Sequence[str] = ()
    target: str | Sequence[str] = "target"
    stage: int = 2
    source_rank: int = 64
    source_ranks: Sequence[int] | None = None
    source_kind: str = "lora"
    target_reduction: int = 16
    target_bottleneck: int | None = None
    prompt_length: int | Sequence[int] | None = None
    source_prompt_lengths: Sequence[int] | None = None
    aux_weight: float = 0.1
    published: bool = False
    description: str | Sequence[str] | None = None
    prompt_init: str | None = None
    loss_tokens: str | None = None
    prompt_dropout: float = 0.1
    train_layer_norms: bool | None = None
    gate_threshold: float = 0.0
    adapter_dtype: str | None = None
    recompute: bool = False
    impl: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            raise TypeError(f"sources must be a list of names or directories, got {self.sources!r}")
        for name in ("sources", "source_ranks", "source_prompt_lengths"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "sources", tuple(str(s) for s in self.sources))
        self._check_targets()
        self._check_choices()
        self._check_sources()

    def _check_choices(self) -> None:
        _require("stage", self.stage, (1, 2))
        _require("source_kind", self.source_kind, SOURCE_KINDS)
        _require("prompt_init", self.prompt_init, (None, *PROMPT_INITS))
        _require("loss_tokens", self.loss_tokens, (None, *LOSS_TOKENS))
        _require("adapter_dtype", self.adapter_dtype, (None, *ADAPTER_DTYPES))
        for name in ("source_rank", "target_reduction", "target_bottleneck"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"prompt_dropout must be in [0, 1), got {self.prompt_dropout}")
        if not 0 <= self.gate_threshold < 1:
            raise ValueError(f"gate_threshold must be in [0, 1), got {self.gate_threshold}")
        if self.aux_weight < 0:
            raise ValueError(f"aux_weight must not be negative, got {self.aux_weight}")

    def _check_targets(self) -> None:
        for name in ("target", "prompt_length", "description"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                # One target is a single one however it is written.
                object.__setattr__(self, name, value[0] if len(value) == 1 else tuple(value))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"target must hold different names, got {list(self.tasks)}")
        for name in self.tasks:
            if not name or "/" in name or "." in name:
                raise ValueError(f"target must be a task name without '/' or '.', got {name!r}")
        if self.stage == 1 and len(self.tasks) > 1:
            raise ValueError(f"stage 1 trains one task, got the targets {list(self.tasks)}")
        for name in ("prompt_length", "description"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.tasks):
                raise ValueError(
                    f"{name} must hold one value per target ({len(self.tasks)}), got {list(value)}"
                )
        for length in self.per_target("prompt_length"):
            if length is not None and length < 1:
                raise ValueError(f"prompt_length must be at least 1, got {length}")

    def _check_sources(self) -> None:
        if self.stage == 1 and self.sources == (self.target,):
            object.__setattr__(self, "sources", ())
        if self.stage == 1 and self.sources:
            raise ValueError(
                "stage 1 trains one source, named by target, and has no sources of its own, "
                f"got {list(self.sources)}"
            )
        if self.stage == 2 and not self.sources:
            raise ValueError("stage 2 needs at least one source, got none")
        for name in ("source_ranks", "source_prompt_lengths"):
            value = getattr(self, name)
            if value is not None and (len(value) != len(self.sources) or min(value) < 1):
                raise ValueError(
                    f"{name} must hold one positive number per source ({len(self.sources)}), "
                    f"got {list(value)}"
                )
        if len(set(self.sources)) != len(self.sources):
            raise ValueError(f"sources must differ, got {list(self.sources)}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The targets; `task_ids` are their numbers in this order."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target)

    @property
    def uses_tasks(self) -> bool:
        """Always: `task_ids` are checked even where there is one target."""
        return True

    def per_target(self, name: str) -> tuple[Any, ...]:
        """A field that holds one value, or one per target: one per target."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.tasks)

    @property
    def trains_layer_norms(self) -> bool:
        """Whether T5's layer norms are trained."""
        if self.train_layer_norms is not None:
            return self.train_layer_norms
        return self.stage == 2 or (self.published and self.source_kind == "bottleneck")

    @property
    def masks_padding(self) -> bool:
        """Whether the Task Sparsity Loss leaves out padding."""
        default = "all" if self.published else "real"
        return (self.loss_tokens or default) == "real"

    @property
    def draws_prompt_from(self) -> str:
        """`vocabulary` or `normal`."""
        return self.prompt_init or ("normal" if self.published else "vocabulary")

    def attach(
        self, model: T5Model, tokenizer: PreTrainedTokenizerBase | None, *, reads_sources: bool
    ) -> AdapterModel:
        """Build PEMT on `model`; called by `get_model` and `load`.

        Without `reads_sources` all sources are names, whatever directories exist: `load` has their
        weights from its own file.
        """
        from pemt_fast.methods.pemt import attach

        return attach(model, self, tokenizer, sources=None if reads_sources else ())

    @staticmethod
    def join(
        directories: Sequence[str],
        configs: Sequence[PemtConfig],
        weights: Sequence[Mapping[str, Tensor]],
    ) -> tuple[PemtConfig, dict[str, Tensor]]:
        """Saved targets as one model of several; called by `load`."""
        from pemt_fast.methods.pemt_targets import join

        return join(directories, configs, weights)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values with the method's name."""
        return {"method": "pemt", **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> PemtConfig:
        """Inverse of `to_dict` without the method's name; unknown keys are an error."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown PemtConfig keys {unknown}; expected {sorted(known)}")
        return cls(**values)  # type: ignore[arg-type]


def _require(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
