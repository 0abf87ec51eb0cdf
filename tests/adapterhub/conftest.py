"""These tests need the library `adapters`, and that an older transformers: `make test-adapterhub`.

They run in a process of their own; `tests/test_adapterhub_library.py` starts it.
"""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("adapters") else ["test_*.py"]
