"""What every test shares: offline libraries, a fixed seed, few threads, where the data is."""

import os
import tempfile
from pathlib import Path

# Read by the libraries when they are imported, hence before every other import. The cache lives as
# long as the session, so that no test depends on what an earlier run or the user has downloaded.
_CACHE = tempfile.TemporaryDirectory(prefix="pemt_fast-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HOME=_CACHE.name,
    PEMT_FAST_CACHE=f"{_CACHE.name}/pemt_fast",
)
# Processes beside each other: threads that wait by spinning would take the other one's core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU the Triton kernels run in its interpreter. Read when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).parents[1] / ".." / "shared"

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _shared_folder(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED / name


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Rows of real data sets in the hub's schema."""
    return _shared_folder("data")


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Inputs, weights and outputs of the published implementations."""
    return _shared_folder("golden")


# Triton's interpreter takes about a hundred times as long as a kernel: of each test so many of its
# cases, evenly spread. TRITON_CASES=all runs every one.
INTERPRETED_CASES = os.environ.get("TRITON_CASES", "6")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))
    if INTERPRETED_CASES == "all":
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is not None and "triton" in parameters.params.values():
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out = set()
    for found in cases.values():
        step = -(-len(found) // int(INTERPRETED_CASES))
        # An odd step meets every value of a parameter with an even number of them.
        step += step % 2 == 0
        left_out |= set(found) - set(found[::step])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
