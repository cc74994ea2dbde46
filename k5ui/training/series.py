"""Numbers of a training by step, kept in columns of bounded size, thinned and smoothed for drawing. Pure arithmetic.

`Columns` holds one row for each optimizer step. `thin` reduces rows to what a chart of so many points can show and
keeps the smallest and the largest value of every pixel column; `smooth` is a curve without lag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

BANDS = 5
#: What a row holds besides its step; `memory` in bytes, bands of noise from the clean end.
NAMES = ("loss", "lr", "grad_norm", "memory", *(f"band{index}" for index in range(BANDS)))
#: About 9 MB a run; of a longer one, 2, 4, 8 .. steps become one row.
MAX_ROWS = 200_000
_FIRST_CAPACITY = 1024
_BINS_PER_SIGMA = 16
_REACH = 4.0
_TURNS = 4
_DIGITS = 6

Array = NDArray[numpy.float64]


class Columns:
    """Rows that grow by step. A step that is not behind the last one replaces everything from there on: a run that
    went on from an earlier state draws over what it had done before.

    `generation` changes whenever rows that were there before are not what they were.
    """

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._span = 1
        self._steps = numpy.zeros(_FIRST_CAPACITY, numpy.int64)
        self._values = numpy.zeros((_FIRST_CAPACITY, len(NAMES)), numpy.float32)
        self.rows = 0
        self.generation = 0

    @property
    def steps(self) -> NDArray[numpy.int64]:
        """The steps of all rows, growing; valid until the next change."""
        return self._steps[: self.rows]

    def column(self, name: str) -> NDArray[numpy.float32]:
        """One column of all rows, NaN where a step has no such value."""
        return self._values[: self.rows, NAMES.index(name)]

    def append(self, step: int, values: dict[str, float | None]) -> None:
        """Add the row of a step; missing values are NaN."""
        if self.rows and step <= self._steps[self.rows - 1]:
            self.rows = int(numpy.searchsorted(self.steps, step))
            self.generation += 1
        if self.rows >= self._max_rows:
            self._halve()
        if self.rows == len(self._steps):
            more = min(len(self._steps) * 2, self._max_rows)
            self._steps = numpy.resize(self._steps, more)
            self._values = numpy.resize(self._values, (more, len(NAMES)))
        self._steps[self.rows] = step
        self._values[self.rows] = [math.nan if (value := values.get(name)) is None else value for name in NAMES]
        self.rows += 1

    def _halve(self) -> None:
        """Put the rows of each `_span` steps into one: the last step of them, the mean of the values that are there.

        The span doubles when that would leave less than a quarter of the room. Buckets by step keep the whole run
        equally fine, whatever was put together before.
        """
        buckets = self.steps // self._span
        while len(numpy.unique(buckets)) > self._max_rows * 3 // 4:
            self._span *= 2
            buckets = self.steps // self._span
        begins = numpy.flatnonzero(numpy.r_[True, buckets[1:] != buckets[:-1]])
        values = self._values[: self.rows]
        there = ~numpy.isnan(values)
        count = numpy.add.reduceat(there, begins, dtype=numpy.int64)
        total = numpy.add.reduceat(numpy.where(there, values, 0.0), begins, dtype=numpy.float64)
        means = numpy.where(count > 0, total / numpy.maximum(count, 1), numpy.nan)
        last = numpy.r_[begins[1:], self.rows] - 1
        kept = len(begins)
        self._steps[:kept] = self._steps[last]
        self._values[:kept] = means.astype(numpy.float32)
        self.rows = kept
        self.generation += 1


@dataclass(frozen=True)
class Thinned:
    """What is drawn: `steps` [P] and, by name, values [P] (NaN: none)."""

    steps: NDArray[numpy.int64]
    values: dict[str, Array]


def bucket_width(first: int, last: int, points: int) -> int:
    """Steps in one pixel column: the smallest power of two with which the steps from `first` to `last` need at most
    `points` points (two a column, one if a column is one step)."""
    span = max(1, last - first + 1)
    if span <= points:
        return 1
    width = 2
    while 2 * (last // width - first // width + 1) > points:
        width *= 2
    return width


def thin(steps: NDArray[numpy.int64], columns: dict[str, NDArray[numpy.float32]], width: int) -> Thinned:
    """Reduce rows to two points for each `width` steps (buckets begin at multiples of it): the smallest and the
    largest value of each column, in the order in which they came, at the first and the last step of the bucket.

    Because buckets begin at fixed places, old points stay as they are when rows are added.
    """
    if width <= 1 or len(steps) == 0:
        return Thinned(steps.copy(), {name: values.astype(numpy.float64) for name, values in columns.items()})
    buckets = steps // width
    begins = numpy.flatnonzero(numpy.r_[True, buckets[1:] != buckets[:-1]])
    sizes = numpy.diff(numpy.r_[begins, len(steps)])
    # Two places a bucket, but one where it has one row only.
    double = sizes > 1
    place = numpy.cumsum(numpy.where(double, 2, 1)) - numpy.where(double, 2, 1)
    drawn = numpy.empty(int(place[-1]) + (2 if double[-1] else 1), numpy.int64)
    drawn[place] = steps[begins]
    drawn[place[double] + 1] = steps[(begins + sizes - 1)[double]]
    thinned = {}
    for name, values in columns.items():
        early, late = _extremes(values, begins, sizes)
        result = numpy.empty(len(drawn))
        result[place] = early
        result[place[double] + 1] = late[double]
        thinned[name] = result
    return Thinned(drawn, thinned)


def _extremes(
    values: NDArray[numpy.float32], begins: NDArray[numpy.int64], sizes: NDArray[numpy.int64]
) -> tuple[Array, Array]:
    """(first, second) of the smallest and the largest value of each bucket, by their order; NaN counts as absent."""
    low, high = numpy.fmin.reduceat(values, begins), numpy.fmax.reduceat(values, begins)
    index = numpy.arange(len(values))
    at_low = numpy.where(values == numpy.repeat(low, sizes), index, len(values))
    at_high = numpy.where(values == numpy.repeat(high, sizes), index, len(values))
    low_first = numpy.minimum.reduceat(at_low, begins) <= numpy.minimum.reduceat(at_high, begins)
    early, late = numpy.where(low_first, low, high), numpy.where(low_first, high, low)
    return early.astype(numpy.float64), late.astype(numpy.float64)


def sigma_for(steps: int, share: float) -> float:
    """Width of the smoothing in steps: `share` of a run's length, in quarter octaves, so that it (and with it the
    whole curve) changes only four times while a run becomes twice as long; at least one step."""
    wanted = max(1.0, share * steps)
    return 2.0 ** (math.floor(_TURNS * math.log2(wanted)) / _TURNS)


def reach(sigma: float) -> int:
    """How far away, in steps, a row may be to count for a smoothed value."""
    return math.ceil(_REACH * sigma)


def smooth(
    steps: NDArray[numpy.int64], values: NDArray[numpy.float32], at: NDArray[numpy.int64], sigma: float
) -> Array:
    """The curve without lag at the steps `at`: local linear regression with Gaussian weights (LOESS of fixed width).

    For each x, of all lines a + b (s - x) the one that minimises  sum_i exp(-(s_i - x)^2 / (2 sigma^2)) *
    (y_i - a - b (s_i - x))^2  gives a:

        a = (S2 T0 - S1 T1) / (S0 S2 - S1^2),  S_k = sum w_i d_i^k,  T_k = sum w_i d_i^k y_i,  d_i = (s_i - x) / sigma

    The window is centred, so a fall shows where it happened, not later; the line takes the bias away that a mean has
    at the two ends. Rows further away than 4 sigma count nothing; rows are put into bins of sigma / 16 first, which
    changes the curve by less than 1/1000 of its range. NaN where no row is near.
    """
    there = ~numpy.isnan(values)
    steps, known = steps[there], values[there].astype(numpy.float64)
    result = numpy.full(len(at), numpy.nan)
    if len(at) == 0 or len(steps) == 0:
        return result
    far = reach(sigma)
    width = max(1, int(sigma / _BINS_PER_SIGMA))
    # Whole bins at fixed places: a part of the curve that is computed alone is the same as in the whole curve.
    begin, end = numpy.searchsorted(steps, [(at[0] - far) // width * width, ((at[-1] + far) // width + 1) * width])
    steps, known = steps[begin:end], known[begin:end]
    if len(steps) == 0:
        return result
    bins = steps // width - steps[0] // width
    count = numpy.bincount(bins)
    used = count > 0
    centre = (numpy.bincount(bins, steps - steps[0])[used] / count[used]) + steps[0]
    total, count = numpy.bincount(bins, known)[used], count[used]
    # Only the bins that count: those within reach of each x, as many columns as the fullest window has.
    start, stop = numpy.searchsorted(centre, at - far), numpy.searchsorted(centre, at + far, side="right")
    columns = start[:, None] + numpy.arange(max(1, int((stop - start).max())))[None, :]
    inside = columns < stop[:, None]
    columns = numpy.minimum(columns, len(centre) - 1)
    distance = (centre[columns] - at[:, None]) / sigma
    kernel = numpy.where(inside, numpy.exp(-0.5 * distance**2), 0.0)
    weight, pull = kernel * count[columns], kernel * total[columns]
    s0, s1, s2 = weight.sum(1), (weight * distance).sum(1), (weight * distance**2).sum(1)
    t0, t1 = pull.sum(1), (pull * distance).sum(1)
    determinant = s0 * s2 - s1**2
    line = determinant > 1e-6 * s0 * s0
    near = s0 > 0
    result[near] = t0[near] / s0[near]
    result[line] = (s2[line] * t0[line] - s1[line] * t1[line]) / determinant[line]
    return result


def plain(values: Array) -> list[float | None]:
    """Values for JSON: six significant digits, None for NaN and infinity."""
    finite = numpy.isfinite(values)
    safe = numpy.where(finite & (values != 0), values, 1.0)
    scale = 10.0 ** (_DIGITS - 1 - numpy.floor(numpy.log10(numpy.abs(safe))))
    rounded = numpy.where(finite & (values != 0), numpy.round(safe * scale) / scale, 0.0)
    return [value if known else None for value, known in zip(rounded.tolist(), finite.tolist(), strict=True)]
