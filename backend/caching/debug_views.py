"""What would be encoded, to look at: strips of frames, clips, or text art; nothing is encoded and no VAE is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy
from PIL import Image, ImageColor

from backend.caching.latent_work import LatentJob, printable
from backend.config.cache import CacheLatentsOptions
from backend.data.frames import TARGET_FPS
from backend.data.scaling import Pixels
from backend.files import atomic_path

DEBUG_FOLDER = "k5_debug"
_STRIP_FRAMES = 8
_LETTERS = " .:-=+*#%@"
# A letter in a terminal is about twice as high as wide.
_LETTER_ASPECT = 2
_RESET = "\x1b[0m"
View = Callable[[LatentJob, Pixels], Path | None]


def debug_view(options: CacheLatentsOptions) -> View:
    """What --debug_mode does with the frames of an item; it returns the file that it wrote, if any."""
    if options.debug_mode == "image":
        return write_strip
    if options.debug_mode == "video":
        return write_clip

    def show(job: LatentJob, clip: Pixels) -> None:
        sys.stdout.write(text_art(job, clip, options.console_width, options.console_back))
        sys.stdout.flush()

    return show


def write_strip(job: LatentJob, clip: Pixels) -> Path:
    """Write up to eight frames side by side, the first and the last among them, as PNG."""
    chosen = numpy.unique(numpy.linspace(0, len(clip) - 1, _STRIP_FRAMES).round().astype(int))
    path = _debug_path(job, ".png")
    with atomic_path(path) as temporary:
        Image.fromarray(numpy.concatenate(list(clip[chosen]), axis=1)).save(temporary, "PNG")
    return path


def write_clip(job: LatentJob, clip: Pixels) -> Path:
    """Write the frames as H.264 at 24 a second; a still as PNG."""
    if len(clip) == 1:
        return write_strip(job, clip)
    path = _debug_path(job, ".mp4")
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=TARGET_FPS, options={"crf": "16", "preset": "veryfast"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, TARGET_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _debug_path(job: LatentJob, suffix: str) -> Path:
    return job.path.parent / DEBUG_FOLDER / (job.path.stem + suffix)


def text_art(job: LatentJob, clip: Pixels, width: int, back: str | None = None) -> str:
    """The first frame in coloured letters, `width` of them a line, under a line that says what it is.

    Args:
        back: colour behind the letters, a name or #rrggbb; None: the terminal's own.
    """
    frames, height, own_width = clip.shape[:3]
    lines = max(1, round(width * height / own_width / _LETTER_ASPECT))
    small = numpy.asarray(Image.fromarray(clip[0]).resize((width, lines), Image.Resampling.BOX))
    brightness = small.astype(numpy.float32) @ numpy.array([0.2126, 0.7152, 0.0722], dtype=numpy.float32)
    steps = numpy.clip(brightness / 256 * len(_LETTERS), 0, len(_LETTERS) - 1).astype(int)
    behind = ""
    if back is not None:
        red, green, blue = ImageColor.getrgb(back)[:3]
        behind = f"\x1b[48;2;{red};{green};{blue}m"
    length = f"{frames} frames" if frames > 1 else "still"
    art = [f"{printable(job.item.source.identity)}: {own_width} x {height}, {length}"]
    for colours, row in zip(small, steps, strict=True):
        letters = (
            f"\x1b[38;2;{red};{green};{blue}m{_LETTERS[step]}"
            for (red, green, blue), step in zip(colours, row, strict=True)
        )
        art.append(behind + "".join(letters) + _RESET)
    return "\n".join(art) + "\n"
