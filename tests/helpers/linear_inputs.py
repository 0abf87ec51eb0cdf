"""Inputs of `linear_mixture`: those of a mixture, with a linear in the place of the base."""

import dataclasses

import torch

from pemt_fast.ops import adapter_mixture, adapter_mixture_with_hidden, linear_mixture
from pemt_fast.testing import MixtureInputs, adapter_mixture_loop, make_inputs

LINEAR_NAMES = ("x", "weight", "bias", "gate", "w_down", "w_up", "b_down", "b_up")


@dataclasses.dataclass(frozen=True)
class LinearInputs(MixtureInputs):
    """The arguments of one call of `linear_mixture`. Budget and bounds ask for the operator,
    its oracle and its eager twin by the names of `adapter_mixture`."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def tensors(self):
        named = {name: getattr(self, name) for name in LINEAR_NAMES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def call(self, function=linear_mixture, **options):
        if function is adapter_mixture_loop:
            return beside(self, function, **options)
        if function is adapter_mixture_with_hidden:
            options["with_hidden"] = True
        if function in (adapter_mixture, adapter_mixture_with_hidden):
            function = linear_mixture
        return function(
            self.x, self.weight, self.gate, self.w_down, self.w_up, self.b_down, self.b_up,
            activation=self.activation, bias=self.bias, ranks=self.ranks, **options,
        )  # fmt: skip


def beside(inputs, function=adapter_mixture, **options):
    """The linear by itself, its output the base of the mixture: two operators."""
    x, weight, bias = inputs.x, inputs.weight.to(inputs.x.dtype), inputs.bias
    base = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return function(
        x, inputs.gate, inputs.w_down, inputs.w_up, inputs.b_down, inputs.b_up,
        activation=inputs.activation, base=base, ranks=inputs.ranks, **options,
    )  # fmt: skip


def make_linear_inputs(*lead, stacked=False, linear_dtype=None, requires_grad=True, **keywords):
    """As `make_inputs`; `stacked` lays `w_down` behind `weight` in one storage."""
    wanted = LINEAR_NAMES if requires_grad is True else requires_grad or ()
    bias = keywords.get("bias", True)
    mixture = make_inputs(*lead, base=False, requires_grad=wanted, **keywords)
    h, d = mixture.w_up.shape[-1], mixture.w_down.shape[-1]
    dtype = linear_dtype or mixture.w_down.dtype
    generator = torch.Generator().manual_seed(1000 + keywords.get("seed", 0))

    def draw(*shape, scale):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype)

    weight, w_down = draw(h, d, scale=d**-0.5), mixture.w_down
    if stacked:
        both = torch.cat([weight, w_down.detach().reshape(-1, d)])
        weight, w_down = both[:h].detach(), both[h:].detach().view(w_down.shape)
        w_down.requires_grad_("w_down" in wanted)
    fields = {f.name: getattr(mixture, f.name) for f in dataclasses.fields(MixtureInputs)}
    fields["w_down"] = w_down
    return LinearInputs(
        **fields,
        weight=weight.requires_grad_("weight" in wanted),
        bias=draw(h, scale=0.5).requires_grad_("bias" in wanted) if bias else None,
    )
