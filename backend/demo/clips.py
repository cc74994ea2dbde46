"""Moving-shape clips: the world of the embedded demo model, drawn by signed distance functions.

Only torch and the standard library are used, so tests and datasets can draw clips without the engine.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Color = tuple[float, float, float]

COLORS: dict[str, Color] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "cyan": (50, 210, 220),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, Color] = {
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
    "navy": (20, 25, 80),
    "beige": (235, 220, 180),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink")
SIZES = ("small", "big")
# Never shown to the transformer (the VAE has seen them): what a LoRA can teach.
NEW_SHAPES = ("heart", "ring", "cross", "arrow")
NEW_COLORS: dict[str, Color] = {"lime": (170, 255, 60)}

CAPTION_STYLES = 4
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_VERBS = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "grow": "grows",
    "shrink": "shrinks",
}
_GERUNDS = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "grow": "growing",
    "shrink": "shrinking",
}
# Radius ranges as a fraction of the shorter side of the picture.
_RADII: dict[str | None, tuple[float, float]] = {"small": (0.175, 0.19), None: (0.23, 0.25), "big": (0.285, 0.305)}


@dataclass(frozen=True)
class ClipSpec:
    """What a clip shows, in words of COLORS, SHAPES (or NEW_SHAPES), MOTIONS, BACKGROUNDS; SIZES, or None: usual."""

    color: str
    shape: str
    motion: str
    background: str
    size: str | None = None


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in units of its radius, y pointing down."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return [(1.15 * math.sin(a), 0.2 - 1.15 * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    if shape == "star":
        radii = [1.15 if corner % 2 == 0 else 0.44 for corner in range(10)]
        return [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate(radii)]
    if shape == "cross":
        thin, wide = 0.3, 0.95
        quarter = [(thin, -wide), (thin, -thin), (wide, -thin)]
        corners: list[tuple[float, float]] = []
        for _ in range(4):
            corners += quarter
            quarter = [(-y, x) for x, y in quarter]
        return corners
    if shape == "arrow":
        return [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]
    if shape == "heart":
        turns = [2 * math.pi * k / 28 for k in range(28)]
        curve = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
        return [(16 * math.sin(t) ** 3 / 16.5, -(y + 2) / 15.5) for t, y in zip(turns, curve, strict=True)]
    raise KeyError(shape)


def _polygon_distance(x: torch.Tensor, y: torch.Tensor, corners: Sequence[tuple[float, float]]) -> torch.Tensor:
    """Signed distance to a closed polygon, negative inside: nearest edge, sign by counting crossings."""
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        if ey:
            crosses = ((y >= ay) != (y >= by)) & (wx < ex * wy / ey)
            inside = inside ^ crosses
    distance = squared.sqrt()
    return torch.where(inside, -distance, distance)


def shape_distance(
    shape: str, x: torch.Tensor, y: torch.Tensor, corners: Sequence[tuple[float, float]] | None = None
) -> torch.Tensor:
    """Signed distance to a shape centred at 0, in units of its radius, negative inside; `corners` replace its own."""
    if corners is None and shape == "circle":
        return (x * x + y * y).sqrt() - 0.95
    if corners is None and shape == "ring":
        return ((x * x + y * y).sqrt() - 0.74).abs() - 0.24
    return _polygon_distance(x, y, corners or _polygon(shape))


def coverage(
    shape: str,
    center_x: torch.Tensor,
    center_y: torch.Tensor,
    radius: torch.Tensor,
    height: int,
    width: int,
    *,
    angle: torch.Tensor | None = None,
    corners: Sequence[tuple[float, float]] | None = None,
) -> torch.Tensor:
    """How much of each pixel a shape covers: centers and radius [F] in pixels -> [F, height, width] in 0..1."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    scale = radius.view(-1, 1, 1)
    x = (columns - center_x.view(-1, 1, 1)) / scale
    y = (rows - center_y.view(-1, 1, 1)) / scale
    if angle is not None:
        cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        x, y = x * cosine + y * sine, -x * sine + y * cosine
    return (0.5 - shape_distance(shape, x, y, corners) * scale).clamp(0, 1)


def plain(color: Color, frames: int, height: int, width: int) -> torch.Tensor:
    """A clip of one colour (0..255) -> [3, frames, height, width] in -1..1."""
    return (torch.tensor(color) / 127.5 - 1).view(3, 1, 1, 1).expand(3, frames, height, width)


def paint(base: torch.Tensor, covered: torch.Tensor, color: Color) -> torch.Tensor:
    """Lay a colour (0..255) over a clip [3, F, H, W] in -1..1 where `covered` [F, H, W] says so."""
    ink = (torch.tensor(color) / 127.5 - 1).view(3, 1, 1, 1)
    return base * (1 - covered) + ink * covered


def track(
    motion: str, size: str | None, frames: int, height: int, width: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Path of a shape: centers x, y and radius, each [frames] in pixels.

    Low entropy on purpose: "moves left" always crosses the middle with a small jitter, so the caption nearly fixes the
    layout and a tiny transformer can learn it. The shape stays inside the picture.
    """
    start = rng.uniform(*_RADII[size])
    time = torch.linspace(0, 1, frames) if frames > 1 else torch.full((1,), 0.5)
    step_x, step_y = DIRECTIONS.get(motion, (0, 0))
    x = torch.full((frames,), 0.5 + rng.uniform(-0.03, 0.03) * (step_x == 0))
    y = torch.full((frames,), 0.5 + rng.uniform(-0.03, 0.03) * (step_y == 0))
    radius = torch.full((frames,), start)
    if motion in DIRECTIONS:
        # The tips of a star reach 1.15 radii.
        reach = min(0.23, 0.495 - 1.15 * start) - rng.uniform(0, 0.02)
        x = x + step_x * (2 * time - 1) * reach
        y = y + step_y * (2 * time - 1) * reach
    elif motion in ("grow", "shrink"):
        growth = 0.65 + 0.6 * (time if motion == "grow" else 1 - time)
        radius = start * growth
    else:
        raise KeyError(motion)
    return x * width, y * height, radius * min(height, width)


def draw(spec: ClipSpec, rng: random.Random, frames: int = 17, height: int = 64, width: int = 64) -> torch.Tensor:
    """Draw a clip of a spec -> [3, frames, height, width] in -1..1; colours and path vary a little with `rng`."""

    def jitter(color: Color, amount: float) -> Color:
        red, green, blue = (min(255.0, max(0.0, value + rng.uniform(-amount, amount))) for value in color)
        return red, green, blue

    x, y, radius = track(spec.motion, spec.size, frames, height, width, rng)
    ink = jitter({**COLORS, **NEW_COLORS}[spec.color], 8)
    base = plain(jitter(BACKGROUNDS[spec.background], 6), frames, height, width)
    return paint(base, coverage(spec.shape, x, y, radius, height, width), ink)


def random_spec(rng: random.Random) -> ClipSpec:
    """A random sentence of the grammar; half of the clips name no size."""
    return ClipSpec(
        color=rng.choice(list(COLORS)),
        shape=rng.choice(SHAPES),
        motion=rng.choice(MOTIONS),
        background=rng.choice(list(BACKGROUNDS)),
        size=rng.choice((None, None, *SIZES)),
    )


def caption(spec: ClipSpec, style: int = 0) -> str:
    """The caption of a spec in one of CAPTION_STYLES wordings."""
    noun = " ".join(word for word in (spec.size, spec.color, spec.shape) if word)
    article = "an" if noun[0] in "aeiou" else "a"
    if style == 0:
        return f"a {noun} {_VERBS[spec.motion]} on a {spec.background} background"
    if style == 1:
        return f"{article} {noun} {_GERUNDS[spec.motion]} on {spec.background} background"
    if style == 2:
        return f"{noun} {_GERUNDS[spec.motion]}, {spec.background} background"
    return f"A video of a {noun}. It {_VERBS[spec.motion]}. The background is {spec.background}."


def parse_caption(text: str) -> ClipSpec:
    """Read a caption of the grammar back into its spec. Raises ValueError when a word of the grammar is missing."""
    words = text.lower().replace(",", " ").replace(".", " ").split()

    def find(known: Sequence[str], what: str) -> str:
        found = [word for word in words if word in known]
        if not found:
            raise ValueError(f"The caption names no {what}: {text!r}")
        return found[0]

    before = [word for word in words if word in BACKGROUNDS]
    if not before:
        raise ValueError(f"The caption names no background: {text!r}")
    motions = {
        form: motion for motion in MOTIONS for form in (_VERBS[motion].split()[-1], _GERUNDS[motion].split()[-1])
    }
    return ClipSpec(
        color=find([*COLORS, *NEW_COLORS], "colour"),
        shape=find([*SHAPES, *NEW_SHAPES], "shape"),
        motion=motions[find(list(motions), "motion")],
        background=before[-1],
        size=next((word for word in words if word in SIZES), None),
    )


def balanced_specs(count: int, rng: random.Random) -> list[ClipSpec]:
    """`count` random specs; every colour, shape, motion and background comes up equally often (give or take one)."""

    def deck(values: Sequence[str]) -> list[str]:
        cards = [values[i % len(values)] for i in range(count)]
        rng.shuffle(cards)
        return cards

    columns = zip(deck(list(COLORS)), deck(SHAPES), deck(MOTIONS), deck(list(BACKGROUNDS)), strict=True)
    return [ClipSpec(*words, size=rng.choice((None, None, *SIZES))) for words in columns]


def to_uint8(clip: torch.Tensor) -> torch.Tensor:
    """A clip [3, F, H, W] in -1..1 -> [F, H, W, 3] uint8."""
    return ((clip.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
