"""Products with frozen weights that exist only while they are used: autograd keeps no copy of such a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

WeightSource = Callable[[], Tensor]
"""Makes or fetches a weight [out_features, in_features]; called once forward and once more backward."""


def frozen_linear(inputs: Tensor, weight: WeightSource, bias: Tensor | None) -> Tensor:
    """inputs @ weight()^T + bias, differentiable in the inputs only.

    Between forward and backward nothing is kept but `weight` itself, the callable: neither the weight nor the inputs,
    which only a trained weight's gradient would need. The backward pass calls it again and multiplies as autograd
    does for a plain Linear.

    Shapes: inputs [..., in_features]; bias [out_features] or None. Returns [..., out_features] in the inputs' dtype,
    which the weight must have too.
    """
    return _FrozenLinear.apply(inputs, weight, None if bias is None else bias.detach())


class _FrozenLinear(torch.autograd.Function):
    """The weight's source is asked again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: WeightSource, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(inputs, weight(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].matmul(ctx.weight()), None, None
