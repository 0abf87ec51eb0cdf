"""Inputs of `skill_mixture`, its eager twin and the comparison with its oracle."""

import dataclasses
import math

import torch

from pemt_fast.ops.skill_mixture import skill_mixture
from pemt_fast.testing import assert_within_budget, lay_out

NAMES = ("x", "mixing", "a", "b", "base")
LINEAR_NAMES = ("weight", "bias")


@dataclasses.dataclass(frozen=True)
class SkillInputs:
    """The arguments of one call, and the gradient that its output receives."""

    x: torch.Tensor
    mixing: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    task_ids: torch.Tensor | None
    base: torch.Tensor | None
    grad_out: torch.Tensor
    scale: float
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def tensors(self):
        named = {name: getattr(self, name) for name in (*NAMES, *LINEAR_NAMES)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def to(self, dtype):
        named = {**self.tensors(), "grad_out": self.grad_out}
        return self.replace(
            **{
                name: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
                for name, t in named.items()
            }
        )

    def call(self, function=skill_mixture, **options):
        if self.weight is not None:
            options |= {"weight": self.weight, "bias": self.bias}
        return function(
            self.x, self.mixing, self.a, self.b,
            task_ids=self.task_ids, base=self.base, scale=self.scale, **options,
        )  # fmt: skip

    def gradients(self, function=skill_mixture, **options):
        out = self.call(function, **options)
        leaves = {name: t for name, t in self.tensors().items() if t.requires_grad}
        grads = torch.autograd.grad(out, tuple(leaves.values()), self.grad_out)
        named = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {"out": out.detach(), **named}


def make_skills(
    *lead, M=5, K=8, P=1, R=4, D=60, H=96, ids="random", base=True, scale=0.5,
    dtype=torch.float32, param_dtype=None, mixing_dtype=None, base_dtype=None,
    layout="contiguous", param_layout="contiguous", requires_grad=True, seed=0, mixes=True,
    linear=False, bias=True,
):  # fmt: skip
    """Random inputs of unit scale. `ids`: random, repeated (three tasks) or None (M rows as is).

    P = 0 stands for parameters without a dimension for splits. Without `mixes` the M skills are the
    factors of the tasks. `linear`: a linear layer in the place of the base.
    """
    if not mixes:
        K, P = M, 0
    generator = torch.Generator().manual_seed(seed)
    wanted = (*NAMES, *LINEAR_NAMES) if requires_grad is True else requires_grad or ()
    splits, split = max(P, 1), (P,) if P else ()

    def draw(name, shape, scale, as_dtype, as_layout):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        tensor = lay_out(values.to(as_dtype or dtype), as_layout)
        return tensor.requires_grad_(name in wanted)

    task_ids = None
    if ids is not None:
        tasks = M if ids == "random" else min(M, 3)
        task_ids = torch.randint(tasks, (lead[0],), generator=generator)
        task_ids = (task_ids * 31 + 7) % M if ids == "repeated" else task_ids
    return SkillInputs(
        x=draw("x", (*lead, D), 1.0, dtype, layout),
        mixing=draw("mixing", (M, *split, K), K**-0.5, mixing_dtype, param_layout)
        if mixes
        else None,
        a=draw("a", (*split, K, R, D // splits), D**-0.5, param_dtype, param_layout),
        b=draw("b", (*split, K, R, H // splits), R**-0.5, param_dtype, param_layout),
        task_ids=task_ids,
        base=draw("base", (*lead, H), 1.0, base_dtype, layout) if base and not linear else None,
        grad_out=draw("grad_out", (*lead, H), 1.0, dtype, layout),
        scale=scale,
        weight=draw("weight", (H, D), D**-0.5, param_dtype, param_layout) if linear else None,
        bias=draw("bias", (H,), 1.0, param_dtype, param_layout) if linear and bias else None,
    )


def skill_loop(x, mixing, a, b, *, task_ids, base, scale, weight=None, bias=None):
    """The factors of every sequence by themselves, each step rounded to the dtype of x."""
    dtype = x.dtype
    if weight is not None:
        bias = None if bias is None else bias.to(dtype)
        base = torch.nn.functional.linear(x, weight.to(dtype), bias)
    mixing = torch.eye(len(a)) if mixing is None else mixing
    mixing, a, b = mixing.to(dtype), a.to(dtype), b.to(dtype)
    if a.dim() == 3:
        mixing, a, b = mixing.reshape(len(mixing), 1, -1), a.unsqueeze(0), b.unsqueeze(0)
    outputs = []
    for n, sequence in enumerate(x):
        row = mixing[int(task_ids[n]) if task_ids is not None else min(n, len(mixing) - 1)]
        factor_a = torch.cat([torch.einsum("k,krd->rd", w, s) for w, s in zip(row, a)], -1)  # noqa: B905
        factor_b = torch.cat([torch.einsum("k,krh->rh", w, s) for w, s in zip(row, b)], -1)  # noqa: B905
        y = sequence @ factor_a.t() @ factor_b * scale
        outputs.append(y if base is None else base[n].to(dtype) + y)
    return torch.stack(outputs)


def assert_matches_oracle(make, **options):
    """The error budget for the output and every gradient, pooled over draws if there are few."""
    smallest = min(t.numel() for t in make(0).tensors().values())
    results = []
    for seed in range(min(8, math.ceil(64 / smallest))):
        inputs = make(seed)
        results.append(
            (
                inputs.gradients(**options),
                inputs.to(torch.float64).gradients(impl="reference"),
                inputs.gradients(skill_loop),
            )
        )
    for name in results[0][0]:
        assert_within_budget(name, *(torch.stack([r[i][name] for r in results]) for i in range(3)))
