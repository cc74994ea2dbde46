"""Shows which noise levels would be trained how often, and with which weight, without loading anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from backend.files import atomic_path
from backend.progress import Reporter
from backend.training.timesteps import MODEL_TIME, draw_sigmas, loss_weights

if TYPE_CHECKING:
    from backend.config.train import TrainOptions

FILE_NAME = "timesteps.png"
_DRAWS = 100_000
_CONSOLE_BANDS, _IMAGE_BANDS = 20, 100
_BAR_LETTERS = 50
_WIDTH, _HEIGHT = 1000, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 70, 70, 60
_INK, _BARS, _WEIGHT = (32, 33, 36), (98, 130, 190), (196, 84, 40)


class Histogram(NamedTuple):
    """Equal bands of time 0..1000: the share of the draws in each (sum 1), and the mean weight there (0: no draws)."""

    shares: Tensor
    weights: Tensor


def show_timesteps(options: TrainOptions, reporter: Reporter, run_dir: Path | None) -> None:
    """Draw as training does and show it, as `--show_timesteps` says: bars on the terminal, or a PNG.

    The picture goes to the run folder, else to `--output_dir`, else to the working directory.

    Raises:
        UserError: the options of the timesteps contradict each other, or the picture cannot be written.
    """
    if options.show_timesteps == "console":
        for line in text_bars(histogram(options, _CONSOLE_BANDS), options):
            reporter.say(line)
        return
    folder = run_dir if run_dir is not None else Path(options.output_dir or ".")
    with atomic_path(folder / FILE_NAME) as temporary:
        picture(histogram(options, _IMAGE_BANDS), options).save(temporary, "PNG")
    reporter.sample(folder / FILE_NAME, "image")


def histogram(options: TrainOptions, bands: int) -> Histogram:
    """Draw 100,000 samples with the functions and, where one is given, the seed of the training, as one epoch."""
    sigmas = draw_sigmas(options, _DRAWS, options.seed or 0, 0, 0)
    weights = loss_weights(sigmas, options.weighting_scheme).double()
    places = (sigmas.double() * bands).long().clamp(0, bands - 1)
    counts = torch.bincount(places, minlength=bands).double()
    sums = torch.zeros(bands, dtype=torch.float64).index_add_(0, places, weights)
    return Histogram(counts / _DRAWS, sums / counts.clamp(min=1))


def describe(options: TrainOptions) -> str:
    """The settings behind a histogram, in one line."""
    details = {
        "sigmoid": f", scale {options.sigmoid_scale:g}",
        "shift": f" {options.discrete_flow_shift:g}, scale {options.sigmoid_scale:g}",
        "logsnr": f", mean {options.logit_mean:g}, deviation {options.logit_std:g}",
        "logit_normal": f", mean {options.logit_mean:g}, deviation {options.logit_std:g}",
        "mode": f", scale {options.mode_scale:g}",
    }
    parts = [options.timestep_sampling + details.get(options.timestep_sampling, "")]
    if options.min_timestep is not None or options.max_timestep is not None:
        highest = MODEL_TIME if options.max_timestep is None else options.max_timestep
        kept = "drawn again outside" if options.preserve_distribution_shape else "squeezed into"
        parts.append(f"{kept} {options.min_timestep or 0:g} to {highest:g}")
    if options.num_timestep_buckets is not None:
        parts.append(f"{options.num_timestep_buckets} strata")
    parts.append(f"weighting {options.weighting_scheme}")
    return "; ".join(parts)


def text_bars(found: Histogram, options: TrainOptions) -> list[str]:
    """One line for each band: its times, its share of the draws as a bar and a percentage, its mean weight."""
    step = MODEL_TIME / len(found.shares)
    tallest = float(found.shares.max())
    lines = [f"Times of training (0 clean, 1000 noise): {describe(options)}", " time       share  weight"]
    for band, (share, weight) in enumerate(zip(found.shares.tolist(), found.weights.tolist(), strict=True)):
        bar = "#" * round(_BAR_LETTERS * share / tallest)
        shown = f"{weight:7.3g}" if share else "      -"
        lines.append(f"{band * step:4.0f}-{(band + 1) * step:<4.0f} {share:6.2%} {shown}  {bar}".rstrip())
    return lines


def picture(found: Histogram, options: TrainOptions) -> Image.Image:
    """Bars for the shares; a line for the weights, on a scale of its own at the right."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    title, small = ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((_LEFT, 14), f"Times of training: {describe(options)}", _INK, font=title)
    draw.text((_LEFT, 42), "bars: share of the draws (left)", _BARS, font=small)
    draw.text((_WIDTH - _RIGHT, 42), "line: weight of the loss (right)", _WEIGHT, font=small, anchor="ra")
    bands = len(found.shares)
    across, up = (_WIDTH - _LEFT - _RIGHT) / bands, _HEIGHT - _TOP - _BOTTOM
    floor = _HEIGHT - _BOTTOM
    tallest, heaviest = float(found.shares.max()), float(found.weights.max())
    for band, share in enumerate(found.shares.tolist()):
        left = _LEFT + band * across
        draw.rectangle((left, floor - up * share / tallest, left + across - 1, floor), fill=_BARS)
    points = [
        (_LEFT + (band + 0.5) * across, floor - 0.9 * up * weight / heaviest)
        for band, weight in enumerate(found.weights.tolist())
        if weight
    ]
    if len(points) > 1:
        draw.line(points, fill=_WEIGHT, width=3)
    draw.line((_LEFT, floor, _WIDTH - _RIGHT, floor), fill=_INK, width=2)
    for tick in range(0, 1001, 100):
        draw.text((_LEFT + bands * across * tick / 1000, floor + 8), str(tick), _INK, font=small, anchor="ma")
    draw.text((_WIDTH / 2, _HEIGHT - 26), "time (0 clean, 1000 noise)", _INK, font=small, anchor="ma")
    for part in (0.5, 1.0):
        draw.text((_LEFT - 8, floor - up * part), f"{tallest * part:.2%}", _INK, font=small, anchor="rm")
        draw.text(
            (_WIDTH - _RIGHT + 8, floor - 0.9 * up * part), f"{heaviest * part:.3g}", _WEIGHT, font=small, anchor="lm"
        )
    return image
