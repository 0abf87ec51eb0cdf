"""Tensors of more than 2³¹ elements on a CUDA device, where an offset in 32 bits overflows.

The incoming gradient is zero but for rows at both ends and around the boundary: these rows and all
gradients of parameters are then those of a small call on these rows alone.
"""

import pytest
import torch
from gpu_cases import DEVICE, IMPLS

from pemt_fast.testing import adapter_mixture_loop, assert_within_budget, make_inputs

pytestmark = pytest.mark.gpu

BOUNDARY = 2**31
BY_TOKEN = ("x", "gate", "base")

# Sizes and tokens; impl="torch" needs some 45 GiB for either.
CASES = {
    "x-and-out": ({"E": 4, "R": 16, "D": 2304, "H": 2304}, 2**20 + 3),
    "hidden-units": ({"E": 16, "R": 64, "D": 64, "H": 64}, 2**21 + 33),
}
GIB = 60


@pytest.fixture(autouse=True)
def _free_memory():
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def rows_of(T, width):
    """32 tokens at the beginning, at the end, and around the boundary of `[T, width]`."""
    middle = BOUNDARY // width
    starts = [0, middle - 16, T - 32]
    return torch.cat([torch.arange(start, start + 32) for start in starts]).unique().to(DEVICE)


def among_zeros(rows, places, T):
    """`rows` at `places` of T rows, the others 0."""
    return rows.new_zeros(T, rows.shape[1]).index_copy_(0, places, rows.detach())


def among_others(rows, places, T):
    """`rows` at `places` of T rows, the others random: to read or write another one shows."""
    others = torch.randn(T, rows.shape[1], dtype=rows.dtype, device=rows.device)
    return others.index_copy_(0, places, rows.detach()).requires_grad_()


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_beyond_32_bits(impl, case, recompute):
    sizes, T = CASES[case]
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < GIB:
        pytest.skip(f"needs {GIB} GiB of GPU memory, {free} are free")
    width = max(sizes["D"], sizes["E"] * sizes["R"])
    assert T * width > BOUNDARY
    rows = rows_of(T, width)
    small = make_inputs(len(rows), **sizes, gate="[B, E]", dtype=torch.bfloat16, device=DEVICE)
    inputs = small.replace(
        **{name: among_others(getattr(small, name), rows, T) for name in BY_TOKEN}
    )
    inputs = inputs.replace(grad_out=among_zeros(small.grad_out, rows, T))
    actual = inputs.gradients(impl=impl, recompute=recompute)
    assert torch.equal(actual["d_x"].any(1).nonzero().squeeze(1), rows), "gradients elsewhere"
    exact = small.to(torch.float64).gradients(impl="reference")
    eager = small.gradients(adapter_mixture_loop)
    for name, result in actual.items():
        found = result[rows] if name in ("out", "d_x", "d_gate", "d_base") else result
        assert_within_budget(name, found, exact[name], eager[name])
