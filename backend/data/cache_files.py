"""Writes and reads caches of latents and texts: the layout that other Kandinsky 5 tools read, the same bytes each time.

The headers are written here, because the safetensors library puts metadata into a random order.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backend.data.cache_facts import (
    CHANNELS,
    DTYPE_NAMES,
    check_latent_cache,
    check_text_cache,
    read_latent_facts,
    read_text_facts,
)
from backend.errors import EngineError, UserError
from backend.files import atomic_path
from backend.vae.tiling import latent_frames

if TYPE_CHECKING:
    import torch

__all__ = [
    "LatentCache",
    "TextCache",
    "check_latent_cache",
    "check_text_cache",
    "read_latent_cache",
    "read_text_cache",
    "write_latent_cache",
    "write_text_cache",
]

_ALIGNMENT = 8


@dataclass(frozen=True)
class LatentCache:
    """One cached clip.

    Attributes:
        latents: [16, F, H, W], multiplied by the VAE's scaling factor.
        latents_image: [16, 2, H, W], first and last frame; None in some files of other tools. Only in our own files
            they are encoded as single images.
        metadata: all strings of the file.
        ours: whether this project wrote the file.
    """

    latents: torch.Tensor
    latents_image: torch.Tensor | None
    metadata: dict[str, str]
    ours: bool


@dataclass(frozen=True)
class TextCache:
    """One cached caption.

    Attributes:
        text: [S, D], the tokens of the prompt and the end token, packed.
        pooled: [D2] float32, CLIP's vector.
        metadata: all strings of the file.
        ours: whether this project wrote the file.
    """

    text: torch.Tensor
    pooled: torch.Tensor
    metadata: dict[str, str]
    ours: bool


def write_latent_cache(
    path: str | Path, latents: torch.Tensor, latents_image: torch.Tensor, metadata: Mapping[str, str]
) -> int:
    """Write the cache of one clip, whole or not at all, and return its size in bytes.

    Args:
        path: where; `backend.data.cache_names.latent_cache_name` says how it is called.
        latents: [16, F, H, W] float16, bfloat16 or float32 on any device, scaled.
        latents_image: [16, 2, H, W] in the same number format: first and last frame, each encoded as a single image.
        metadata: from `LatentRecipe.metadata`.

    Raises:
        ValueError: shapes, number formats or frame counts do not belong together.
        EngineError: phase "vae"; there are values that are not numbers.
        UserError: the disk is full or the folder cannot be written.
    """
    if latents.ndim != 4 or latents.shape[0] != CHANNELS:
        raise ValueError(f"Latents are [{CHANNELS}, F, H, W], not {list(latents.shape)}.")
    frames = int(metadata.get("frame_count", 1))
    if latents.shape[1] != latent_frames(frames):
        raise ValueError(f"{latents.shape[1]} latent frames are not those of {frames} frames.")
    if latents_image.shape != (CHANNELS, 2, *latents.shape[2:]) or latents_image.dtype != latents.dtype:
        raise ValueError(f"The first and last frame are {list(latents_image.shape)}, {latents_image.dtype}.")
    for tensor in (latents, latents_image):
        _require_numbers(tensor, path, "vae")
    size = "x".join(str(side) for side in latents.shape[1:])
    image_size = "x".join(str(side) for side in latents_image.shape[1:])
    kind = _dtype_name(latents)
    tensors = {f"latents_{size}_{kind}": latents, f"latents_image_{image_size}_{kind}": latents_image}
    return _write(path, tensors, metadata)


def write_text_cache(path: str | Path, text: torch.Tensor, pooled: torch.Tensor, metadata: Mapping[str, str]) -> int:
    """Write the cache of one caption, whole or not at all, and return its size in bytes.

    Args:
        path: where; `backend.data.cache_names.text_cache_name` says how it is called.
        text: [S, D] bfloat16, float16 or float32 on any device, S at least 1, without padding.
        pooled: [D2] float32.
        metadata: from `TextRecipe.metadata`.

    Raises:
        ValueError: a shape is none of these.
        EngineError: phase "text"; there are values that are not numbers.
        UserError: the disk is full or the folder cannot be written.
    """
    import torch

    if text.ndim != 2 or pooled.ndim != 1 or not text.numel() or not pooled.numel():
        raise ValueError(f"A text is [S, D] and its pooled vector [D2], not {list(text.shape)}, {list(pooled.shape)}.")
    for tensor in (text, pooled):
        _require_numbers(tensor, path, "text")
    tensors = {
        "attention_mask": torch.ones(text.shape[0], dtype=torch.bool),
        f"pooled_embed_{_dtype_name(pooled)}": pooled,
        f"text_embeds_{_dtype_name(text)}": text,
    }
    return _write(path, tensors, metadata)


def read_latent_cache(path: str | Path) -> LatentCache:
    """Read the cache of one clip, our own or another tool's, onto the CPU.

    Raises:
        UserError: it is missing, damaged, or holds another number of frames than it says.
    """
    facts = read_latent_facts(path)
    tensors, metadata = _load(path)
    latents = _pick(tensors, "latents_", "latents_image_", "latents_control_")
    image = _pick(tensors, "latents_image_")
    if latents is None:
        raise _damaged(path, "its latents are gone")
    frames = metadata.get("frame_count", "1")
    if not frames.isdecimal() or int(frames) % 4 != 1 or latents.shape[1] != latent_frames(int(frames)):
        raise UserError(f"{path} holds {latents.shape[1]} latent frames for {frames[:20]} frames. Cache it again.")
    for tensor in (latents, image):
        if tensor is not None:
            _check_read(tensor, path)
    return LatentCache(latents, image, metadata, facts.ours)


def read_text_cache(path: str | Path, kind: str) -> TextCache:
    """Read the cache of one caption of an "image" or a "video" dataset onto the CPU.

    Raises:
        UserError: it is missing or damaged, or it belongs to a video and another tool wrote it (with the template for
            images).
    """
    facts = read_text_facts(path)
    if not facts.ours and kind == "video":
        raise UserError(
            f"{path} was written by another tool, which encodes the captions of videos with the template for images. "
            "Cache the text again."
        )
    tensors, metadata = _load(path)
    text = _pick(tensors, "text_embeds_", "varlen_text_embeds_")
    text = _pick(tensors, "varlen_text_embeds_") if text is None else text
    pooled = _pick(tensors, "pooled_embed_")
    mask = tensors.get("attention_mask")
    if text is None or pooled is None:
        raise _damaged(path, "its embeddings are gone")
    if mask is not None and not bool(mask.bool().all()):
        text = text[mask.bool()]
    if not text.numel():
        raise _damaged(path, "its mask leaves no token")
    for tensor in (text, pooled):
        _check_read(tensor, path)
    return TextCache(text, pooled.float(), metadata, facts.ours)


# --- bytes --------------------------------------------------------------------------------------------------------


def _write(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    import torch

    formats = {name: code for code, name in DTYPE_NAMES.items()} | {"bool": "BOOL"}
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    blocks: list[bytes] = []
    position = 0
    # Wide formats first, as the library does: every tensor then begins at a multiple of its element size.
    for name, tensor in sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0])):
        block = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [position, position + len(block)]
        header[name] = {"dtype": formats[_dtype_name(tensor)], "shape": list(tensor.shape), "data_offsets": offsets}
        blocks.append(block)
        position += len(block)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for block in blocks:
            handle.write(block)
    return 8 + len(text) + position


def _load(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as handle:
            # Copies: a mapped file that another process replaces or cuts would change the numbers or end the program.
            tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 - no mapping
            return tensors, handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error


def _pick(tensors: Mapping[str, torch.Tensor], prefix: str, *others: str) -> torch.Tensor | None:
    for name, tensor in tensors.items():
        if name.startswith(prefix) and not name.startswith(others or ("\0",)):
            return tensor
    return None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_numbers(tensor: torch.Tensor, path: str | Path, phase: str) -> None:
    import torch

    name = _dtype_name(tensor)
    if name not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"Caches hold float16, bfloat16 or float32, not {name}.")
    if not bool(torch.isfinite(tensor).all()):
        raise EngineError(
            f"The encoder gave values that are not numbers for {Path(path).name}. Try float32 or bfloat16.", phase
        )


def _check_read(tensor: torch.Tensor, path: str | Path) -> None:
    import torch

    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
        raise _damaged(path, "it holds values that are not numbers")


def _damaged(path: str | Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be used: {reason[:300]}. Cache it again.")
