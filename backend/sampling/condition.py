"""Given frames: how an image becomes pixels of the clip's size, and how the frames after it are matched to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from backend.config.images import open_image
from backend.errors import UserError

REFERENCE_FRAMES = 5
NORMALISED_FRAMES = 4


@dataclass(frozen=True)
class GivenFrames:
    """Clean latents that replace frames of the clip: each [1, 1, H, W, 16], float32, scaled; `last` may be None."""

    first: torch.Tensor
    last: torch.Tensor | None = None

    def replace(self, latents: torch.Tensor) -> torch.Tensor:
        """Copy of `latents` [1, F, H, W, 16] with the given frames in place."""
        replaced = latents.clone()
        replaced[:, :1] = self.first.to(latents)
        if self.last is not None:
            replaced[:, -1:] = self.last.to(latents)
        return replaced

    def mask(self, latents: torch.Tensor) -> torch.Tensor:
        """The mask channel [1, F, H, W, 1] in the dtype of `latents`: 1 on given frames."""
        mask = latents.new_zeros((*latents.shape[:-1], 1))
        mask[:, :1] = 1
        if self.last is not None:
            mask[:, -1:] = 1
        return mask


def load_image(path: str | Path, field: str) -> Image.Image:
    """Read an image as people see it: EXIF orientation applied, transparency over white, RGB.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with open_image(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{Path(path).name} cannot be decoded ({error}). Use another image.", field) from None


def fit_image(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """Scale `image` until it covers `width` x `height` (aspect kept, antialiased bilinear) and crop its middle.

    Returns:
        float32 tensor [1, 3, 1, height, width] in -1..1.
    """
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = numpy.asarray(resized.crop((left, top, left + width, top + height)), dtype=numpy.float32)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1)[None, :, None].contiguous()


def normalise_first_frames(latents: torch.Tensor) -> torch.Tensor:
    """Match mean and spread of the first four latent frames to the frames that follow, within narrow limits.

    Formula of the official image-to-video pipeline, for each frame k < 4 over (H, W, C): the reference is frames
    4 to 8; m' = clamp(m_ref, m - 0.05, m + 0.1), s' = clamp(s_ref, s - 0.1, s + 0.25), y = (x - m) / s * s' + m'.
    The official code returns a tuple for one frame and NaN for up to four; a clip without five reference frames
    (fewer than 9 latent frames) is returned unchanged here, and so is a frame without any spread.

    Args:
        latents: [1, F, H, W, 16], any floating dtype.
    """
    if latents.shape[1] < NORMALISED_FRAMES + REFERENCE_FRAMES:
        return latents
    reference = latents[:, NORMALISED_FRAMES : NORMALISED_FRAMES + REFERENCE_FRAMES].float()
    normalised = latents.clone()
    for index in range(NORMALISED_FRAMES):
        frame = latents[:, index].float()
        mean, spread = frame.mean(), frame.std()
        if not spread > 0:
            continue
        new_mean = reference.mean().clamp(mean - 0.05, mean + 0.1)
        new_spread = reference.std().clamp(spread - 0.1, spread + 0.25)
        normalised[:, index] = ((frame - mean) / spread * new_spread + new_mean).to(latents.dtype)
    return normalised
