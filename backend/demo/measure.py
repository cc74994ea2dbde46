"""Say what a clip shows: an objective measure that knows the grammar's words but not the model.

Colour and background are the nearest named colours of the foreground and of the border; motion is the shift of the
centre or the change of the area; the shape is the best fitting drawn template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from backend.demo.clips import BACKGROUNDS, COLORS, NEW_COLORS, SHAPES, ClipSpec, Color, coverage

_SIZES = (0.88, 0.94, 1.0, 1.06, 1.12)
_SHIFTS = (-1.5, 0.0, 1.5)


@dataclass(frozen=True)
class Measurement:
    """What was seen; None where nothing stands out from the background.

    dx, dy: shift of the centre in pixels between the first and the last frames; growth: ratio of the areas;
    overlaps: mean overlap (0..1) of the best template of each shape.
    """

    color: str | None
    background: str
    motion: str | None
    shape: str | None
    dx: float
    dy: float
    growth: float
    overlaps: Mapping[str, float]


def _nearest(color: torch.Tensor, table: Mapping[str, Color]) -> str:
    return min(table, key=lambda name: float((color - torch.tensor(table[name])).square().sum()))


def _as_frames(video: torch.Tensor | np.ndarray) -> torch.Tensor:
    """[F, H, W, 3] uint8 -> float [F, H, W, 3] in 0..255."""
    frames = torch.as_tensor(video)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"a video must be uint8 [frames, height, width, 3], not {frames.dtype} {tuple(frames.shape)}")
    return frames.float()


def _border_color(frames: torch.Tensor) -> torch.Tensor:
    edges = (frames[:, :2], frames[:, -2:], frames[:, :, :2], frames[:, :, -2:])
    return torch.cat([edge.reshape(-1, 3) for edge in edges]).median(0).values


def _motion(mask: torch.Tensor) -> tuple[str, float, float, float]:
    """Motion word, shift x and y in pixels, growth of the area, of a mask [F, H, W]."""
    frames, height, width = mask.shape
    ends = max(1, min(3, frames // 3))
    area = mask.flatten(1).sum(1).clamp_min(1e-6)
    x = (mask.sum(1) * (torch.arange(width) + 0.5)).sum(1) / area
    y = (mask.sum(2) * (torch.arange(height) + 0.5)).sum(1) / area
    dx = float(x[-ends:].mean() - x[:ends].mean())
    dy = float(y[-ends:].mean() - y[:ends].mean())
    growth = float(area[-ends:].mean() / area[:ends].mean())
    far = max(abs(dx) / width, abs(dy) / height)
    if far < 0.11 and (growth > 1.5 or growth < 0.67):
        return ("grow" if growth > 1 else "shrink"), dx, dy, growth
    if far < 0.06:
        return "still", dx, dy, growth
    if abs(dx) > abs(dy):
        return ("right" if dx > 0 else "left"), dx, dy, growth
    return ("down" if dy > 0 else "up"), dx, dy, growth


def _overlap(mask: torch.Tensor, shape: str) -> float:
    """Best soft overlap (sum of minima / sum of maxima) of a mask [H, W] with a shape's templates of about its area."""
    height, width = mask.shape
    area = mask.sum()
    x = float((mask.sum(0) * (torch.arange(width) + 0.5)).sum() / area)
    y = float((mask.sum(1) * (torch.arange(height) + 0.5)).sum() / area)
    probe = coverage(shape, torch.tensor([32.0]), torch.tensor([32.0]), torch.tensor([20.0]), 64, 64)[0]
    offset_x = float((probe.sum(0) * (torch.arange(64) + 0.5)).sum() / probe.sum() - 32) / 20
    offset_y = float((probe.sum(1) * (torch.arange(64) + 0.5)).sum() / probe.sum() - 32) / 20
    radius = 20 * float((area / probe.sum()).sqrt())
    grid = [(radius * size, dx, dy) for size in _SIZES for dx in _SHIFTS for dy in _SHIFTS]
    radii = torch.tensor([row[0] for row in grid])
    xs = torch.tensor([x + row[1] for row in grid]) - offset_x * radii
    ys = torch.tensor([y + row[2] for row in grid]) - offset_y * radii
    templates = coverage(shape, xs, ys, radii, height, width)
    common = torch.minimum(templates, mask).flatten(1).sum(1)
    return float((common / torch.maximum(templates, mask).flatten(1).sum(1)).max())


def measure(
    video: torch.Tensor | np.ndarray,
    shapes: Sequence[str] = SHAPES,
    colors: Mapping[str, Color] | None = None,
) -> Measurement:
    """Measure a clip, uint8 [F, H, W, 3]; `shapes` and `colors` are the words to choose from (None: all colours)."""
    frames = _as_frames(video)
    ground = _border_color(frames)
    contrast = (frames - ground).norm(dim=-1)
    strongest = float(contrast.flatten().topk(max(40, contrast.numel() // 100)).values.mean())
    background = _nearest(ground, BACKGROUNDS)
    if strongest < 40:
        return Measurement(None, background, None, None, 0.0, 0.0, 1.0, dict.fromkeys(shapes, 0.0))
    ink = frames[contrast > 0.8 * strongest].median(0).values
    # How far each pixel lies on the way from the background to the shape's colour: coverage by the shape.
    direction = ink - ground
    mask = (((frames - ground) @ direction) / direction.square().sum()).clamp(0, 1)
    mask = torch.where(mask < 0.25, torch.zeros_like(mask), mask)
    motion, dx, dy, growth = _motion(mask)
    count = frames.shape[0]
    chosen = sorted({round(count * part) for part in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)} & set(range(count)))
    seen = [index for index in chosen if float(mask[index].sum()) >= 12]
    overlaps = {shape: sum(_overlap(mask[index], shape) for index in seen) / max(1, len(seen)) for shape in shapes}
    return Measurement(
        color=_nearest(ink, {**COLORS, **NEW_COLORS} if colors is None else colors),
        background=background,
        motion=motion,
        shape=max(overlaps, key=lambda name: overlaps[name]) if seen else None,
        dx=dx,
        dy=dy,
        growth=growth,
        overlaps=overlaps,
    )


def scores(
    videos: Sequence[torch.Tensor | np.ndarray], specs: Sequence[ClipSpec]
) -> tuple[dict[str, float], list[Measurement]]:
    """Share of clips whose colour, shape, motion, background and all of them are right, and each clip's measurement."""
    seen = [measure(video) for video in videos]
    right = {
        word: [getattr(found, word) == getattr(spec, word) for found, spec in zip(seen, specs, strict=True)]
        for word in ("color", "shape", "motion", "background")
    }
    table = {word: sum(values) / len(values) for word, values in right.items()}
    table["all"] = sum(map(all, zip(*right.values(), strict=True))) / len(seen)
    return table, seen
