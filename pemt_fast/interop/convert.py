# SPDX-License-Identifier: Apache-2.0
"""Files of one library written as another's, by way of the model: `pemt-fast convert`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pemt_fast.attach import load
from pemt_fast.interop.adapterhub_files import export_adapterhub, load_adapterhub
from pemt_fast.interop.mttl_files import load_mttl
from pemt_fast.interop.peft_files import export_peft_lora, export_peft_poly, load_peft
from pemt_fast.interop.published_pemt import load_published_pemt

# Kind of files -> what reads them.
READERS: dict[str, Callable[[Any, Path], Any]] = {
    "pemt_fast": load,
    "peft": load_peft,
    "mttl": load_mttl,
    "adapterhub": load_adapterhub,
    "published": lambda model, path: load_published_pemt(model, [path]),
}
WRITERS = ("pemt_fast", "peft_lora", "peft_poly", "adapterhub")


def convert(
    model: Any,
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    read_as: str,
    write_as: str = "pemt_fast",
    task: int | str | None = None,
    name: str = "adapter",
    published_sources: Sequence[str | os.PathLike[str]] = (),
    extra: str | os.PathLike[str] | None = None,
) -> None:
    """Read adapters as one library's and write them as another's; `model` ends without adapters.

    Args:
        model: The model that the adapters are for, freshly loaded.
        source: What to read: a directory, or a file where `read_as` has files.
        directory: Where to write.
        read_as: `pemt_fast`, `peft`, `mttl`, `adapterhub`, or `published`: a source (stage 1) of
            PEMT's authors, or with `published_sources` a target.
        write_as: `pemt_fast`, `peft_lora` (one task), `peft_poly` or `adapterhub`.
        task: For `peft_lora`: number or name of the task.
        name: For `adapterhub`: name of the adapter.
        published_sources: For `published`: the sources of the target, in the order of the gate.
        extra: For `published`: file with gates and layer norms.

    Raises:
        FileNotFoundError, ValueError: as the readers and writers do.
    """
    if read_as not in READERS:
        raise ValueError(f"read_as must be one of {', '.join(READERS)}, got {read_as!r}")
    if write_as not in WRITERS:
        raise ValueError(f"write_as must be one of {', '.join(WRITERS)}, got {write_as!r}")
    if read_as != "published" and (published_sources or extra):
        raise ValueError("published_sources and extra belong to read_as='published'")
    adapted: Any
    if published_sources:
        adapted = load_published_pemt(model, published_sources, target=source, extra=extra)
    else:
        adapted = READERS[read_as](model, Path(source))
    try:
        if write_as == "pemt_fast":
            adapted.save_pretrained(directory)
        elif write_as == "peft_lora":
            export_peft_lora(adapted, directory, task)
        elif write_as == "peft_poly":
            export_peft_poly(adapted, directory)
        else:
            export_adapterhub(adapted, directory, name=name)
    finally:
        adapted.unload()
