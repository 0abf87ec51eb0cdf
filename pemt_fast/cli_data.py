# SPDX-License-Identifier: Apache-2.0
"""What the commands say about data: the options they share."""

from __future__ import annotations

from typing import Annotated

import typer

from pemt_fast.data.style import LabelStyle, Prefix

LabelStyleOption = Annotated[LabelStyle, typer.Option(help="Targets: class names or numbers.")]
PrefixOption = Annotated[
    Prefix, typer.Option(help="In front of a text: nothing, 'cola ' (name) or 'cola: ' (colon).")
]
RecordedLabelStyle = Annotated[
    LabelStyle | None, typer.Option(help="Default: that of the adapters' run.")
]
RecordedPrefix = Annotated[Prefix | None, typer.Option(help="Default: that of the adapters' run.")]
MaxSourceLength = Annotated[
    int | None, typer.Option(help="Tokens of a text; default: the task's own, see 'tasks'.")
]
