# SPDX-License-Identifier: Apache-2.0
"""Data: from a task's name to token ids.

Read in this order: `template.py` (a row becomes two texts), `style.py` (in which form), `tasks.py`
(the table of data sets), `rows.py` and `load.py` (reading and cutting), `tokenization.py` (ids).
`natural_instructions.py` reads tasks from JSON files, `synthetic.py` makes tasks that need no data.
Nothing heavy is imported before a function that needs it is called.
"""

from pemt_fast.data.load import Source, Splits, available_splits, load_rows, load_splits
from pemt_fast.data.natural_instructions import load_natural_instructions
from pemt_fast.data.style import LabelStyle, Prefix, with_prefix
from pemt_fast.data.synthetic import SYNTHETIC_TASKS, make_examples, synthetic_tokenizer
from pemt_fast.data.tasks import COMMONSENSE_TASKS, SOURCE_TASKS, TARGET_TASKS, TASKS, get_task
from pemt_fast.data.template import Example, Task
from pemt_fast.data.tokenization import tokenize

__all__ = [
    "COMMONSENSE_TASKS",
    "SOURCE_TASKS",
    "SYNTHETIC_TASKS",
    "TARGET_TASKS",
    "TASKS",
    "Example",
    "LabelStyle",
    "Prefix",
    "Source",
    "Splits",
    "Task",
    "available_splits",
    "get_task",
    "load_natural_instructions",
    "load_rows",
    "load_splits",
    "make_examples",
    "synthetic_tokenizer",
    "tokenize",
    "with_prefix",
]
