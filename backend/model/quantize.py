"""Eight-bit weights for the blocks of the DiT: half the memory of bfloat16, dequantised row by row when used."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from backend.model.dit import Kandinsky5Transformer
from backend.model.frozen import frozen_linear

FP8_MAX = 448.0
"""Largest finite value of float8_e4m3fn."""


class Fp8Linear(nn.Module):
    """A frozen Linear whose weight is float8_e4m3fn with one float32 scale for each output row.

    The scale maps the row's largest magnitude to 448; output = input @ (codes * scale)^T + bias in the input's dtype.
    Gradients reach the input and nothing else; the dequantised weight is made again for them, never kept.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / FP8_MAX
        self.register_buffer("codes", (weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs [..., in_features] of any floating dtype -> [..., out_features] of the same dtype."""
        return frozen_linear(inputs, partial(self._weight, inputs.dtype), self.bias)

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantise(self.codes, self.scale, dtype)


def dequantise(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out_features, in_features] that codes and scale of an `Fp8Linear` stand for, in `dtype`."""
    return codes.to(dtype) * scale.to(dtype)


def quantise_blocks(transformer: Kandinsky5Transformer) -> int:
    """Replace attention and feed-forward Linears of both block lists by `Fp8Linear`; returns how many.

    Modulation and time layers stay in float32, embeddings and the output layer in the model's dtype: their errors would
    reach every token.
    """
    count = 0
    for blocks in (transformer.text_transformer_blocks, transformer.visual_transformer_blocks):
        for module in list(blocks.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and not _is_modulation(module):
                    setattr(module, name, Fp8Linear(child))
                    count += 1
    return count


def _is_modulation(module: nn.Module) -> bool:
    return type(module).__name__ == "Modulation"
