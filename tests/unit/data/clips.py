"""Makes small clips and images whose frames say their own number, for the tests of reading media."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy
from numpy.typing import NDArray

Pixels = NDArray[numpy.uint8]

_COLUMNS, _ROWS = 4, 3
# Pictures of four colours: red, green above blue, white.
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


def numbered(number: int, size: tuple[int, int] = (64, 48)) -> Pixels:
    """A frame whose 4 x 3 fields are dark or bright: the bits of its number, the lowest one first."""
    width, height = size
    bits = numpy.array([number >> place & 1 for place in range(_COLUMNS * _ROWS)]).reshape(_ROWS, _COLUMNS)
    rows = numpy.arange(height) * _ROWS // height
    columns = numpy.arange(width) * _COLUMNS // width
    grey = (40 + 170 * bits[rows][:, columns]).astype(numpy.uint8)
    return numpy.repeat(grey[:, :, None], 3, axis=2)


def read_number(pixels: Pixels) -> int:
    """The number that `numbered` drew, at any size; asserts that every field is clearly dark or bright."""
    height, width = pixels.shape[:2]
    number = 0
    for place in range(_COLUMNS * _ROWS):
        row, column = divmod(place, _COLUMNS)
        y, x = (2 * row + 1) * height // (2 * _ROWS), (2 * column + 1) * width // (2 * _COLUMNS)
        value = float(pixels[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean())
        assert not 100 < value < 150, f"field {place} of a frame is neither dark nor bright: {value}"
        number |= (value > 125) << place
    return number


def read_numbers(clip: Pixels) -> list[int]:
    """The numbers of all frames of a clip."""
    return [read_number(frame) for frame in clip]


def corners(size: tuple[int, int] = (64, 48)) -> Pixels:
    """A picture that looks different in each of the eight orientations."""
    width, height = size
    pixels = numpy.empty((height, width, 3), numpy.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = CORNERS[:2]
    pixels[height // 2 :, : width // 2], pixels[height // 2 :, width // 2 :] = CORNERS[2:]
    return pixels


def read_corners(pixels: Pixels) -> str:
    """Names of the colours in reading order: `RGBW` for `corners` unturned."""
    height, width = pixels.shape[:2]
    names = ""
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            distances = [int(abs(pixels[y, x].astype(int) - colour).sum()) for colour in CORNERS]
            names += "RGBW"[distances.index(min(distances))]
    return names


def write_clip(
    path: Path,
    frames: int = 25,
    size: tuple[int, int] = (64, 48),
    rate: Fraction | int = 24,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    unit: Fraction | None = None,
    draw: Callable[[int], Pixels] | None = None,
    colour: dict[str, int] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    """Encode a clip whose frames are `draw(number)` (default: `numbered`); `pts` in `unit` makes the rate variable."""
    draw = draw or (lambda number: numbered(number, size))
    if codec == "libx264":
        options = {"preset": "veryfast", **(options or {})}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.thread_count = 1
        if unit is not None:
            stream.time_base = stream.codec_context.time_base = unit
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (colour or {}).items():
            setattr(stream.codec_context, name, value)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24").reformat(
                format=pixel_format,
                dst_colorspace=(colour or {}).get("colorspace"),
                dst_color_range=(colour or {}).get("color_range"),
            )
            frame.pts = pts[number] if pts else number
            frame.time_base = unit or 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path, seconds: float = 0.5) -> Path:
    """An MP4 file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        for _ in range(max(1, round(seconds * 16))):
            frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write a display matrix into the track header of an MP4 file, as telephones do."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", data, place) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, place, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def packet_places(path: Path) -> list[tuple[int, int]]:
    """(place in the file, bytes) of every packet of video, in the order of the file."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def damage(path: Path, packet: int, start: float = 0.0, seed: int = 0) -> Path:
    """Overwrite a packet with noise, from this part of its bytes on."""
    place, size = packet_places(path)[packet]
    first = round(size * start)
    data = bytearray(path.read_bytes())
    data[place + first : place + size] = numpy.random.default_rng(seed).bytes(size - first)
    path.write_bytes(data)
    return path
