"""How large caches become, to know before the work whether the disk holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backend.data.cache_facts import CHANNELS
from backend.vae.tiling import SPATIAL_FACTOR, latent_frames

if TYPE_CHECKING:
    from backend.data.items import Item

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Names, shapes and metadata; paths in them may be long.
_HEADER_BYTES = 4096
_TEXT_WIDTH = 3584
_POOLED_WIDTH = 768
# Tokens of an ordinary caption, for estimates.
_CAPTION_TOKENS = 128


def latent_bytes(item: Item, dtype: str) -> int:
    """Bytes of the latent cache of one item in a number format ("float32", "float16", "bfloat16"), header included."""
    return shape_bytes(item.frames, item.bucket.width, item.bucket.height, dtype)


def shape_bytes(frames: int, width: int, height: int, dtype: str) -> int:
    """`latent_bytes` of a clip of so many frames of so many pixels."""
    # The clip, and its first and last frame as single images.
    latents = (latent_frames(frames) + 2) * (height // SPATIAL_FACTOR) * (width // SPATIAL_FACTOR)
    return CHANNELS * latents * _ELEMENT_BYTES[dtype] + _HEADER_BYTES


def text_bytes(max_tokens: int = _CAPTION_TOKENS, width: int = _TEXT_WIDTH, dtype: str = "bfloat16") -> int:
    """Bytes of a text cache of `max_tokens` tokens; the default is an ordinary caption of Qwen2.5-VL-7B."""
    return max_tokens * (width * _ELEMENT_BYTES[dtype] + 1) + _POOLED_WIDTH * 4 + _HEADER_BYTES
