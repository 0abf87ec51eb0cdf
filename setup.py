"""Build script: a list of native extension modules, everything else is in pyproject.toml.

There is none yet: `pemt_fast._C` is added here, as `ext_modules`, with its first source in csrc/.
"""

from setuptools import setup

setup()
