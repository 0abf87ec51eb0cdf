# SPDX-License-Identifier: Apache-2.0
"""Tasks that choose one of several texts: WinoGrande, a target of the PEMT experiments."""

from __future__ import annotations

from pemt_fast.data.template import Task

MULTIPLE_CHOICE = (
    Task(
        "winogrande",
        "Fill the blank in the sentence with the option that common sense calls for.",
        dataset="allenai/winogrande",
        config="winogrande_xl",
        folder="winogrande__winogrande_xl",
        source_fields=(("sentence", "sentence"), ("option1", "option1"), ("option2", "option2")),
        label_column="answer",
        option_columns=("option1", "option2"),
        split_rule="large",
    ),
)
