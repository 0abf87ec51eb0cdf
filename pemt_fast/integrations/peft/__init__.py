# SPDX-License-Identifier: Apache-2.0
"""peft's own calls with the methods of this library; importing this module makes them work.

    import peft
    from pemt_fast.integrations.peft import CPolyConfig

    model = peft.get_peft_model(t5, CPolyConfig(num_tasks=3, task_type="SEQ_2_SEQ_LM"))
    model(**batch, task_ids=[0, 2, 1]).loss.backward()
    model.save_pretrained("c_poly")
    model = peft.PeftModel.from_pretrained(other_t5, "c_poly")

What comes out is a `peft.PeftModel`: transformers' trainer saves, resumes and reloads adapters
only, by that type. It holds a tuner (`tuner.py`) that holds what `pemt_fast.get_model` returns, and
computes the same, bit by bit. The configs (`configs.py`) are peft's because peft writes into a
config, and ours are frozen. `PemtFastConfig.of(config)` turns one of ours into its own.

Why a registered type and not a subclass of `PeftModel` alone: `from_pretrained`, `PeftConfig`,
`AutoPeftModelForSeq2SeqLM` and the state-dict functions all look a type up in peft's tables. Why
subclasses besides, for models with a `task_type`: theirs drop `task_ids` (`tuner.py`).

The way in is not public (`registration.py`); `guard.py` looks at it first, and the import fails
where a release has moved it. `docs/peft.md` says what works and what is refused.
"""

# isort: skip_file

from __future__ import annotations

try:
    import peft as _peft
except ImportError as error:
    raise ImportError(
        f"pemt_fast.integrations.peft needs peft: pip install 'pemt_fast[peft]' ({error})"
    ) from error

from pemt_fast.integrations.peft import guard

guard.check_internals(_peft)

from pemt_fast.checkpoint import PEFT_TYPE  # noqa: E402
from pemt_fast.integrations.peft import registration  # noqa: E402

registration.extend_enum(PEFT_TYPE)

from pemt_fast.integrations.peft.configs import CONFIGS, PemtFastConfig  # noqa: E402
from pemt_fast.integrations.peft.tuner import MODELS, PemtFastTuner  # noqa: E402

registration.register(PEFT_TYPE, PemtFastConfig, PemtFastTuner, MODELS)

BottleneckConfig = CONFIGS["bottleneck"]
CPolyConfig = CONFIGS["c_poly"]
FullFineTuningConfig = CONFIGS["full"]
LoraConfig = CONFIGS["lora"]
MixLoraConfig = CONFIGS["mix_lora"]
MoeLoraConfig = CONFIGS["moe_lora"]
MtlLoraConfig = CONFIGS["mtl_lora"]
MultiLoraConfig = CONFIGS["multi_lora"]
PemlConfig = CONFIGS["peml"]
PemtConfig = CONFIGS["pemt"]
PolyConfig = CONFIGS["poly"]
PromptTuningConfig = CONFIGS["prompt_tuning"]

__all__ = ["PemtFastConfig", "PemtFastTuner", *sorted(c.__name__ for c in CONFIGS.values())]
