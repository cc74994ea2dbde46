"""Adds LoRAs to the weights themselves: W + strength * alpha / rank * up @ down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from backend.errors import UserError
from backend.lora.alphas import FIELD
from backend.lora.formats import LoraWeights, read_lora
from backend.lora.modules import LoraLinear
from backend.lora.network import check_strength
from backend.lora.targets import Target, linear_targets, resolve

MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Number formats of a weight that a difference can be added to; 8-bit codes would round it away."""


def merge_loras(model: nn.Module, loras: Sequence[tuple[str | Path, float]], *, field: str = FIELD) -> None:
    """Add LoRA files, each with its strength, to the weights of plain linear layers; for before quantisation.

    The differences of all LoRAs on one layer are summed in float32, added to the weight in float32, and rounded to its
    format once. All files are read and checked before the first weight changes. A strength of 0 changes nothing.

    Args:
        field: the option that a mistake in a file is reported at.

    Raises:
        UserError: a file is not a LoRA or does not fit, a strength is not finite, or a layer that a LoRA changes is
            quantised.
    """
    targets = linear_targets(model)
    strengths = [check_strength(strength) for _, strength in loras]
    parts: dict[str, list[tuple[LoraWeights, float]]] = {}
    try:
        for (path, _), strength in zip(loras, strengths, strict=True):
            for name, weights in resolve(read_lora(path), targets).items():
                if strength != 0.0:
                    parts.setdefault(name, []).append((weights, strength))
        layers = {name: _plain_layer(targets[name]) for name in parts}
    except UserError as error:
        raise UserError(error.message, field) from error
    for name, layer in layers.items():
        merged = merged_weight(layer.weight.detach(), parts[name])
        with torch.no_grad():
            layer.weight.copy_(merged)


def merged_weight(weight: Tensor, parts: Sequence[tuple[LoraWeights, float]]) -> Tensor:
    """weight [out, in] plus the sum of strength * alpha / rank * up @ down, in float32 (float64 stays float64).

    The result is on the weight's device; rounding to the weight's own format is left to the caller.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(dtype, copy=True)
    for pair, strength in parts:
        up, down = pair.up.to(total.device, dtype), pair.down.to(total.device, dtype)
        total.addmm_(up, down, alpha=strength * pair.alpha / pair.rank)
    return total


def _plain_layer(target: Target) -> nn.Linear:
    layer: nn.Module = target.layer
    while isinstance(layer, LoraLinear):
        layer = layer.base
    if not isinstance(layer, nn.Linear) or layer.weight.dtype not in MERGEABLE_DTYPES:
        raise UserError(
            f"{target.name} is quantised: a LoRA that is added to 8-bit codes is rounded away. "
            "Merge it before the model is quantised."
        )
    return layer
