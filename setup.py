"""Build script: the extension module `pemt_fast._C` and the CUDA library that it loads; everything
else is in pyproject.toml.

Two environment variables change it:

    PEMT_FAST_BUILD      1: an extension that cannot be built is an error; 0: build none;
                         unset: try, and warn when it fails
    PEMT_FAST_SANITIZE   instrument it, e.g. address,undefined (`make test-sanitizers`)

Without the extension the package is complete but for impl="cpu". Why it is missing is then left in
`pemt_fast/_C_missing.txt`, where `pemt_fast/ops/extension.py` finds it. The library for
impl="cuda" is compiled where nvcc is, see `csrc/build_cuda.py`.
"""

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build_cuda  # noqa: E402

MODE = os.environ.get("PEMT_FAST_BUILD", "")
SANITIZE = os.environ.get("PEMT_FAST_SANITIZE", "")
COMPILER = os.environ.get("CXX", "c++").split()[0]

obstacle = ""
if MODE == "0":
    obstacle = "it was left out with PEMT_FAST_BUILD=0"
elif shutil.which(COMPILER) is None:
    obstacle = f"no C++ compiler was found when the package was built ({COMPILER})"
else:
    try:
        from torch.utils.cpp_extension import BuildExtension as build_ext
        from torch.utils.cpp_extension import CppExtension as Extension
    except ImportError as error:
        obstacle = f"torch could not be imported when the package was built ({error})"


class BuildOrExplain(build_ext):
    """Leaves either the extension or the reason for its absence beside the Python files."""

    def run(self):
        package = Path("pemt_fast") if self.inplace else Path(self.build_lib, "pemt_fast")
        note = package / "_C_missing.txt"
        try:
            if obstacle:
                raise RuntimeError(obstacle)
            super().run()
            note.unlink(missing_ok=True)
        # Torch, setuptools and the compiler fail in ways of their own.
        except Exception as error:
            if MODE == "1":
                raise
            # What an earlier build left does not belong to these sources.
            for stale in package.glob("_C.*"):
                stale.unlink()
            # Else strict editable installations look for the file.
            self.extensions = []
            reason = obstacle or (
                "it could not be compiled; PEMT_FAST_BUILD=1 makes pip show the compiler's output "
                f"({' '.join(str(error).split())})"
            )
            package.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n", encoding="utf-8")
            self.warn(f"pemt_fast._C is not built, impl='cpu' will not run: {reason}")
        if self.extensions:
            self.build_cuda_library(package)

    def build_cuda_library(self, package):
        """Which needs the extension, and this neither torch nor a GPU."""
        if reason := build_cuda.build(package, Path("build", "cuda")):
            self.warn(f"pemt_fast/_cuda.so is not built, impl='cuda' will not run: {reason}")


flags = ["-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# torch's headers have hundreds of unused parameters.
flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
# Not -fopenmp: the OpenMP calls resolve to the runtime that torch has loaded, so there is only one.
link_flags = ["-ldl"]
if SANITIZE:
    flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
    # Finds nothing that AddressSanitizer does not find, and doubles the time to compile.
    flags += ["-fno-sanitize=object-size"]
    link_flags += [f"-fsanitize={SANITIZE}"]
else:
    flags += ["-O3", "-g0"]

extension = Extension(
    "pemt_fast._C",
    sources=sorted(glob("csrc/*.cpp") + glob("csrc/*/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("csrc/*/*.h")),
    extra_compile_args=flags,
    extra_link_args=link_flags,
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildOrExplain})
