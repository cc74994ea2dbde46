"""Columns, thinning and smoothing of a training's curve: nothing that matters is lost, nothing lags, all is bounded."""

from __future__ import annotations

import time

import numpy
import pytest

from k5ui.training.series import NAMES, Columns, bucket_width, plain, reach, sigma_for, smooth, thin


def steps_and(values) -> tuple[numpy.ndarray, numpy.ndarray]:
    return numpy.arange(1, len(values) + 1, dtype=numpy.int64), numpy.asarray(values, numpy.float32)


def noise(count: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).normal(size=count).astype(numpy.float32)


@pytest.mark.parametrize("count", [1, 2, 1999, 2000, 2001, 54_321, 100_000])
def test_a_chart_gets_at_most_its_points_and_every_bucket_keeps_its_extremes(count: int) -> None:
    steps, loss = steps_and(noise(count))
    width = bucket_width(1, count, 2000)
    drawn = thin(steps, {"loss": loss}, width)
    assert len(drawn.steps) <= 2000
    assert (numpy.diff(drawn.steps) > 0).all()
    assert drawn.steps[0] == 1
    assert drawn.steps[-1] == count
    for bucket in {0, count // width // 2, count // width}:
        inside, shown = loss[steps // width == bucket], drawn.values["loss"][drawn.steps // width == bucket]
        if len(inside):
            assert (shown.min(), shown.max()) == (inside.min(), inside.max())


def test_a_single_spike_among_a_hundred_thousand_is_drawn_and_stays_in_order() -> None:
    values = numpy.zeros(100_000)
    values[70_001], values[70_002] = 9.0, -9.0  # up, then down: in one pixel column
    steps, loss = steps_and(values)
    drawn = thin(steps, {"loss": loss}, bucket_width(1, 100_000, 2000)).values["loss"]
    assert drawn.max() == 9
    assert drawn.argmax() + 1 == drawn.argmin()


def test_missing_values_are_no_extremes_and_an_empty_bucket_stays_empty() -> None:
    values = [1.0, numpy.nan, 3.0, 2.0, numpy.nan, numpy.nan, numpy.nan, numpy.nan]
    steps, loss = steps_and(values)
    drawn = thin(steps - 1, {"loss": loss}, 4)
    assert drawn.steps.tolist() == [0, 3, 4, 7]
    assert plain(drawn.values["loss"]) == [1.0, 3.0, None, None]


def test_old_points_stay_as_they_are_when_rows_are_added() -> None:
    steps, loss = steps_and(noise(5000))
    few, many = (thin(steps[:n], {"loss": loss[:n]}, 8) for n in (4000, 5000))
    kept = few.steps < 4000 // 8 * 8
    assert few.steps[kept].tolist() == many.steps[: kept.sum()].tolist()
    assert few.values["loss"][kept].tolist() == many.values["loss"][: kept.sum()].tolist()


def test_smoothing_has_no_lag_and_no_bias_at_the_ends() -> None:
    """An exponential mean shows a fall late and begins at its first value (complaints on TensorBoard's slider); a
    straight line has to come out as it went in, up to both ends."""
    steps, line = steps_and(2.0 - 0.001 * numpy.arange(1000))
    assert numpy.abs(smooth(steps, line, steps, 30.0) - line).max() < 1e-4
    _, fall = steps_and(numpy.where(numpy.arange(1000) < 500, 1.0, 0.0))
    curve = smooth(steps, fall, steps, 20.0)
    crossing = numpy.flatnonzero(curve < 0.5)[0]
    assert abs(crossing - 500) <= 1
    assert curve[400] == pytest.approx(1.0, abs=1e-3)


def test_smoothing_equals_the_formula_without_bins() -> None:
    """Against a plain weighted least-squares fit of every x: bins of a sixteenth of sigma change less than 1/1000."""
    steps, values = steps_and(numpy.exp(-numpy.arange(800) / 200) + 0.1 * noise(800))
    sigma = 24.0
    for at in (1, 17, 400, 800):
        near = numpy.abs(steps - at) <= reach(sigma)
        x, y = steps[near] - at, values[near].astype(float)
        weight = numpy.sqrt(numpy.exp(-0.5 * (x / sigma) ** 2))
        design = numpy.stack([numpy.ones(len(x)), x], 1)
        wanted = numpy.linalg.lstsq(design * weight[:, None], y * weight, rcond=None)[0][0]
        assert smooth(steps, values, numpy.array([at]), sigma)[0] == pytest.approx(wanted, abs=1e-3)


def test_smoothing_reduces_noise_and_survives_gaps() -> None:
    steps, values = steps_and(1.0 + 0.5 * noise(4000))
    values[1000:1100] = numpy.nan
    curve = smooth(steps, values, steps, 64.0)
    assert numpy.isfinite(curve).all()
    assert numpy.abs(curve[200:-200] - 1.0).max() < 0.2
    values[:] = numpy.nan
    assert numpy.isnan(smooth(steps, values, steps, 64.0)).all()


def test_the_width_of_smoothing_moves_in_few_jumps() -> None:
    widths = {sigma_for(steps, 0.01) for steps in range(1000, 2000)}
    assert len(widths) <= 5
    assert sigma_for(100_000, 0.01) == pytest.approx(1000, rel=0.2)
    assert sigma_for(3, 0.01) == 1


def test_a_later_attempt_in_the_same_run_replaces_what_it_does_again() -> None:
    """The curve must not draw over itself after a resume: ostris/ai-toolkit#671."""
    columns = Columns()
    for step in range(1, 11):
        columns.append(step, {"loss": 1.0})
    before = columns.generation
    for step in range(6, 9):
        columns.append(step, {"loss": 2.0})
    assert columns.steps.tolist() == list(range(1, 9))
    assert columns.column("loss").tolist() == [1.0] * 5 + [2.0] * 3
    assert columns.generation != before


def test_memory_of_a_run_is_bounded_and_the_curve_stays() -> None:
    columns = Columns(max_rows=1000)
    for step in range(1, 10_001):
        columns.append(step, {"loss": float(step), "lr": None if step % 2 else 3.0})
    assert columns.rows <= 1000
    assert columns.steps[-1] == 10_000
    assert columns._values.nbytes <= 1024 * len(NAMES) * 4
    assert numpy.abs(columns.column("loss") - columns.steps).max() <= 16
    assert numpy.nanmax(columns.column("lr")) == numpy.nanmin(columns.column("lr")) == 3.0


def test_numbers_for_the_page_are_short_and_none_is_not_finite() -> None:
    values = numpy.array([0.123456789, 1.5e-4, 0.0, numpy.nan, numpy.inf, -1234567.0])
    assert plain(values) == [0.123457, 1.5e-4, 0.0, None, None, -1234570.0]


def test_a_hundred_thousand_rows_are_thinned_and_smoothed_quickly() -> None:
    steps, loss = steps_and(noise(100_000))
    began = time.process_time()
    drawn = thin(steps, dict.fromkeys(NAMES, loss), bucket_width(1, 100_000, 2000))
    smooth(steps, loss, drawn.steps, sigma_for(100_000, 0.02))
    assert time.process_time() - began < 0.5  # about 0.03 s here
