"""Distributions of the noise levels against closed forms written here with NumPy and the error function."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from backend.config.train import TrainOptions
from backend.errors import UserError
from backend.progress import Reporter
from backend.training.show_timesteps import FILE_NAME, histogram, show_timesteps
from backend.training.timesteps import SMALLEST_WEIGHTED_SIGMA, TimestepDistribution, draw_sigmas, loss_weights

DRAWS = 20_000
# The two-sided Kolmogorov-Smirnov bound that a true distribution passes in all but one of 10,000 seeds.
KS_BOUND = 2.23 / math.sqrt(DRAWS)
MODES = ("uniform", "sigmoid", "shift", "logsnr", "logit_normal", "mode")
SETTINGS = {
    "discrete_flow_shift": 3.0,
    "sigmoid_scale": 1.4,
    "logit_mean": -0.7,
    "logit_std": 1.6,
    "mode_scale": 1.29,
}


def _options(mode: str, **keys: object) -> TrainOptions:
    return TrainOptions.model_validate({"timestep_sampling": mode, **SETTINGS, **keys})


def _plain_draws(mode: str, count: int) -> numpy.ndarray:
    """What the formulas of the options say, from NumPy's random numbers, without quantiles."""
    random = numpy.random.default_rng(11)
    normal, uniform = random.standard_normal(count), random.random(count)

    def logistic(values: numpy.ndarray) -> numpy.ndarray:
        return 1 / (1 + numpy.exp(-values))

    if mode == "uniform":
        return uniform
    if mode == "sigmoid":
        return logistic(1.4 * normal)
    if mode == "shift":
        plain = logistic(1.4 * normal)
        return 3 * plain / (1 + 2 * plain)
    if mode == "logsnr":
        return logistic(-(-0.7 + 1.6 * normal) / 2)
    if mode == "logit_normal":
        return logistic(-0.7 + 1.6 * normal)
    return 1 - uniform - 1.29 * (numpy.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)


def _normal_share(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def _logit(value: float) -> float:
    return math.log(value / (1 - value))


CLOSED: dict[str, Callable[[float], float]] = {
    "uniform": lambda t: t,
    "sigmoid": lambda t: _normal_share(_logit(t) / 1.4),
    "shift": lambda t: _normal_share(_logit(t / (3 - 2 * t)) / 1.4),
    "logsnr": lambda t: 1 - _normal_share((-2 * _logit(t) + 0.7) / 1.6),
    "logit_normal": lambda t: _normal_share((_logit(t) + 0.7) / 1.6),
}


def _distance(found: numpy.ndarray, expected: numpy.ndarray) -> float:
    """Largest difference of the empirical distribution functions."""
    places = numpy.sort(numpy.concatenate([found, expected]))
    return float(
        numpy.abs(
            numpy.searchsorted(numpy.sort(found), places, side="right") / len(found)
            - numpy.searchsorted(numpy.sort(expected), places, side="right") / len(expected)
        ).max()
    )


@pytest.mark.parametrize("mode", MODES)
def test_draws_follow_the_formula(mode: str) -> None:
    found = draw_sigmas(_options(mode), DRAWS, 5, 0, 0).numpy()
    assert found.dtype == numpy.float32
    assert 0 <= found.min() < found.max() <= 1
    # Two samples: the bound is wider by sqrt(1 + n / m).
    assert _distance(found, _plain_draws(mode, 10 * DRAWS)) < KS_BOUND * math.sqrt(1.1)


@pytest.mark.parametrize("mode", sorted(CLOSED))
def test_draws_follow_the_closed_distribution_function(mode: str) -> None:
    found = numpy.sort(draw_sigmas(_options(mode), DRAWS, 6, 0, 0).double().numpy())
    expected = numpy.array([CLOSED[mode](min(max(t, 1e-12), 1 - 1e-12)) for t in found.tolist()])
    steps = numpy.arange(DRAWS + 1) / DRAWS
    assert max(numpy.abs(expected - steps[1:]).max(), numpy.abs(expected - steps[:-1]).max()) < KS_BOUND
    # The function of the code itself, at ten places.
    distribution = TimestepDistribution.from_options(_options(mode))
    places = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    closed = [CLOSED[mode](t) for t in places.tolist()]
    torch.testing.assert_close(distribution.cumulative(places).tolist(), closed, rtol=1e-10, atol=1e-12)


def test_a_larger_shift_trains_more_noise() -> None:
    """Orientation: sigma 1 is noise."""
    means = [float(draw_sigmas(_options("shift", discrete_flow_shift=s), 4000, 0, 0, 0).mean()) for s in (1, 5, 10)]
    assert means == sorted(means)
    assert abs(means[0] - 0.5) < 0.02
    assert means[1] > 0.75
    # A high logarithm of the signal-to-noise ratio is a low sigma.
    assert float(draw_sigmas(_options("logsnr", logit_mean=6.0), 4000, 0, 0, 0).mean()) < 0.1


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_rises_and_is_inverted_numerically(scale: float) -> None:
    distribution = TimestepDistribution("mode", mode_scale=scale)
    shares = torch.linspace(0, 1, 2001, dtype=torch.float64)
    sigmas = distribution.quantile(shares)
    assert bool((sigmas.diff() > 0).all())
    torch.testing.assert_close(sigmas[[0, 1000, -1]].tolist(), [0.0, 0.5, 1.0], atol=1e-9, rtol=0)
    torch.testing.assert_close(distribution.quantile(distribution.cumulative(sigmas)), sigmas, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_limits_squeeze(mode: str) -> None:
    whole = draw_sigmas(_options(mode), 500, 1, 2, 3).double()
    squeezed = draw_sigmas(_options(mode, min_timestep=100, max_timestep=600), 500, 1, 2, 3).double()
    torch.testing.assert_close(squeezed, 0.1 + 0.5 * whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_limits_that_keep_the_shape_equal_drawing_again(mode: str) -> None:
    options = _options(mode, min_timestep=250, max_timestep=700, preserve_distribution_shape=True)
    found = draw_sigmas(options, DRAWS, 9, 0, 0).numpy()
    assert 0.25 <= found.min() < found.max() <= 0.7
    plain = _plain_draws(mode, 20 * DRAWS)
    kept = plain[(plain >= 0.25) & (plain <= 0.7)]
    assert len(kept) > DRAWS
    assert _distance(found, kept) < KS_BOUND * math.sqrt(1 + DRAWS / len(kept))


def test_limits_without_any_draws_are_refused() -> None:
    options = _options("logit_normal", logit_mean=20.0, max_timestep=300, preserve_distribution_shape=True)
    with pytest.raises(UserError, match="next to nothing between 0 and 300") as caught:
        draw_sigmas(options, 1, 0, 0, 0)
    assert caught.value.field == "preserve_distribution_shape"
    with pytest.raises(UserError, match="must be above --min_timestep, which is 500"):
        draw_sigmas(_options("uniform", min_timestep=500, max_timestep=500), 1, 0, 0, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limits", [{}, {"min_timestep": 200, "preserve_distribution_shape": True}])
def test_strata_take_every_share_once(mode: str, limits: dict[str, object]) -> None:
    """Samples that come in batches of uneven sizes; each run of 8 has one in every eighth of the distribution."""
    options = _options(mode, num_timestep_buckets=8, **limits)
    distribution = TimestepDistribution.from_options(options)
    sizes, first, strata = (3, 3, 1, 4, 5, 8, 2, 6), 0, []
    for b, size in enumerate(sizes):
        sigmas = draw_sigmas(options, size, 4, 7, b, first)
        strata += (distribution.cumulative(sigmas) * 8).clamp(max=7.999).int().tolist()
        first += size
    runs = [strata[start : start + 8] for start in range(0, len(strata), 8)]
    assert len(runs) == 4
    assert all(sorted(run) == list(range(8)) for run in runs)
    assert len({tuple(run) for run in runs}) > 1, "shuffled anew for each run"
    other = draw_sigmas(options, 8, 4, 8, 0, 0)
    assert (distribution.cumulative(other) * 8).int().tolist() != runs[0], "and for each epoch"


def test_draws_depend_on_position_alone() -> None:
    options = _options("shift")
    state = torch.get_rng_state()
    one = draw_sigmas(options, 4, 1, 2, 3)
    torch.testing.assert_close(one, draw_sigmas(options, 4, 1, 2, 3), rtol=0, atol=0)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(one, draw_sigmas(options, 4, *other))
    assert torch.equal(state, torch.get_rng_state())


def test_weights() -> None:
    sigmas = torch.tensor([0.0, 0.001, 0.1, 0.5, 1.0])
    assert loss_weights(sigmas, "none").tolist() == [1] * 5
    largest = SMALLEST_WEIGHTED_SIGMA**-2
    torch.testing.assert_close(loss_weights(sigmas, "sigma_sqrt"), torch.tensor([largest, largest, 100, 4, 1]))
    expected = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in sigmas.tolist()]
    torch.testing.assert_close(loss_weights(sigmas, "cosmap"), torch.tensor(expected))


class _Journal:
    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, object]]] = []

    def emit(self, name: str, **fields: object) -> None:
        self.records.append((name, fields))


def test_the_console_shows_shares_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _options("uniform", max_timestep=500, weighting_scheme="sigma_sqrt", show_timesteps="console")
    show_timesteps(options, Reporter(_Journal()), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22
    assert "uniform; squeezed into 0 to 500; weighting sigma_sqrt" in lines[0]
    # Half of the bands are empty, the others hold a tenth each; the weight at 475 is 0.475^-2 = 4.43.
    words = [line.split() for line in lines[2:]]
    assert all(abs(float(row[1].rstrip("%")) - 10) < 0.6 for row in words[:10])
    assert all(row[1:] == ["0.00%", "-"] for row in words[10:])
    assert abs(float(words[9][2]) - 4.44) < 0.05
    assert len(words[9][3]) > 40


def test_the_picture_shows_the_histogram(tmp_path: Path) -> None:
    options = _options("uniform", max_timestep=500, show_timesteps="image")
    journal = _Journal()
    show_timesteps(options, Reporter(journal, tmp_path), tmp_path)
    image = Image.open(tmp_path / FILE_NAME).convert("RGB")
    blue = [
        sum(image.getpixel((x, y)) == (98, 130, 190) for x in range(left, left + 400, 7) for y in range(120, 490, 7))
        for left in (75, 510)
    ]
    assert blue[0] > 2000
    assert blue[1] == 0
    assert journal.records == [("sample", {"path": FILE_NAME, "kind": "image"})]
    assert abs(float(histogram(options, 100).shares.sum()) - 1) < 1e-9


def test_the_picture_needs_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reporter = Reporter(_Journal())
    show_timesteps(_options("shift", show_timesteps="image"), reporter, None)
    show_timesteps(_options("shift", show_timesteps="image", output_dir="out"), reporter, None)
    assert (tmp_path / FILE_NAME).is_file()
    assert (tmp_path / "out" / FILE_NAME).is_file()
