"""Every row of the tables of block sizes for the GPU at hand: forward, backward, weights.

The fewest numbers of units and tokens that take each row; then each row forced on other numbers,
with tiles that are mostly empty, and so those that no call of these sizes takes.
"""

import itertools

import pytest
import torch
from gpu_cases import DEVICE, WIDTHS
from implementations import needs_triton

from pemt_fast.kernels import configs
from pemt_fast.testing import GATE_FORMS, assert_matches_oracle, make_inputs, poisoned_empty

pytestmark = [
    pytest.mark.gpu,
    needs_triton,
    # Poisoned memory comes with deterministic algorithms, of which cuBLAS says it has none.
    pytest.mark.filterwarnings("ignore:.*CuBLAS"),
]

# What stands for "any number" of the tables.
MOST_UNITS, MOST_TOKENS = 1024, 16385

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# Of the first device, with the rows that were tuned there.
KIND = configs.device_facts(torch.device(DEVICE, 0))[0] if torch.cuda.is_available() else "hopper"


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_empty():
        yield


def tables(element):
    """What a call looks into, by what for: the dictionary and the key of its rows."""
    return {
        "forward": (configs.TABLE, (KIND, element, False)),
        "backward": (configs.TABLE, (KIND, element, True)),
        "weights": (configs.SUMS, (KIND, element)),
    }


def rows_of(element):
    """Every row with its table and its place in it."""
    for name, (table, key) in tables(element).items():
        for place, row in enumerate(table[key]):
            yield name, place, row


def taken(element, N, T):
    """Table and place of the rows that a call with so many units and tokens takes."""
    found = {}
    for name, place, row in rows_of(element):
        if row.units >= N and row.tokens >= T:
            found.setdefault(name, place)
    return set(found.items())


def points():
    """Numbers of units and tokens that take a row which none before them took."""
    for element in DTYPES:
        units = {min(row.units, MOST_UNITS) for _, _, row in rows_of(element)}
        tokens = {min(row.tokens, MOST_TOKENS) for _, _, row in rows_of(element)}
        known = set()
        for N, T in itertools.product(sorted(units), sorted(tokens)):
            if taken(element, N, T) - known:
                known |= taken(element, N, T)
                yield pytest.param(element, N, T, id=f"{8 * element}bit-N{N}-T{T}")


def inputs_of(element, N, *lead, **options):
    """N units of adapters of nearly equal rank, at most 16 of them."""
    E = min(16, -(-N // 16))
    ranks = tuple(N // E + (e < N % E) for e in range(E))
    return make_inputs(*lead, R=ranks, dtype=DTYPES[element], device=DEVICE, **WIDTHS, **options)


@pytest.mark.parametrize("gate", GATE_FORMS[:2], ids=["percall", "pertoken"])
@pytest.mark.parametrize(("element", "N", "T"), list(points()))
def test_every_row_that_a_call_takes(element, N, T, gate):
    assert_matches_oracle(
        lambda seed: inputs_of(element, N, T, gate=gate, seed=seed), impl="triton"
    )


def every_row():
    for element in DTYPES:
        for name, place, row in rows_of(element):
            N = min(row.units, MOST_UNITS)
            row_id = f"{8 * element}bit-{name}-row{place}-N{N}"
            yield pytest.param(element, name, N, row.choice, id=row_id)


@pytest.fixture
def force(monkeypatch):
    """Puts a row that fits every call before the others of a table."""
    from pemt_fast.kernels import adapter_mixture

    def put(table, key, choice):
        row = configs.Row(configs.ANY, configs.ANY, choice)
        monkeypatch.setitem(table, key, (row, *table[key]))
        adapter_mixture.PLANS.clear()

    yield put
    adapter_mixture.PLANS.clear()


@pytest.mark.parametrize(("element", "table", "N", "choice"), list(every_row()))
def test_every_row_forced_on_few_tokens(force, element, table, N, choice):
    force(*tables(element)[table], choice)
    assert_matches_oracle(lambda seed: inputs_of(element, N, 3, 43, seed=seed), impl="triton")
