"""Writing what was made: H.264 clips that browsers play, images, latents; all atomic, all with settings inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from backend.config.metadata import EXIF_IFD, EXIF_USER_COMMENT, SETTINGS_KEY, encode_settings, read_settings
from backend.errors import UserError
from backend.files import atomic_path

LATENT_SUFFIX = ".latent.safetensors"
_BT709 = 1
_LIMITED_RANGE = 1
_CRF = "16"


@dataclass(frozen=True)
class Written:
    """One file that was written: its path and what it is (video, image, images, latent)."""

    path: Path
    kind: str


def latent_path_for(output: Path) -> Path:
    """`clip.mp4` -> `clip.latent.safetensors`, beside it."""
    name = output.name.removesuffix(LATENT_SUFFIX) if output.name.endswith(LATENT_SUFFIX) else output.stem
    return output.with_name(name + LATENT_SUFFIX)


def write_video(path: Path, frames: Iterable[numpy.ndarray], fps: int, settings: dict[str, Any]) -> Written:
    """Write an MP4: H.264, yuv420p, BT.709, index in front, so that every browser plays and seeks it.

    Args:
        frames: uint8 [H, W, 3] each, sides even.
        fps: frames a second, a whole number.
    """
    with atomic_path(path) as temporary:
        # Whole frames in the file's own clock: its default of milliseconds cuts 17 frames at 24 a second short.
        options = {"movflags": "+faststart+use_metadata_tags", "movie_timescale": str(1000 * fps)}
        with av.open(str(temporary), "w", options=options) as container:
            container.metadata["title"] = str(settings.get("options", {}).get("prompt", ""))[:200]
            container.metadata[SETTINGS_KEY] = encode_settings(settings)
            stream = None
            for number, pixels in enumerate(frames):
                if stream is None:
                    stream = _h264_stream(container, pixels.shape[1], pixels.shape[0], fps)
                frame = av.VideoFrame.from_ndarray(numpy.ascontiguousarray(pixels), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)
                frame.pts, frame.time_base = number, Fraction(1, fps)
                container.mux(stream.encode(frame))
            if stream is not None:
                container.mux(stream.encode(None))
    return Written(path, "video")


def _h264_stream(container: Any, width: int, height: int, fps: int) -> Any:
    stream = container.add_stream("libx264", rate=fps, options={"crf": _CRF, "preset": "medium"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base = Fraction(1, fps)
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    return stream


def write_image(path: Path, pixels: numpy.ndarray, settings: dict[str, Any]) -> Written:
    """Write one frame, uint8 [H, W, 3], as PNG or (lossless) WebP by the suffix of `path`."""
    image = Image.fromarray(pixels)
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".webp":
            exif = Image.Exif()
            exif[EXIF_IFD] = {EXIF_USER_COMMENT: b"ASCII\0\0\0" + encode_settings(settings).encode("ascii")}
            image.save(temporary, "WEBP", lossless=True, exif=exif.tobytes())
        else:
            text = PngInfo()
            text.add_text(SETTINGS_KEY, encode_settings(settings))
            image.save(temporary, "PNG", pnginfo=text, compress_level=4)
    return Written(path, "image")


def write_images(path: Path, frames: Sequence[numpy.ndarray], settings: dict[str, Any]) -> list[Written]:
    """Write each frame as `<stem>_00001.png` beside `path`; a single frame goes to `path` itself."""
    if len(frames) == 1:
        return [write_image(path, frames[0], settings)]
    names = [path.with_name(f"{path.stem}_{number:05d}{path.suffix}") for number in range(1, len(frames) + 1)]
    return [write_image(name, pixels, settings) for name, pixels in zip(names, frames, strict=True)]


def write_latent(path: Path, latents: torch.Tensor, settings: dict[str, Any]) -> Written:
    """Write latents [16, F, H, W] as float32 tensor `latent`, scaled as the denoiser works with them."""
    with atomic_path(path) as temporary:
        # Through bytes: the library's own file writer hides a full disk behind an error of another kind.
        tensors = {"latent": latents.to(torch.float32).contiguous().cpu()}
        temporary.write_bytes(save(tensors, {SETTINGS_KEY: encode_settings(settings)}))
    return Written(path, "latent")


def read_latent(path: str | Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """The latents [16, F, H, W] (float32) of a latent file, and the settings it carries.

    Raises:
        UserError: not a latent file of this project, or it holds NaN or infinity.
    """
    settings = read_settings(path)
    latents = torch.empty(0)
    with suppress(SafetensorError), safe_open(str(path), framework="pt") as handle:
        latents = handle.get_tensor("latent").to(torch.float32)
    if latents.ndim != 4 or latents.shape[0] != 16 or not latents.numel() or not bool(torch.isfinite(latents).all()):
        raise UserError(f"{Path(path).name} holds no finite latents of shape [16, F, H, W].", "latent_path")
    return latents, settings
