"""The size that a source is brought to: buckets of one area, or one fixed size, and the scale and crop that lead there.

Sizes are (width, height) in pixels. Images and videos obey the same settings. The rules are those that other trainers
use, so that a cache made elsewhere has the same size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from backend.config.dataset import SIZE_STEP, DatasetEntry

NABLA_STEP = 128
Nabla = bool | Literal["stretch"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class ResizePlan:
    """Scale the source to `scaled` (width, height), then cut `crop` (left, top, right, bottom) out of it."""

    scaled: tuple[int, int]
    crop: Box

    @property
    def size(self) -> tuple[int, int]:
        """The size of the result."""
        left, top, right, bottom = self.crop
        return right - left, bottom - top


@functools.lru_cache(maxsize=256)
def bucket_list(resolution: tuple[int, int], step: int = SIZE_STEP) -> tuple[Bucket, ...]:
    """All buckets of about the area of `resolution`, sorted, with aspects of about 1:4 to 4:1.

    With area A and s = floor(sqrt(A)): for w from s // 2, rounded down to `step`, up to s in steps, h = A // w rounded
    down; both (w, h) and (h, w).
    """
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    found: set[Bucket] = set()
    for width in range(max(_down(side // 2, step), step), side + 1, step):
        height = _down(area // width, step)
        if height:
            found |= {Bucket(width, height), Bucket(height, width)}
    return tuple(sorted(found)) or (Bucket(step, step),)


def choose_bucket(size: tuple[int, int], entry: DatasetEntry, *, nabla: Nabla = False) -> Bucket:
    """The bucket of a source of `size`.

    Without buckets: the resolution, sides rounded down to 16. With `bucket_no_upscale` a source of no larger area than
    the resolution keeps its own size, rounded down to 16. Else the bucket whose width / height is nearest to that of
    the source (absolute difference; of equal ones the first in order).

    `nabla` makes both sides multiples of 128, which NABLA attention needs. True: buckets are made in steps of 128,
    fixed and own sizes are rounded down to 128 (at least 128), and the source covers the size and is cropped, so its
    aspect stays. "stretch": the ordinary bucket is rounded up to 128, as other trainers do, which changes the
    aspect (see `plan_source`).

    Raises:
        ValueError: a side of the source is below 1.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"A source of {width} x {height} pixels has no bucket.")
    step = NABLA_STEP if nabla is True else SIZE_STEP
    bucket = _plain_bucket((width, height), entry, step)
    return Bucket(_up(bucket.width), _up(bucket.height)) if nabla == "stretch" else bucket


def _plain_bucket(size: tuple[int, int], entry: DatasetEntry, step: int) -> Bucket:
    area = entry.resolution[0] * entry.resolution[1]
    if not entry.enable_bucket:
        return _fitting(entry.resolution, step)
    if entry.bucket_no_upscale and size[0] * size[1] <= area:
        return _fitting(size, step)
    aspect = size[0] / size[1]
    buckets = bucket_list(entry.resolution, step)
    return min(buckets, key=lambda bucket: abs(bucket.width / bucket.height - aspect))


def plan_source(size: tuple[int, int], entry: DatasetEntry, *, nabla: Nabla = False) -> tuple[Bucket, ResizePlan]:
    """The bucket of a source of `size` and how to get there; with "stretch" the two steps of other trainers.

    "stretch" covers and crops to the ordinary bucket first; the result is then to be stretched to the bucket returned.
    """
    bucket = choose_bucket(size, entry, nabla=nabla)
    target = choose_bucket(size, entry) if nabla == "stretch" else bucket
    return bucket, resize_plan(size, target)


def resize_plan(source: tuple[int, int], bucket: Bucket) -> ResizePlan:
    """Cover the bucket (the larger of the two ratios, sides rounded to the nearest) and crop the centre.

    Raises:
        ValueError: a side of the source is below 1.
    """
    width, height = source
    if width < 1 or height < 1:
        raise ValueError(f"A source of {width} x {height} pixels cannot be scaled.")
    scale = max(bucket.width / width, bucket.height / height)
    # Rounding may not leave a side one pixel short.
    scaled = (max(round(width * scale), bucket.width), max(round(height * scale), bucket.height))
    left, top = (scaled[0] - bucket.width) // 2, (scaled[1] - bucket.height) // 2
    return ResizePlan(scaled, (left, top, left + bucket.width, top + bucket.height))


def _down(value: int, step: int) -> int:
    return value // step * step


def _up(value: int) -> int:
    return -(-value // NABLA_STEP) * NABLA_STEP


def _fitting(size: tuple[int, int], step: int) -> Bucket:
    return Bucket(max(_down(size[0], step), step), max(_down(size[1], step), step))
