"""The Kandinsky 5 diffusion transformer, with the official names of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backend.config.checkpoint import TransformerConfig
from backend.errors import UserError
from backend.model.attention import AttentionBackend
from backend.model.layers import (
    AttentionSettings,
    Float32Island,
    OutLayer,
    SparseAttention,
    TextBlock,
    TextEmbeddings,
    TimeEmbeddings,
    VisualBlock,
    VisualEmbeddings,
)
from backend.model.nabla import (
    BLOCK_SIDE,
    NablaConfig,
    check_nabla_size,
    fractal_flatten,
    fractal_unflatten,
    sta_mask,
)
from backend.model.rope import RotaryCache

MODEL_DTYPES = (torch.float32, torch.bfloat16)
BlockRunner = Callable[..., Tensor]


def run_block(block: nn.Module, hidden: Tensor, *arguments: Any) -> Tensor:
    """How a block is run unless training asks for something else: it is called."""
    return block(hidden, *arguments)


@dataclass(frozen=True)
class TextState:
    """The text stream after its blocks: tokens [B, S, D], time embedding [B, E] (float32), key mask [B, S] or None."""

    tokens: Tensor
    time_embed: Tensor
    key_mask: Tensor | None


class Kandinsky5Transformer(nn.Module):
    """Predicts the velocity (noise minus clean) of a video latent from text, pooled text and time.

    Formulas: the Kandinsky 5 reference model; agrees with diffusers' class of this family on the same state dict. The
    model computes in float32, or in bfloat16 with float32 islands (time, modulation, norms, gates, rotary), which no
    `.to(dtype)` undoes: it has the effect of `cast_policy`.

    Attributes:
        config: sizes of the model.
        run_block: called with a block, its tokens and the rest of its arguments; returns the block's output.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attention: AttentionBackend | None = None,
        rope_bf16_rounding: bool = False,
    ) -> None:
        """Build with random weights; `rope_bf16_rounding` rounds rotated q and k to bfloat16 as the reference does."""
        super().__init__()
        settings = AttentionSettings(attention or AttentionBackend("sdpa"), rope_bf16_rounding)
        self.config = config
        self.run_block: BlockRunner = run_block
        self._dtype = torch.float32
        self._rotary = RotaryCache(config.axes_dims)
        self.time_embeddings = TimeEmbeddings(config.model_dim, config.time_dim)
        self.text_embeddings = TextEmbeddings(config.in_text_dim, config.model_dim)
        self.pooled_text_embeddings = TextEmbeddings(config.in_text_dim2, config.time_dim)
        self.visual_embeddings = VisualEmbeddings(config)
        self.text_transformer_blocks = nn.ModuleList(TextBlock(config, settings) for _ in range(config.num_text_blocks))
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(config, settings) for _ in range(config.num_visual_blocks)
        )
        self.out_layer = OutLayer(config)

    @property
    def dtype(self) -> torch.dtype:
        """The format of the residual stream and the big matrix products."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the patch embedding lies, which is where inputs are expected."""
        return next(self.visual_embeddings.parameters()).device

    def cast_policy(self, dtype: torch.dtype) -> Kandinsky5Transformer:
        """Put the model into float32 or bfloat16; the float32 islands stay as they are, or become float32 again.

        Raises:
            ValueError: another dtype.
        """
        if dtype not in MODEL_DTYPES:
            raise ValueError(f"The model computes in float32 or bfloat16, not in {dtype}.")
        return self.to(dtype)

    def policy_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The format of every parameter by name when the model is in `dtype`."""
        islands = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, Float32Island))
        return {name: torch.float32 if name.startswith(islands) else dtype for name, _ in self.named_parameters()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kandinsky5Transformer:
        # Every cast of a module passes here; an empty tensor shows which format it is to, without looking at weights
        # that low-rank layers or quantisation may have replaced.
        dtype = fn(torch.empty(0, dtype=self._dtype, device="cpu")).dtype
        if dtype not in MODEL_DTYPES:
            raise ValueError(f"The model computes in float32 or bfloat16, not in {dtype}.")
        result = super()._apply(fn, recurse)
        self._dtype = dtype
        return result

    def forward(
        self,
        hidden_states: Tensor,
        text_embeds: Tensor,
        pooled_embeds: Tensor,
        timesteps: Tensor,
        *,
        text_mask: Tensor | None = None,
        scale_factor: tuple[float, float, float] = (1.0, 2.0, 2.0),
        nabla: NablaConfig | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Shapes: hidden_states [B, F, H, W, in_channels] (latent, then condition and mask channels); text_embeds
        [B, S, in_text_dim]; pooled_embeds [B, in_text_dim2]; timesteps [B], 1000 * sigma in 0..1000; text_mask bool
        [B, S], True = a token, padding on the right. scale_factor divides the rotary angles of (time, height, width).
        `nabla` makes visual self-attention sparse. Returns float32 [B, F, H, W, out_visual_dim].

        Surrounding autocast regions have no effect: the model has its own policy of number formats.

        Raises:
            UserError: shapes that do not fit the model or NABLA.
        """
        self._check_inputs(hidden_states, text_embeds, pooled_embeds, timesteps)
        if nabla is not None:
            check_nabla_size(*hidden_states.shape[2:4])
        with torch.autocast(hidden_states.device.type, enabled=False):
            text = self.encode_text(text_embeds, pooled_embeds, timesteps, text_mask)
            return self._predict(hidden_states.to(self.dtype), text, scale_factor, nabla).float()

    def encode_text(
        self, text_embeds: Tensor, pooled_embeds: Tensor, timesteps: Tensor, text_mask: Tensor | None = None
    ) -> TextState:
        """Run the text stream, which does not depend on the latent; arguments as in `forward`."""
        text_embeds, key_mask = _trim_padding(text_embeds, text_mask)
        tokens = self.text_embeddings(text_embeds.to(self.dtype))
        pooled = self.pooled_text_embeddings(pooled_embeds.to(self.dtype))
        time_embed = self.time_embeddings(timesteps) + pooled.float()
        rotary = self._rotary.text(tokens.shape[1], tokens.device)
        for block in self.text_transformer_blocks:
            tokens = self.run_block(block, tokens, time_embed, rotary, key_mask)
        return TextState(tokens, time_embed, key_mask)

    def _predict(
        self, latents: Tensor, text: TextState, scale_factor: tuple[float, float, float], nabla: NablaConfig | None
    ) -> Tensor:
        patches = self.visual_embeddings(latents)
        frames, height, width = patches.shape[1:4]
        grid = (frames, height, width)
        sparse = None
        if nabla is not None:
            window = sta_mask((frames, height // BLOCK_SIDE, width // BLOCK_SIDE), nabla, latents.device)
            sparse = SparseAttention(nabla, window)
        fractal = sparse is not None
        time_scale, row_scale, column_scale = scale_factor
        visual = fractal_flatten(patches) if fractal else patches.flatten(1, 3)
        rotary = self._rotary.visual(grid, (time_scale, row_scale, column_scale), latents.device, fractal=fractal)
        for block in self.visual_transformer_blocks:
            visual = self.run_block(block, visual, text.tokens, text.time_embed, rotary, text.key_mask, sparse)
        if fractal:
            visual = fractal_unflatten(visual, grid).flatten(1, 3)
        return self.out_layer(visual, text.time_embed, grid)

    def _check_inputs(self, latents: Tensor, text: Tensor, pooled: Tensor, timesteps: Tensor) -> None:
        config = self.config
        if latents.ndim != 5 or latents.shape[-1] != config.in_channels:
            raise UserError(
                f"The DiT takes latents [B, F, H, W, {config.in_channels}], and got {list(latents.shape)}. "
                "Check that the task belongs to these weights."
            )
        for size, patch in zip(latents.shape[1:4], config.patch_size, strict=True):
            if size < 1 or size % patch:
                raise UserError(
                    f"The latent of {list(latents.shape[1:4])} frames, rows, columns does not divide into patches of "
                    f"{list(config.patch_size)}. Use a width and height that are multiples of 16 pixels."
                )
        batch = latents.shape[0]
        expected = {
            "text embeddings": (text, (batch, text.shape[1] if text.ndim == 3 else 1, config.in_text_dim)),
            "pooled text embeddings": (pooled, (batch, config.in_text_dim2)),
            "timesteps": (timesteps, (batch,)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape or 0 in shape:
                raise UserError(
                    f"The DiT takes {name} of shape {list(shape)}, and got {list(tensor.shape)}. "
                    "Check that the text encoders belong to these weights."
                )


def _trim_padding(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut columns that are padding in the whole batch; the mask is None when nothing of it is left to mask."""
    if mask is None:
        return text, None
    if mask.shape != text.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"text_mask must be bool {list(text.shape[:2])}, not {mask.dtype} {list(mask.shape)}.")
    lengths = mask.sum(1)
    longest, shortest = int(lengths.max()), int(lengths.min())
    prefix = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if shortest == 0 or not torch.equal(mask, prefix):
        raise ValueError("text_mask must mark at least one token an item, with all padding on the right.")
    if longest == shortest:
        return text[:, :longest], None
    return text[:, :longest], mask[:, :longest]
