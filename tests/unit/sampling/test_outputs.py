"""Written files: played and measured by other readers, settings read back equal, never half there."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from backend.config.generate import GenerateOptions
from backend.config.metadata import SETTINGS_KEY, encode_settings, read_settings
from backend.config.prompts import plan_clips
from backend.errors import UserError
from backend.sampling.outputs import (
    latent_path_for,
    read_latent,
    write_image,
    write_images,
    write_latent,
    write_video,
)
from backend.sampling.save import as_frames, save_clip

HOSTILE = (
    "a \"quoted\" 'cat' {} } ] \\ \\n ; # = $(id) `x`\nsecond line\r\n\ttab [section]\n;FFMETADATA1\ntitle=x\n"
    "Кот идёт 🎬👩\u200d🚀 \u2028 \x01 \x7f \u202e %s %d </title> \x1b[31m"
)
PROMPTS = {
    "hostile": HOSTILE, "empty": "", "long": (HOSTILE * 300)[:20_000], "emoji": "🎬" * 20_000, "equal": "=;#\\\n" * 9,
}  # fmt: skip


def _settings(prompt: str = "x") -> dict[str, Any]:
    return {"version": 1, "options": {"prompt": prompt, "seed": 2**63 - 1, "guidance": 0.1}, "seed": 2**63 - 1}


def _smooth(frames: int, height: int, width: int, seed: int = 0) -> list[numpy.ndarray]:
    """Random smooth moving content, as clips are: a few waves in each colour."""
    rng = numpy.random.default_rng(seed)
    rows, columns = numpy.mgrid[0:height, 0:width]
    clip = []
    waves = rng.uniform(-0.025, 0.025, (3, 4, 3)), rng.uniform(0, 6, (3, 4))
    for time in range(frames):
        channels = []
        for channel in range(3):
            total = numpy.zeros((height, width))
            for (a, b, c), phase in zip(waves[0][channel], waves[1][channel], strict=True):
                total += numpy.sin(6 * (a * rows + b * columns) + 10 * c * time + phase)
            channels.append(127.5 + total * 25)
        clip.append(numpy.stack(channels, -1).clip(0, 255).astype(numpy.uint8))
    return clip


def _decode(path: Path) -> list[numpy.ndarray]:
    with av.open(str(path)) as container:
        return [_rgb_of_bt709(frame) for frame in container.decode(video=0)]


def _boxes(path: Path) -> list[bytes]:
    data, position, names = path.read_bytes(), 0, []
    while position < len(data):
        size, name = struct.unpack(">I4s", data[position : position + 8])
        names.append(name)
        position += size
    return names


# --- clips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "size", "fps"), [(17, (64, 64), 24), (5, (96, 32), 12), (1, (16, 16), 24), (49, (80, 48), 30)]
)
def test_a_clip_is_h264_that_browsers_play(tmp_path: Path, frames: int, size: tuple[int, int], fps: int) -> None:
    path = tmp_path / "clip.mp4"
    width, height = size
    written = write_video(path, _smooth(frames, height, width), fps, _settings())
    assert (written.path, written.kind) == (path, "video")
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == size
        assert stream.average_rate == fps
        assert stream.frames == frames
        assert abs(stream.duration * stream.time_base - frames / fps) < 1e-6
        assert abs(container.duration / 1e6 - frames / fps) < 2e-3
        context = stream.codec_context
        assert [int(context.colorspace), int(context.color_primaries), int(context.color_trc)] == [1, 1, 1]
        assert int(context.color_range) == 1
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
        assert [round(float(time * fps), 6) for time in times] == list(range(frames))
    names = _boxes(path)
    assert names.index(b"moov") < names.index(b"mdat")


def test_smooth_content_keeps_35_db(tmp_path: Path) -> None:
    for seed in range(4):
        clip = _smooth(17, 64, 96, seed)
        write_video(tmp_path / "clip.mp4", clip, 24, _settings())
        for before, after in zip(clip, _decode(tmp_path / "clip.mp4"), strict=True):
            error = numpy.mean((before.astype(float) - after) ** 2)
            assert 10 * numpy.log10(255**2 / error) > 35


def test_flat_colours_come_back_within_three_levels(tmp_path: Path) -> None:
    """BT.709 is written and said: a player that believes the tags shows the colours that were made."""
    colours = [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (0, 0, 0),
        (235, 220, 180),
        (20, 25, 80),
        (128,) * 3,
    ]
    rows = numpy.zeros((64, 64, 3), numpy.uint8)
    for index, colour in enumerate(colours):
        top, left = 32 * (index // 4), 16 * (index % 4)
        rows[top : top + 32, left : left + 16] = colour
    write_video(tmp_path / "clip.mp4", [rows] * 5, 24, _settings())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        for frame in container.decode(video=0):
            found = _rgb_of_bt709(frame)
            for index, colour in enumerate(colours):
                top, left = 32 * (index // 4) + 8, 16 * (index % 4) + 4
                patch = found[top : top + 16, left : left + 8].reshape(-1, 3).mean(0)
                assert numpy.abs(patch - colour).max() <= 3


def _rgb_of_bt709(frame: av.VideoFrame) -> numpy.ndarray:
    """Limited-range BT.709 by its own numbers (Kr 0.2126, Kb 0.0722), not by the writer's library."""
    planes = frame.to_ndarray(format="yuv420p")
    height, width = frame.height, frame.width
    luma = planes[:height].astype(float)
    blue, red = (
        plane.reshape(height // 2, width // 2).repeat(2, 0).repeat(2, 1).astype(float)
        for plane in numpy.split(planes[height:].reshape(-1), 2)
    )
    y, cb, cr = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r, b = y + 2 * (1 - 0.2126) * cr, y + 2 * (1 - 0.0722) * cb
    g = (y - 0.2126 * r - 0.0722 * b) / (1 - 0.2126 - 0.0722)
    return (numpy.stack([r, g, b], -1) * 255).clip(0, 255)


def test_an_encoder_that_fails_leaves_the_old_clip(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, _smooth(5, 32, 32), 24, _settings("old"))
    before = path.read_bytes()

    def broken() -> Iterator[numpy.ndarray]:
        yield from _smooth(3, 32, 32)
        raise RuntimeError("no more frames")

    with pytest.raises(RuntimeError, match="no more frames"):
        write_video(path, broken(), 24, _settings("new"))
    with pytest.raises(ValueError):
        write_video(path, [numpy.zeros((32, 32), numpy.uint8)], 24, _settings("new"))
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["clip.mp4"]


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", ["mp4", "png", "webp", "latent.safetensors"])
def test_settings_come_back_equal(tmp_path: Path, kind: str, name: str) -> None:
    settings, path, frame = _settings(PROMPTS[name]), tmp_path / f"a.{kind}", numpy.zeros((16, 16, 3), numpy.uint8)
    if kind == "mp4":
        write_video(path, [frame], 24, settings)
    elif kind == "latent.safetensors":
        write_latent(path, torch.zeros(16, 1, 2, 2), settings)
    else:
        write_image(path, frame, settings)
    assert read_settings(path) == settings


def test_200_random_prompts_come_back_from_clips(tmp_path: Path) -> None:
    rng, frame = random.Random(4), numpy.zeros((16, 16, 3), numpy.uint8)
    for _ in range(200):
        prompt = "".join(chr(rng.choice([rng.randrange(1, 128), rng.randrange(1, 0xD800)])) for _ in range(40))
        write_video(tmp_path / "a.mp4", [frame], 24, _settings(prompt))
        assert read_settings(tmp_path / "a.mp4") == _settings(prompt)


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_images_are_lossless_and_numbered(tmp_path: Path, suffix: str) -> None:
    noise = [numpy.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=numpy.uint8) for seed in range(12)]
    written = write_images(tmp_path / f"a.b{suffix}", noise, _settings())
    assert [item.path.name for item in written] == [f"a.b_{number:05d}{suffix}" for number in range(1, 13)]
    assert {item.kind for item in written} == {"image"}
    for item, pixels in zip(written, noise, strict=True):
        with Image.open(item.path) as image:
            assert image.format == suffix[1:].upper()
            assert numpy.array_equal(numpy.asarray(image), pixels)
        assert read_settings(item.path) == _settings()
    (only,) = write_images(tmp_path / f"one{suffix}", noise[:1], _settings())
    assert only.path == tmp_path / f"one{suffix}"


# --- latents ------------------------------------------------------------------------------------------------------


def test_latents_come_back_bit_for_bit(tmp_path: Path) -> None:
    latents = torch.randn(16, 3, 4, 5)
    path = latent_path_for(tmp_path / "a.b.mp4")
    assert path.name == "a.b.latent.safetensors"
    assert latent_path_for(path) == path
    write_latent(path, latents, _settings(HOSTILE))
    found, settings = read_latent(path)
    assert found.dtype == torch.float32
    assert torch.equal(found, latents)
    assert settings == _settings(HOSTILE)
    write_latent(path, latents.to(torch.bfloat16).transpose(2, 3), _settings())
    assert torch.equal(read_latent(path)[0], latents.to(torch.bfloat16).float().transpose(2, 3))


@pytest.mark.parametrize(
    "tensor",
    [torch.full((16, 1, 2, 2), float("nan")), torch.full((16, 1, 2, 2), float("inf")), torch.zeros(16, 2, 2),
     torch.zeros(4, 1, 2, 2), torch.zeros(16, 0, 2, 2)],
    ids=["nan", "inf", "3d", "channels", "empty"],
)  # fmt: skip
def test_latents_that_cannot_be_decoded_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = tmp_path / "a.latent.safetensors"
    save_file({"latent": tensor}, path, {SETTINGS_KEY: encode_settings(_settings())})
    with pytest.raises(UserError, match="no finite latents") as caught:
        read_latent(path)
    assert caught.value.field == "latent_path"


def test_other_and_cut_files_are_no_latents(tmp_path: Path) -> None:
    path = tmp_path / "a.latent.safetensors"
    save_file({"other": torch.zeros(1)}, path, {SETTINGS_KEY: encode_settings(_settings())})
    with pytest.raises(UserError, match="no finite latents"):
        read_latent(path)
    write_latent(path, torch.zeros(16, 1, 2, 2), _settings())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="no finite latents"):
        read_latent(path)
    save_file({"latent": torch.zeros(16, 1, 2, 2)}, path)
    with pytest.raises(UserError, match="carries no settings"):
        read_latent(path)


# --- what a clip becomes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output_type", "frames", "name", "expected"),
    [
        ("video", 5, "a.mp4", {"a.mp4": "video"}),
        ("video", 1, "a.png", {"a.png": "image"}),
        ("video", 1, "a.mp4", {"a.mp4": "video"}),
        ("images", 5, "a.webp", {f"a_0000{n}.webp": "image" for n in range(1, 6)}),
        ("latent", 5, "a.mp4", {"a.latent.safetensors": "latent"}),
        ("both", 5, "a.mp4", {"a.mp4": "video", "a.latent.safetensors": "latent"}),
    ],
)
def test_save_clip(tmp_path: Path, output_type: str, frames: int, name: str, expected: dict[str, str]) -> None:
    options = GenerateOptions(
        task="k5-demo-t2v", prompt="x", frames=frames, output=str(tmp_path / name), output_type=output_type
    )
    (clip,) = plan_clips(options).clips
    latents, pixels = torch.zeros(16, (frames - 1) // 4 + 1, 2, 2), torch.zeros(3, frames, 16, 16)
    written = save_clip(
        clip, options, latents, None if output_type == "latent" else pixels, _settings() | {"fps": options.fps}
    )
    assert {item.path.name: item.kind for item in written} == expected
    assert {item.name for item in tmp_path.iterdir()} == set(expected)


def test_pixels_become_bytes_by_the_official_rule() -> None:
    """(x + 1) * 127.5, cut at both ends and truncated."""
    values = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.5, 0.9999, 1.0, 1.5])
    (frame,) = as_frames(values.reshape(1, 1, 1, 8).expand(3, 1, 1, 8))
    assert frame.dtype == numpy.uint8
    assert frame.shape == (1, 8, 3)
    assert frame[0, :, 0].tolist() == [0, 0, 0, 127, 191, 254, 255, 255]
