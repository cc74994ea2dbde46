"""Groups of sources that look alike, found among many thousands in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from backend.data.lint.looks import Look, unpack_bits, unpack_tiny
from backend.data.lint.pictures import Numbers

# Bits of 320 in which candidates may differ. Copies (other size, rate, quality, brightness) measured 0 to 30, drawings
# on flat ground up to 54; unrelated clips about 150.
_MOST_BITS = 64
# Correlation of the brightness of candidates, over all pictures and in the worst one. Copies measured 0.993 and more
# (0.966 in one badly compressed picture), other moments of one scene with a fixed camera up to 0.971.
_LEAST_ALIKE, _LEAST_ALIKE_ONE = 0.985, 0.95
# Levels by which colours may differ, in the mean and in one field: a red and a blue shape of one form are different
# clips. Copies measured 1.8 and 11.
_MOST_COLOUR, _MOST_COLOUR_ONE = 4.0, 13.0
# Colours fade and grow with contrast by factors that editing uses.
_FADES = (0.6, 1.6)
_BLOCK = 1024


def alike_pairs(looks: Sequence[Look]) -> list[tuple[int, int, int]]:
    """All pairs (i, j, differing bits), i < j, that look alike, in ascending order.

    Every pair is compared: 10,000 looks are one matrix product of 50 million dot products, in blocks of 1,024 rows.
    """
    if len(looks) < 2:
        return []
    rows = unpack_bits(list(looks))
    length = rows.shape[1]
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        # -1 and 1: the product is the number of equal bits less the number of different ones, exact in float32.
        near = block @ rows[start:].T >= length - 2 * _MOST_BITS
        for first, second in zip(*numpy.nonzero(numpy.triu(near, 1)), strict=True):
            one, two = int(first) + start, int(second) + start
            if _same_pictures(looks[one], looks[two]):
                found.append((one, two, int((rows[one] != rows[two]).sum())))
    return sorted(found)


def _same_pictures(first: Look, second: Look) -> bool:
    light, colour = unpack_tiny(first)
    other_light, other_colour = unpack_tiny(second)
    if _correlation(light.ravel(), other_light.ravel()) < _LEAST_ALIKE:
        return False
    if min(_correlation(one, two) for one, two in zip(light, other_light, strict=True)) < _LEAST_ALIKE_ONE:
        return False
    return _same_colours(colour, other_colour) or _same_colours(other_colour, colour)


def _same_colours(first: Numbers, second: Numbers) -> bool:
    power = float((first * first).sum())
    factor = min(_FADES[1], max(_FADES[0], float((first * second).sum()) / power)) if power else 1.0
    apart = numpy.abs(second - factor * first)
    return float(apart.mean()) <= _MOST_COLOUR and float(apart.max()) <= _MOST_COLOUR_ONE


def _correlation(first: Numbers, second: Numbers) -> float:
    one, two = first - first.mean(), second - second.mean()
    power = float((one * one).sum()) * float((two * two).sum())
    return float((one * two).sum()) / power**0.5 if power else 1.0


def group_pairs(count: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected groups of at least two of `count` things, ascending inside and by their first one.

    A chain of pairs is one group; the result does not depend on the order of the pairs.
    """
    parent = list(range(count))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for first, second in pairs:
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for place in sorted({place for pair in pairs for place in pair}):
        groups.setdefault(root(place), []).append(place)
    return [groups[key] for key in sorted(groups)]
