"""The Kandinsky 5 DiT once more, from its formulas, in plain float64, one sample at a time: an oracle for gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

HEAD_EPSILON = 2.0**-23


class OracleModel:
    """Velocities of one sample from float64 tensors by the official names; nothing of the product is used."""

    def __init__(self, weights: Mapping[str, Tensor], axes: tuple[int, int, int], scale: tuple[float, float, float]):
        self.weights = {name: value.detach().double().requires_grad_() for name, value in weights.items()}
        self.axes, self.scale = axes, scale
        self.text_blocks = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("text_transformer_blocks"))
        self.visual_blocks = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("visual_transformer_blocks"))

    def velocity(self, latents: Tensor, text: Tensor, pooled: Tensor, time: float) -> Tensor:
        """latents [F, H, W, C], text [S, D], pooled [P], time 0..1000: [F, H, W, 16]."""
        frames, height, width, channels = latents.shape
        embedded = self._time(time) + self._norm("pooled_text_embeddings", pooled)
        words = self._norm("text_embeddings", text)
        turns = self._angles(len(text), sum(self.axes))
        for index in range(self.text_blocks):
            words = self._block(f"text_transformer_blocks.{index}", words, embedded, turns, None)
        rows, columns = height // 2, width // 2
        patches = latents.reshape(frames, rows, 2, columns, 2, channels).permute(0, 1, 3, 2, 4, 5)
        tokens = self._linear("visual_embeddings.in_layer", patches.reshape(frames * rows * columns, 4 * channels))
        turns = self._grid_angles((frames, rows, columns))
        for index in range(self.visual_blocks):
            tokens = self._block(f"visual_transformer_blocks.{index}", tokens, embedded, turns, words)
        shift, scale = self._modulation("out_layer.modulation", embedded, 2)
        out = self._linear("out_layer.out_layer", _layer_norm(tokens) * (1 + scale) + shift)
        out = out.reshape(frames, rows, columns, 16, 2, 2).permute(0, 1, 4, 2, 5, 3)
        return out.reshape(frames, height, width, 16)

    def _linear(self, name: str, value: Tensor) -> Tensor:
        product = value @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return product if bias is None else product + bias

    def _norm(self, name: str, value: Tensor) -> Tensor:
        normed = _layer_norm(self._linear(f"{name}.in_layer", value))
        return normed * self.weights[f"{name}.norm.weight"] + self.weights[f"{name}.norm.bias"]

    def _time(self, time: float) -> Tensor:
        half = self.weights["time_embeddings.in_layer.weight"].shape[1] // 2
        angles = torch.tensor([time * 10_000 ** (-j / half) for j in range(half)], dtype=torch.float64)
        waves = torch.cat([angles.cos(), angles.sin()])
        hidden = self._linear("time_embeddings.in_layer", waves)
        return self._linear("time_embeddings.out_layer", hidden * torch.sigmoid(hidden))

    def _modulation(self, name: str, embedded: Tensor, count: int) -> tuple[Tensor, ...]:
        return self._linear(f"{name}.out_layer", embedded * torch.sigmoid(embedded)).chunk(count)

    def _block(self, name: str, tokens: Tensor, embedded: Tensor, turns: Tensor, words: Tensor | None) -> Tensor:
        stream = name.split("_")[0]
        parts = self._modulation(f"{name}.{stream}_modulation", embedded, 6 if words is None else 9)
        shift, scale, gate = parts[:3]
        update = self._attention(f"{name}.self_attention", _layer_norm(tokens) * (1 + scale) + shift, None, turns)
        tokens = tokens + gate * update
        if words is not None:
            shift, scale, gate = parts[3:6]
            update = self._attention(f"{name}.cross_attention", _layer_norm(tokens) * (1 + scale) + shift, words, None)
            tokens = tokens + gate * update
        shift, scale, gate = parts[-3:]
        hidden = self._linear(f"{name}.feed_forward.in_layer", _layer_norm(tokens) * (1 + scale) + shift)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return tokens + gate * self._linear(f"{name}.feed_forward.out_layer", hidden)

    def _attention(self, name: str, tokens: Tensor, context: Tensor | None, turns: Tensor | None) -> Tensor:
        source = tokens if context is None else context
        size = sum(self.axes)
        query, key, value = (
            self._linear(f"{name}.to_{part}", given).reshape(len(given), -1, size).transpose(0, 1)
            for part, given in (("query", tokens), ("key", source), ("value", source))
        )
        query, key = (
            part / (part.square().mean(-1, keepdim=True) + HEAD_EPSILON).sqrt() * self.weights[f"{name}.{which}.weight"]
            for part, which in ((query, "query_norm"), (key, "key_norm"))
        )
        if turns is not None:
            query, key = _turn(query, turns), _turn(key, turns)
        scores = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(size), dim=-1)
        return self._linear(f"{name}.out_layer", (scores @ value).transpose(0, 1).reshape(len(tokens), -1))

    def _angles(self, count: int, size: int, scale: float = 1.0) -> Tensor:
        steps = torch.tensor([10_000 ** (-j / (size // 2)) for j in range(size // 2)], dtype=torch.float64)
        return torch.arange(count, dtype=torch.float64)[:, None] * steps / scale

    def _grid_angles(self, grid: tuple[int, int, int]) -> Tensor:
        tables = [self._angles(*parts) for parts in zip(grid, self.axes, self.scale, strict=True)]
        return torch.stack(
            [
                torch.cat([tables[0][t], tables[1][y], tables[2][x]])
                for t in range(grid[0])
                for y in range(grid[1])
                for x in range(grid[2])
            ]
        )


def _layer_norm(value: Tensor) -> Tensor:
    centred = value - value.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _turn(heads: Tensor, angles: Tensor) -> Tensor:
    """Pairs (0, 1), (2, 3), ... of [heads, S, size] by angles [S, size / 2], as complex numbers."""
    return torch.view_as_real(
        torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    ).flatten(-2)
