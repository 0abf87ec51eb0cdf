# SPDX-License-Identifier: Apache-2.0
"""Two choices that change a task's texts, and with them its scores.

`LabelStyle`, the target of a task with a closed set of answers:

* ``"name"``: the class name or the text of the chosen option, as in the published PEMT runs;
* ``"index"``: the class number from zero, as in Compacter's and ATTEMPT's; the letter of the option
  where the source shows letters (MMLU and the commonsense sets).

`Prefix`, what stands in front of the source; NAME is `Task.name`:

* ``"none"``: nothing, as in the published PEMT runs;
* ``"name"``: NAME and a space, ``cola sentence: ...``, as in T5's, Compacter's and ATTEMPT's texts;
* ``"colon"``: NAME, a colon and a space, ``cola: sentence: ...``, the default where several tasks
  share one model (`pemt-fast multitask`, `pretrain`).

Next: `template.py` writes the texts.
"""

from __future__ import annotations

from typing import Literal, get_args

LabelStyle = Literal["name", "index"]
Prefix = Literal["none", "name", "colon"]


def require_style(label_style: str, prefix: str = "none") -> None:
    """Raise `ValueError` unless both are known."""
    if label_style not in get_args(LabelStyle):
        raise ValueError(f"label_style must be 'name' or 'index', got {label_style!r}")
    if prefix not in get_args(Prefix):
        raise ValueError(f"prefix must be 'none', 'name' or 'colon', got {prefix!r}")


def with_prefix(source: str, name: str, prefix: Prefix) -> str:
    """Put a task's name in front of its source."""
    require_style("name", prefix)
    return {"none": source, "name": f"{name} {source}", "colon": f"{name}: {source}"}[prefix]
