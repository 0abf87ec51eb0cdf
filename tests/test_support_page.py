"""docs/support.md: every cell of its table of methods is tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_names import tiny_llama, tiny_t5

import pemt_fast

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
METHODS: dict[str, Callable[[], Any]] = {
    "`PemtConfig(stage=1)`": lambda: pemt_fast.PemtConfig(stage=1, target="a", prompt_length=3),
    "`PemtConfig`": lambda: pemt_fast.PemtConfig(sources=["a", "b"], target="c", prompt_length=3),
    "`LoraConfig`": lambda: pemt_fast.LoraConfig(),
    "`MultiLoraConfig`": lambda: pemt_fast.MultiLoraConfig(),
    "`MoeLoraConfig`": lambda: pemt_fast.MoeLoraConfig(num_tasks=2),
    "`MtlLoraConfig`": lambda: pemt_fast.MtlLoraConfig(num_tasks=2),
    "`MixLoraConfig`": lambda: pemt_fast.MixLoraConfig(),
    "`PolyConfig`": lambda: pemt_fast.PolyConfig(2),
    "`PolyConfig(num_splits=2)`": lambda: pemt_fast.PolyConfig(2, num_splits=2),
    "`CPolyConfig`": lambda: pemt_fast.CPolyConfig(2),
    "`PemlConfig`": lambda: pemt_fast.PemlConfig(prefix_length=2),
    "`BottleneckConfig`": lambda: pemt_fast.BottleneckConfig(),
    "`PromptTuningConfig`": lambda: pemt_fast.PromptTuningConfig(prompt_length=3),
    "`FullFineTuningConfig`": lambda: pemt_fast.FullFineTuningConfig(),
}
BATCH = {
    "input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]]),
    "labels": torch.tensor([[3, 1], [4, 1]]),
}


def _build(config: Any, base: Any = None) -> tuple[Any, dict[str, Any]]:
    model = pemt_fast.get_model(tiny_t5() if base is None else base, config)
    tasks = {"task_ids": torch.tensor([0, len(model.tasks) - 1])}
    return model, BATCH | tasks


def _runs(config: Any) -> None:
    model, batch = _build(config)
    model(**batch).loss.backward()


def _runs_decoder_only(config: Any) -> None:
    model, batch = _build(config, tiny_llama())
    model(input_ids=batch["input_ids"], labels=batch["input_ids"], task_ids=batch["task_ids"])


def _tells_tasks_apart(config: Any) -> None:
    assert _build(config)[0].adapter_config.uses_tasks


def _beams(config: Any) -> None:
    model, batch = _build(config)
    model.generate(batch["input_ids"], task_ids=batch["task_ids"], num_beams=2, max_length=4)


def _checkpoints(reentrant: bool) -> Callable[[Any], None]:
    def run(config: Any) -> None:
        model, batch = _build(config)
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    return run


def _merges(config: Any) -> None:
    model, _ = _build(config)
    model.merge(0)


def _exports(config: Any, folder: Path) -> None:
    pemt_fast.export_peft_lora(_build(config)[0], folder, task=0)


FEATURES: dict[str, Callable[..., None]] = {
    "T5": _runs,
    "decoder-only": _runs_decoder_only,
    "tells tasks apart": _tells_tasks_apart,
    "beams": _beams,
    "checkpointing": _checkpoints(reentrant=False),
    "re-entrant": _checkpoints(reentrant=True),
    "`merge`": _merges,
    "peft LoRA file": _exports,
}


def _table() -> dict[str, dict[str, str]]:
    """Cells by method and feature."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if row[1:] == list(FEATURES))
    rows = cells[start + 2 : start + 2 + len(METHODS)]
    return {row[0]: dict(zip(FEATURES, row[1:], strict=True)) for row in rows}


def test_the_table_has_every_method() -> None:
    assert list(_table()) == list(METHODS)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("method", METHODS)
def test_cell(method: str, feature: str, tmp_path: Path) -> None:
    arguments = (tmp_path,) if feature == "peft LoRA file" else ()
    torch.manual_seed(0)
    try:
        FEATURES[feature](METHODS[method](), *arguments)
        works = True
    except (ValueError, TypeError, AssertionError) as error:
        works, reason = False, error
    stated = _table()[method][feature]
    assert stated in ("yes", "–")
    assert works == (stated == "yes"), f"{stated}: {None if works else reason!r}"
