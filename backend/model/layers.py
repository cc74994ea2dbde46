"""The parts of the Kandinsky 5 DiT: embeddings, modulation, attention, feed-forward, the two blocks, the output layer.

Number formats: the residual stream and the big matrix products are in the model's format; time, modulation, norms,
gates and rotary embeddings are computed in float32, and the parameters of `Float32Island` modules stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backend.config.checkpoint import TransformerConfig
from backend.model.attention import AttentionBackend
from backend.model.nabla import NablaConfig, nabla_attention
from backend.model.rope import RotaryTable, frequencies, rotate

NORM_EPSILON = 1e-5
# RMSNorm without an explicit epsilon uses that of its input's format, and q and k are float32 there.
HEAD_NORM_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class AttentionSettings:
    """How every attention of one model computes."""

    backend: AttentionBackend
    rope_bf16_rounding: bool = False


@dataclass(frozen=True)
class SparseAttention:
    """NABLA for one forward: its parameters and the window mask of this grid, bool [n, n]."""

    config: NablaConfig
    window: Tensor


class Float32Island(nn.Module):
    """A module whose parameters stay float32, exactly, whatever `.to(dtype)` or `.half()` is called on its owners."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Island:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == torch.float32:
                return moved
            return tensor.to(device=moved.device, dtype=torch.float32)

        return super()._apply(keep_float32, recurse)


class TimeEmbeddings(Float32Island):
    """Sinusoidal embedding of the model time, then a two-layer MLP; all float32."""

    def __init__(self, model_dim: int, time_dim: int) -> None:
        super().__init__()
        self.model_dim = model_dim
        self.in_layer = nn.Linear(model_dim, time_dim)
        self.out_layer = nn.Linear(time_dim, time_dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [B] in 0..1000: float32 [B, time_dim]."""
        angles = torch.outer(timesteps.float(), frequencies(self.model_dim // 2).to(timesteps.device))
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.out_layer(F.silu(self.in_layer(waves)))


class EmbeddingNorm(Float32Island):
    """LayerNorm with weight and bias, computed in float32, returned in the input's format."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(hidden.float(), self.weight.shape, self.weight, self.bias, NORM_EPSILON).to(hidden.dtype)


class TextEmbeddings(nn.Module):
    """A text encoder's output to the model's width: Linear, then LayerNorm."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(text_dim, width)
        self.norm = EmbeddingNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        """Embed [..., text_dim] to [..., width]."""
        return self.norm(self.in_layer(text))


class VisualEmbeddings(nn.Module):
    """Latents to tokens: patches whose vector is ordered (time, row, column, channel), channel fastest, then Linear."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.in_layer = nn.Linear(math.prod(config.patch_size) * config.in_channels, config.model_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, F, H, W, C] to [B, T, H', W', model_dim]."""
        for axis, size in enumerate(self.patch_size):
            latents = latents.unflatten(1 + 2 * axis, (-1, size))
        return self.in_layer(latents.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4))


class Modulation(Float32Island):
    """Shifts, scales and gates of a block from the time embedding: Linear(SiLU(e)), float32, zero at the start."""

    def __init__(self, time_dim: int, model_dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.out_layer = nn.Linear(time_dim, count * model_dim)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def forward(self, time_embed: Tensor) -> tuple[Tensor, ...]:
        """`count` float32 tensors [B, 1, model_dim] from float32 [B, time_dim]."""
        return self.out_layer(F.silu(time_embed)).unsqueeze(1).chunk(self.count, dim=-1)


def modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(hidden) * (1 + scale) + shift in float32, returned in hidden's format.

    Shapes: hidden [B, S, D]; shift, scale float32 [B, 1, D].
    """
    width = hidden.shape[-1]
    if hidden.shape[0] == 1:
        # One sample: the modulation is an affine LayerNorm, a single pass over the tokens.
        normed = F.layer_norm(hidden.float(), (width,), (scale + 1).view(width), shift.view(width), NORM_EPSILON)
        return normed.to(hidden.dtype)
    normed = F.layer_norm(hidden.float(), (width,), eps=NORM_EPSILON)
    return torch.addcmul(shift, normed, scale + 1).to(hidden.dtype)


def gate_add(hidden: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """hidden + gate * update in float32, returned in hidden's format; gate float32 [B, 1, D]."""
    return torch.addcmul(hidden, gate, update).to(hidden.dtype)


class HeadNorm(Float32Island):
    """RMSNorm over one head's width with a weight, in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis; the result is float32."""
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight, HEAD_NORM_EPSILON)


class Attention(nn.Module):
    """Multi-head attention with RMSNorm on queries and keys; rotary positions where a table is given."""

    def __init__(self, config: TransformerConfig, settings: AttentionSettings) -> None:
        super().__init__()
        width = config.model_dim
        self.head_dim = config.head_dim
        self.settings = settings
        self.to_query = nn.Linear(width, width)
        self.to_key = nn.Linear(width, width)
        self.to_value = nn.Linear(width, width)
        self.query_norm = HeadNorm(config.head_dim)
        self.key_norm = HeadNorm(config.head_dim)
        self.out_layer = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor | None = None,
        *,
        rotary: RotaryTable | None = None,
        key_mask: Tensor | None = None,
        sparse: SparseAttention | None = None,
    ) -> Tensor:
        """Attend from hidden [B, S, D] to context [B, K, D] (to itself without one).

        key_mask bool [B, K], True = a key that counts; `sparse` replaces dense self-attention.
        """
        source = hidden if context is None else context
        query = self._positioned(self.query_norm, self._heads(self.to_query(hidden)), rotary)
        key = self._positioned(self.key_norm, self._heads(self.to_key(source)), rotary)
        value = self._heads(self.to_value(source))
        if sparse is None:
            attended = self.settings.backend(query, key, value, key_mask=key_mask)
        else:
            attended = nabla_attention(query, key, value, sparse.config, sparse.window)
        return self.out_layer(attended.flatten(-2))

    def _heads(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (-1, self.head_dim))

    def _positioned(self, norm: nn.Module, heads: Tensor, rotary: RotaryTable | None) -> Tensor:
        normed = norm(heads)
        if rotary is not None:
            normed = rotate(normed, rotary)
            if self.settings.rope_bf16_rounding:
                normed = normed.to(torch.bfloat16)
        return normed.to(heads.dtype)


class FeedForward(nn.Module):
    """Linear, exact (erf) GELU, Linear; no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, hidden, bias=False)
        self.out_layer = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        return self.out_layer(F.gelu(self.in_layer(hidden)))


class TextBlock(nn.Module):
    """One block of the text stream: self-attention, feed-forward."""

    def __init__(self, config: TransformerConfig, settings: AttentionSettings) -> None:
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 6)
        self.self_attention = Attention(config, settings)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def forward(self, text: Tensor, time_embed: Tensor, rotary: RotaryTable, key_mask: Tensor | None) -> Tensor:
        """Update text [B, S, D]; time_embed float32 [B, time_dim]; key_mask bool [B, S] or None."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.text_modulation(time_embed)
        update = self.self_attention(modulate(text, shift, scale), rotary=rotary, key_mask=key_mask)
        text = gate_add(text, gate, update)
        return gate_add(text, ff_gate, self.feed_forward(modulate(text, ff_shift, ff_scale)))


class VisualBlock(nn.Module):
    """One block of the visual stream: self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, config: TransformerConfig, settings: AttentionSettings) -> None:
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9)
        self.self_attention = Attention(config, settings)
        self.cross_attention = Attention(config, settings)
        self.feed_forward = FeedForward(config.model_dim, config.ff_dim)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        time_embed: Tensor,
        rotary: RotaryTable,
        key_mask: Tensor | None,
        sparse: SparseAttention | None,
    ) -> Tensor:
        """Update visual tokens [B, S, D] with text [B, K, D]; key_mask bool [B, K] masks padded text."""
        parameters: Any = self.visual_modulation(time_embed)
        shift, scale, gate = parameters[:3]
        update = self.self_attention(modulate(visual, shift, scale), rotary=rotary, sparse=sparse)
        visual = gate_add(visual, gate, update)
        shift, scale, gate = parameters[3:6]
        update = self.cross_attention(modulate(visual, shift, scale), text, key_mask=key_mask)
        visual = gate_add(visual, gate, update)
        shift, scale, gate = parameters[6:]
        return gate_add(visual, gate, self.feed_forward(modulate(visual, shift, scale)))


class OutLayer(nn.Module):
    """Tokens to velocity: modulated LayerNorm, Linear, patches ordered (channel, time, row, column)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.modulation = Modulation(config.time_dim, config.model_dim, 2)
        self.out_layer = nn.Linear(config.model_dim, math.prod(config.patch_size) * config.out_visual_dim)

    def forward(self, visual: Tensor, time_embed: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, T*H'*W', D] in row order to [B, F, H, W, C]."""
        shift, scale = self.modulation(time_embed)
        patches = self.out_layer(modulate(visual, shift, scale)).unflatten(1, grid)
        split = patches.unflatten(-1, (-1, *self.patch_size)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        batch, *sizes, channels = split.shape
        # In one copy, which is no view of anything: FSDP warns of modules that return views.
        whole = [count * size for count, size in zip(sizes[::2], sizes[1::2], strict=True)]
        return split.reshape(batch, *whole, channels)
