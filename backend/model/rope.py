"""Rotary position embeddings of Kandinsky 5: interleaved pairs, one axis for text, three for video.

Angles, cosines, sines and the rotation are float32. Tables are computed for any length, on the CPU, so that every
device gets the same numbers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backend.model.nabla import fractal_flatten

_MAX_PERIOD = 10_000.0
_CACHED_TABLES = 8


class RotaryTable(NamedTuple):
    """Cosines and sines, float32 [S, 1, pairs]: they broadcast over batch and heads of [B, S, H, pairs]."""

    cos: Tensor
    sin: Tensor


def frequencies(count: int) -> Tensor:
    """f_j = 10000^(-j / count) for j = 0..count-1, float32 on the CPU."""
    steps = torch.arange(count, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(_MAX_PERIOD) * steps / count)


def axis_angles(positions: int, axis_dim: int, scale: float = 1.0) -> Tensor:
    """Angles position * f_j / scale of one axis, float32 [positions, axis_dim / 2]."""
    places = torch.arange(positions, dtype=torch.float32, device="cpu")
    return torch.outer(places, frequencies(axis_dim // 2)) / scale


def text_table(length: int, head_dim: int) -> RotaryTable:
    """The table of a text of `length` tokens."""
    angles = axis_angles(length, head_dim)[:, None]
    return RotaryTable(angles.cos(), angles.sin())


def visual_table(
    grid: tuple[int, int, int],
    axes_dims: tuple[int, int, int],
    scale_factor: tuple[float, float, float],
    *,
    fractal: bool = False,
) -> RotaryTable:
    """The table of a grid (T, H, W) of patches, in row order or in NABLA's fractal order."""
    tables = []
    for function in (torch.cos, torch.sin):
        parts = []
        for axis, (size, dim, scale) in enumerate(zip(grid, axes_dims, scale_factor, strict=True)):
            shape = [1, 1, 1, 1, dim // 2]
            shape[axis + 1] = size
            parts.append(function(axis_angles(size, dim, scale)).view(shape).expand(1, *grid, dim // 2))
        whole = torch.cat(parts, dim=-1)
        tokens = fractal_flatten(whole) if fractal else whole.flatten(1, 3)
        tables.append(tokens[0][:, None].contiguous())
    return RotaryTable(*tables)


class RotaryCache:
    """The last few tables by shape and device; they are no part of a state dict."""

    def __init__(self, axes_dims: tuple[int, int, int]) -> None:
        self.axes_dims = axes_dims
        self._tables: OrderedDict[Any, RotaryTable] = OrderedDict()

    def text(self, length: int, device: torch.device) -> RotaryTable:
        """`text_table` on `device`."""
        return self._get((length,), device)

    def visual(
        self,
        grid: tuple[int, int, int],
        scale_factor: tuple[float, float, float],
        device: torch.device,
        *,
        fractal: bool,
    ) -> RotaryTable:
        """`visual_table` on `device`."""
        return self._get((grid, scale_factor, fractal), device)

    def _get(self, arguments: tuple[Any, ...], device: torch.device) -> RotaryTable:
        key = (arguments, device)
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        # A table that is made inside inference_mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            if len(arguments) == 1:
                table = text_table(arguments[0], sum(self.axes_dims))
            else:
                grid, scale_factor, fractal = arguments
                table = visual_table(grid, self.axes_dims, scale_factor, fractal=fractal)
            self._tables[key] = RotaryTable(*(part.to(device) for part in table))
        if len(self._tables) > _CACHED_TABLES:
            self._tables.popitem(last=False)
        return self._tables[key]


def rotate(hidden: Tensor, table: RotaryTable) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of float32 `hidden` [B, S, H, D] by the table's angles.

    y0 = x0 cos - x1 sin; y1 = x1 cos + x0 sin.
    """
    return _Rotation.apply(hidden, table.cos, table.sin)


class _Rotation(torch.autograd.Function):
    """A rotation without intermediate copies; its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(hidden, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None


def _rotated(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result = torch.empty_like(hidden)
    even, odd = hidden.unflatten(-1, (-1, 2)).unbind(-1)
    new_even, new_odd = result.unflatten(-1, (-1, 2)).unbind(-1)
    torch.mul(even, cos, out=new_even).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=new_odd).addcmul_(even, sin)
    return result
