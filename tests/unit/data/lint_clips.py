"""Clips with one fault each, and clips that look faulty and are not, for the tests of the dataset check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from tests.unit.data.clips import Pixels, write_clip

SIZE = (160, 96)
FRAMES = 49
Draw = Callable[[int], Pixels]


@cache
def scene(seed: int, size: tuple[int, int] = SIZE) -> Pixels:
    """A picture with large soft forms and fine detail, as photographs have; another one for each seed; read only."""
    rng = numpy.random.default_rng(seed)
    picture = numpy.zeros((size[1], size[0], 3), numpy.float32)
    for fields, weight in ((3, 0.6), (9, 0.3), (30, 0.1)):
        grid = rng.integers(0, 256, (fields, 2 * fields, 3)).astype(numpy.uint8)
        picture += weight * numpy.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))
    result = numpy.clip(picture, 0, 255).astype(numpy.uint8)
    result.setflags(write=False)
    return result


def panned(seed: int, speed: Callable[[int], float]) -> Draw:
    """A camera that moves over a wide scene; `speed(n)` is how far it got at frame n, in pixels."""
    wide = scene(seed, (SIZE[0] * 8, SIZE[1]))

    def draw(number: int) -> Pixels:
        left = int(speed(number)) % (wide.shape[1] - SIZE[0])
        return wide[:, left : left + SIZE[0]]

    return draw


def with_ball(seed: int, noise: float = 2.0) -> Draw:
    """A fixed camera: a scene that stands still, a ball that crosses it, and the noise of a sensor."""
    ground, rng = scene(seed), numpy.random.default_rng(seed)
    y, x = numpy.mgrid[: SIZE[1], : SIZE[0]]

    def draw(number: int) -> Pixels:
        picture = ground + rng.normal(0, noise, ground.shape)
        picture[(x - 20 - 2.4 * number) ** 2 + (y - 48) ** 2 < 15**2] = (230, 60, 40)
        return numpy.clip(picture, 0, 255).astype(numpy.uint8)

    return draw


def slow(seed: int) -> Draw:
    """What most clips are: a slow pan."""
    return panned(seed, lambda number: 1.5 * number)


def scaled_light(draw: Draw, light: Callable[[int], float]) -> Draw:
    """Frames multiplied by `light(n)`."""
    return lambda number: numpy.clip(draw(number) * light(number), 0, 255).astype(numpy.uint8)


def joined(first: Draw, second: Draw, share: Callable[[int], float]) -> Draw:
    """`share(n)` of the second clip over the first."""
    return lambda number: (first(number) * (1 - share(number)) + second(number) * share(number)).astype(numpy.uint8)


def barred(draw: Draw, left: int = 0, top: int = 0) -> Draw:
    """Black bars of this width on two sides."""

    def framed(number: int) -> Pixels:
        picture = numpy.array(draw(number))
        if top:
            picture[:top], picture[-top:] = 0, 0
        if left:
            picture[:, :left], picture[:, -left:] = 0, 0
        return picture

    return framed


def zoomed(seed: int) -> Draw:
    """A very slow zoom: a tenth of a percent a frame."""
    ground = Image.fromarray(scene(seed, (SIZE[0] * 3, SIZE[1] * 3)))

    def draw(number: int) -> Pixels:
        margin = 30 + 0.35 * number
        box = (margin, margin * 0.6, ground.width - margin, ground.height - margin * 0.6)
        return numpy.asarray(ground.resize(SIZE, Image.Resampling.BICUBIC, box=box))

    return draw


def square_on_black(number: int) -> Pixels:
    """A bright square that moves to the right over black ground: dark rows, but no bars."""
    picture = numpy.zeros((SIZE[1], SIZE[0], 3), numpy.uint8)
    picture[30:66, 10 + 2 * number : 46 + 2 * number] = (220, 200, 60)
    return picture


def green_on_grey(number: int) -> Pixels:
    """A square that moves and differs from its ground in colour only."""
    picture = numpy.full((SIZE[1], SIZE[0], 3), 128, numpy.uint8)
    picture[30:66, 10 + number : 46 + number] = (40, 180, 92)
    return picture


@dataclass(frozen=True)
class Case:
    """A clip, and the kinds of findings that it must give, no more and no less."""

    draw: Draw
    expected: frozenset[str] = frozenset()
    frames: int = FRAMES
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Encode the clip."""
        return write_clip(path, self.frames, SIZE, draw=self.draw, **{"rate": 24, **self.options})


def _case(draw: Draw, *expected: str, frames: int = FRAMES, **options: Any) -> Case:
    return Case(draw, frozenset(expected), frames, options)


def _uneven_times() -> list[int]:
    """Milliseconds of frames that are shown for 20 and 80 ms in turns of six."""
    times = [0]
    for number in range(1, FRAMES):
        times.append(times[-1] + (20 if number // 6 % 2 else 80))
    return times


BAD: dict[str, Any] = {"options": {"crf": "34"}}
CASES: dict[str, Case] = {
    "pan": _case(slow(1)),
    "fixed camera": _case(with_ball(2)),
    "fixed camera, badly compressed": _case(with_ball(3), **BAD),
    "fast pan": _case(panned(4, lambda number: 14.0 * number)),
    "whip pan": _case(panned(5, lambda number: number if number < 24 else 24 + 16 * (number - 24))),
    "slow zoom": _case(zoomed(6)),
    "fade to dim": _case(scaled_light(slow(7), lambda number: max(0.2, 1 - number / 40))),
    "dissolve": _case(joined(slow(8), slow(9), lambda number: min(1.0, max(0.0, (number - 14) / 20)))),
    "strobe": _case(scaled_light(with_ball(10), lambda number: 1.0 if number // 3 % 2 else 0.45)),
    "one flash": _case(joined(slow(11), lambda _: numpy.full((96, 160, 3), 250), lambda n: 0.9 * (n in (20, 21)))),
    "light switched on": _case(scaled_light(with_ball(12), lambda number: 0.35 if number < 25 else 1.0)),
    "night": _case(scaled_light(with_ball(13, 0), lambda _: 0.16)),
    "square on black": _case(square_on_black),
    "cut": _case(joined(slow(14), slow(15), lambda number: float(number >= 20)), "hard_cut"),
    "cut, badly compressed": _case(joined(slow(16), slow(17), lambda n: float(n >= 30)), "hard_cut", **BAD),
    "cut in fast motion": _case(
        joined(panned(18, lambda n: 8.0 * n), panned(19, lambda n: 8.0 * n), lambda n: float(n >= 25)), "hard_cut"
    ),
    "frozen half": _case(lambda number: slow(20)(min(number, 24)), "frozen"),
    "frozen half, badly compressed": _case(lambda number: slow(21)(min(number, 24)), "frozen", **BAD),
    "a still as a clip": _case(lambda _: scene(22), "frozen"),
    "drawn on threes": _case(lambda number: panned(23, lambda n: 4.0 * n)(number // 3)),
    "black opening": _case(scaled_light(slow(24), lambda number: float(number >= 10)), "black", "hard_cut"),
    "black": _case(lambda _: numpy.zeros((96, 160, 3), numpy.uint8), "black"),
    "letterbox": _case(barred(slow(25), top=12), "letterbox"),
    "letterbox, badly compressed": _case(barred(with_ball(26), top=9), "letterbox", **BAD),
    "pillarbox": _case(barred(slow(27), left=20), "letterbox"),
    "window box": _case(barred(slow(28), left=16, top=10), "letterbox"),
    "15 a second": _case(slow(29), "odd_fps", rate=15),
    "30 a second": _case(slow(30), "odd_fps", rate=30),
    "60 a second": _case(slow(31), "odd_fps", rate=60),
    "23.976 a second": _case(slow(32), rate=Fraction(24000, 1001)),
    "uneven": _case(slow(33), "variable_rate", pts=_uneven_times(), unit=Fraction(1, 1000)),
    "one brightness": _case(green_on_grey),
    "too short": _case(slow(34), "too_short", frames=20),
}
