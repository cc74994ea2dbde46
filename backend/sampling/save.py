"""Which files a clip becomes: video, images, latents, or both."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from backend.config.generate import GenerateOptions
from backend.config.prompts import ClipRequest
from backend.sampling.outputs import Written, latent_path_for, write_image, write_images, write_latent, write_video
from backend.vae.hunyuan import to_uint8

_IMAGE_SUFFIXES = {".png", ".webp"}


def save_clip(
    clip: ClipRequest,
    options: GenerateOptions,
    latents: torch.Tensor,
    pixels: torch.Tensor | None,
    settings: dict[str, Any],
) -> list[Written]:
    """Write the files of one clip under their final names, each atomically.

    Args:
        latents: [16, F, H, W].
        pixels: [3, F, H, W] in -1..1, or None when only latents are asked for.
    """
    written: list[Written] = []
    if pixels is not None:
        frames = as_frames(pixels)
        if options.output_type == "images":
            written += write_images(clip.output, frames, settings)
        elif clip.output.suffix.lower() in _IMAGE_SUFFIXES:
            written.append(write_image(clip.output, frames[0], settings))
        else:
            written.append(write_video(clip.output, frames, settings["fps"], settings))
    if options.output_type in ("latent", "both"):
        written.append(write_latent(latent_path_for(clip.output), latents, settings))
    return written


def as_frames(pixels: torch.Tensor) -> list[numpy.ndarray]:
    """[3, F, H, W] in -1..1 -> F arrays [H, W, 3] of uint8."""
    return list(to_uint8(pixels).permute(1, 2, 3, 0).contiguous().cpu().numpy())
