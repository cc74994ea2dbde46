"""Varied clips for the VAE only: any colours, more shapes, several objects; so it can show what a LoRA brings."""

import math
import random

import torch

from backend.demo.clips import MOTIONS, NEW_SHAPES, SHAPES, Color, coverage, draw, paint, plain, random_spec, track


def _any_color(rng: random.Random) -> Color:
    return rng.uniform(0, 255), rng.uniform(0, 255), rng.uniform(0, 255)


def _gradient(rng: random.Random, frames: int, height: int, width: int) -> torch.Tensor:
    """A smooth or striped two-colour background -> [3, frames, height, width]."""
    first = plain(_any_color(rng), frames, height, width)
    second = plain(_any_color(rng), frames, height, width)
    angle = rng.uniform(0, 2 * math.pi)
    rows, columns = torch.meshgrid(torch.linspace(-0.5, 0.5, height), torch.linspace(-0.5, 0.5, width), indexing="ij")
    ramp = columns * math.cos(angle) + rows * math.sin(angle) + 0.5
    if rng.random() < 0.3:
        ramp = 0.5 + 0.5 * torch.sin(ramp * rng.uniform(6, 30))
    ramp = ramp.clamp(0, 1)
    return first * (1 - ramp) + second * ramp


def _blob(rng: random.Random) -> list[tuple[float, float]]:
    count, start = rng.randint(3, 9), rng.uniform(0, 2 * math.pi)
    radii = [rng.uniform(0.4, 1.1) for _ in range(count)]
    angles = [start + 2 * math.pi * k / count for k in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _crowd(rng: random.Random, frames: int, height: int, width: int) -> torch.Tensor:
    """Up to three shapes, turning and drifting over a plain or graded background."""
    graded = rng.random() < 0.5
    clip = _gradient(rng, frames, height, width) if graded else plain(_any_color(rng), frames, height, width)
    time = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    side = min(height, width)
    for _ in range(rng.choice((1, 1, 2, 3))):
        corners = _blob(rng) if rng.random() < 0.2 else None
        x = (rng.uniform(0.1, 0.9) + rng.uniform(-0.6, 0.6) * time) * width
        y = (rng.uniform(0.1, 0.9) + rng.uniform(-0.6, 0.6) * time) * height
        radius = rng.uniform(0.1, 0.32) * side * (1 + rng.uniform(-0.3, 0.4) * time)
        angle = rng.uniform(0, 2 * math.pi) + rng.uniform(-2, 2) * time if rng.random() < 0.5 else None
        covered = coverage(
            rng.choice((*SHAPES, *NEW_SHAPES)), x, y, radius, height, width, angle=angle, corners=corners
        )
        clip = paint(clip, covered, _any_color(rng))
    return clip


def scene(rng: random.Random, frames: int, height: int, width: int) -> torch.Tensor:
    """A random clip [3, frames, height, width] in -1..1: most of the grammar, some with free colours, some crowded."""
    kind = rng.random()
    if kind < 0.6:
        return draw(random_spec(rng), rng, frames, height, width)
    if kind < 0.88:
        x, y, radius = track(rng.choice(MOTIONS), rng.choice((None, "small", "big")), frames, height, width, rng)
        covered = coverage(rng.choice((*SHAPES, *NEW_SHAPES)), x, y, radius, height, width)
        return paint(plain(_any_color(rng), frames, height, width), covered, _any_color(rng))
    return _crowd(rng, frames, height, width)
