"""Bringing pictures to the size of the clip: area averages downwards, Lanczos upwards, then the crop."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from backend.data.images import over_white

Pixels = NDArray[numpy.uint8]
Size = tuple[int, int]
Box = tuple[int, int, int, int]

_BT709, _BT601 = 1, 5
_LIMITED, _FULL = 1, 2
_UNSPECIFIED = (0, 2)
# Files that do not name their matrix: players take BT.709 for anything larger than standard definition.
_STANDARD_DEFINITION = (1280, 576)
_MAX_STRETCH = 4


@dataclass(frozen=True)
class Orientation:
    """How a stored frame becomes the one that is seen: transposed first, then mirrored along x and y."""

    transposed: bool = False
    mirrored_x: bool = False
    mirrored_y: bool = False

    @property
    def degrees(self) -> int:
        """Clockwise turn: 0, 90, 180 or 270; of the picture mirrored left to right first if `mirrored`."""
        quarter_turns = {
            (False, False, False): 0,
            (False, True, False): 0,
            (True, True, False): 1,
            (True, True, True): 1,
            (False, True, True): 2,
            (False, False, True): 2,
            (True, False, True): 3,
            (True, False, False): 3,
        }
        return 90 * quarter_turns[(self.transposed, self.mirrored_x, self.mirrored_y)]

    @property
    def mirrored(self) -> bool:
        """Whether the turn alone does not give the picture."""
        return self.transposed ^ self.mirrored_x ^ self.mirrored_y

    def apply(self, pixels: Pixels) -> Pixels:
        """Turn uint8 [H, W, 3]; a view."""
        if self.transposed:
            pixels = pixels.transpose(1, 0, 2)
        if self.mirrored_x:
            pixels = pixels[:, ::-1]
        return pixels[::-1] if self.mirrored_y else pixels


def orientation_of(frame: VideoFrame) -> Orientation:
    """Read a frame's display matrix; turns that are not multiples of 90 degrees go to the nearest one.

    The matrix maps stored to shown points: x' = a x + c y, y' = b x + d y (nine 32-bit numbers: a b u, c d v, ...).
    """
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    a, b, _, c, d = struct.unpack_from("<5i", memoryview(data))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def seen_size(frame: VideoFrame, aspect: Fraction | None) -> Size:
    """Width and height as a person sees the frame: pixels that are not square are stretched along x, then turned.

    Args:
        aspect: width of a pixel / its height, None if the file does not say; values beyond 4 are taken for damage.
    """
    width, height = frame.width, frame.height
    if aspect and Fraction(1, _MAX_STRETCH) <= aspect <= _MAX_STRETCH:
        width = max(1, round(width * aspect))
    return (height, width) if orientation_of(frame).transposed else (width, height)


@dataclass(frozen=True)
class Target:
    """The size that a whole frame is brought to, and the part of it that is kept (left, top, right, bottom).

    Raises:
        ValueError: a side below 1, or a crop that is empty or leaves the frame.
    """

    size: Size
    crop: Box | None = None

    def __post_init__(self) -> None:
        width, height = self.size
        left, top, right, bottom = self.crop or (0, 0, width, height)
        if width < 1 or height < 1 or not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"A frame of {width} x {height} cannot be cropped to {self.crop}.")

    def cut(self, pixels: Pixels) -> Pixels:
        """Keep the crop of a scaled frame; contiguous."""
        left, top, right, bottom = self.crop or (0, 0, *self.size)
        return numpy.ascontiguousarray(pixels[top:bottom, left:right])


def make_target(size: Sequence[int] | None, crop: Sequence[int] | None) -> Target | None:
    """A target from plain numbers; None (as a person sees the frame) when no size is given.

    Raises:
        ValueError: a crop without a size, or numbers that do not fit each other.
    """
    if size is None:
        if crop is not None:
            raise ValueError("A crop needs the size of the whole frame.")
        return None
    width, height = size
    if crop is None:
        return Target((width, height))
    left, top, right, bottom = crop
    return Target((width, height), (left, top, right, bottom))


def resize_pixels(pixels: Pixels, target: Target) -> Pixels:
    """Scale and crop uint8 [H, W, 3]: exact area averages when no side grows, else Pillow's Lanczos filter."""
    height, width = pixels.shape[:2]
    new_width, new_height = target.size
    if (width, height) == target.size:
        return target.cut(pixels)
    if new_width > width or new_height > height:
        image = Image.fromarray(pixels).resize(target.size, Image.Resampling.LANCZOS)
        return target.cut(numpy.asarray(image))
    rows = _area(pixels.astype(numpy.float32), new_height)
    scaled = _area(rows.transpose(1, 0, 2), new_width).transpose(1, 0, 2)
    return target.cut(numpy.clip(numpy.rint(scaled), 0, 255).astype(numpy.uint8))


def _area(values: NDArray[numpy.float32], length: int) -> NDArray[numpy.float32]:
    """Average float32 [N, ...] to [length, ...]: every result is the mean of the stretch that it covers.

    A pixel that is covered in part counts with that part, so non-whole ratios give no ripple.
    """
    count = values.shape[0]
    if count == length:
        return values
    edges = numpy.arange(length + 1, dtype=numpy.float64) * (count / length)
    first = numpy.floor(edges[:-1]).astype(int)
    result = numpy.zeros((length, *values.shape[1:]), dtype=numpy.float32)
    for offset in range(math.ceil(count / length) + 1):
        index = first + offset
        covered = numpy.minimum(edges[1:], index + 1) - numpy.maximum(edges[:-1], index)
        weight = (numpy.maximum(covered, 0) * (length / count)).astype(numpy.float32)
        result += weight.reshape(-1, *[1] * (values.ndim - 1)) * values[numpy.minimum(index, count - 1)]
    return result


class FrameScaler:
    """Turns decoded frames of one video into RGB of the target's size, at once, so that no large picture is kept.

    Frames in YUV are scaled plane by plane in swscale (area downwards, Lanczos upwards) and then converted with their
    own matrix and range: cheaper than scaling RGB, and colour is filtered once. Other frames go through RGB.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._scale = VideoReformatter()
        self._convert = VideoReformatter()

    def pixels(self, frame: VideoFrame) -> Pixels:
        """uint8 [H, W, 3], turned, scaled and cropped; contiguous."""
        orientation = orientation_of(frame)
        width, height = self.target.size
        stored = (height, width) if orientation.transposed else (width, height)
        components = frame.format.components
        if any(component.is_alpha for component in components):
            image = over_white(Image.fromarray(_as_bytes(frame.to_ndarray(format="rgba"))))
            return resize_pixels(orientation.apply(numpy.asarray(image)), self.target)
        if frame.format.is_rgb or len(components) != 3:
            return resize_pixels(orientation.apply(_as_bytes(frame.to_ndarray(format="rgb24"))), self.target)
        return self.target.cut(orientation.apply(self._from_yuv(frame, stored)))

    def _from_yuv(self, frame: VideoFrame, size: Size) -> Pixels:
        width, height = size
        full = frame.format.name.startswith("yuvj") or int(frame.color_range) == _FULL
        levels = _FULL if full else _LIMITED
        matrix = int(frame.colorspace)
        if matrix in _UNSPECIFIED:
            large = frame.width >= _STANDARD_DEFINITION[0] or frame.height > _STANDARD_DEFINITION[1]
            matrix = _BT709 if large else _BT601
        grows = width > frame.width or height > frame.height
        scaled = self._scale.reformat(
            frame,
            width,
            height,
            # Older versions of PyAV tell the range by the name of the format.
            "yuvj444p" if full else "yuv444p",
            interpolation="LANCZOS" if grows else "AREA",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=levels,
            dst_color_range=levels,
            **_one_thread(),
        )
        converted = self._convert.reformat(
            scaled,
            format="rgb24",
            src_colorspace=matrix,
            # Without meaning for RGB, but older versions of PyAV skip the matrix when both are equal.
            dst_colorspace=_BT709 if matrix != _BT709 else _BT601,
            src_color_range=levels,
            dst_color_range=_FULL,
            **_one_thread(),
        )
        return _as_bytes(converted.to_ndarray())


def _as_bytes(pixels: Any) -> Pixels:
    """PyAV says only that it gives an array of some kind; for these formats it is uint8."""
    return pixels


@cache
def _one_thread() -> dict[str, Any]:
    """The argument that keeps swscale to one thread; PyAV below 17 has none and always uses one."""
    try:
        VideoReformatter().reformat(VideoFrame(16, 16, "yuv420p"), 8, 8, "yuv444p", threads=1)
    except TypeError:
        return {}
    return {"threads": 1}
