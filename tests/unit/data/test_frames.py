"""Clip ranges and resampled frames equal slow implementations that are written here from the rules."""

from __future__ import annotations

import random
from typing import Any

import pytest

from backend.config.dataset import DatasetEntry, dataset_config
from backend.data.frames import (
    ClipRange,
    clip_ranges,
    constant_rate_times,
    needed_frames,
    resample_times,
    shortest_clip,
)

MODES = ("head", "chunk", "slide", "uniform", "full")


def entry_of(**keys: Any) -> DatasetEntry:
    return dataset_config({"datasets": [{"video_directory": "/a", **keys}]}).datasets[0]


def slow_ranges(count: int, mode: str, lengths: list[int], stride: int, sample: int, most: int) -> list[tuple]:
    if mode == "full":
        fitting = [n for n in range(1, min(count, most) + 1) if n % 4 == 1]
        return [(0, fitting[-1])] if fitting else []
    found = set()
    for length in lengths:
        length = max(n for n in range(1, length + 1) if n % 4 == 1)
        for start in range(count):
            if start + length > count:
                break
            wanted = {
                "head": start == 0,
                "chunk": start % length == 0,
                "slide": start % stride == 0,
                "uniform": start == 0
                if sample == 1
                else any(start == (count - length) * k // (sample - 1) for k in range(sample)),
            }[mode]
            if wanted:
                found.add((length, start))
    return [(start, length) for length, start in sorted(found)]


@pytest.mark.parametrize("mode", MODES)
def test_ranges_equal_the_slow_ones(mode: str) -> None:
    chooser = random.Random(mode)
    for _ in range(250):
        lengths = [chooser.randint(1, 60) for _ in range(chooser.randint(1, 4))]
        stride, sample, most = chooser.randint(1, 20), chooser.randint(1, 9), chooser.randint(1, 90)
        count = chooser.randint(0, 120)
        entry = entry_of(
            frame_extraction=mode, target_frames=lengths, frame_stride=stride, frame_sample=sample, max_frames=most
        )
        ranges = clip_ranges(count, entry)
        assert [(r.start, r.frames) for r in ranges] == slow_ranges(count, mode, lengths, stride, sample, most)
        assert all(r.frames % 4 == 1 and 0 <= r.start < r.end <= count for r in ranges)
        assert bool(ranges) == (count >= shortest_clip(entry))
        needed = needed_frames(entry)
        assert needed is None or all(r.end <= needed for r in ranges)


def test_known_ranges() -> None:
    uniform = entry_of(frame_extraction="uniform", target_frames=[25], frame_sample=4)
    assert clip_ranges(100, uniform) == [ClipRange(s, 25) for s in (0, 25, 50, 75)]
    assert clip_ranges(25, uniform) == [ClipRange(0, 25)]
    assert clip_ranges(24, uniform) == []
    many = entry_of(frame_extraction="uniform", target_frames=[25], frame_sample=100_000)
    assert len(clip_ranges(1000, many)) == 976


def lateness(times: list[float]) -> float:
    mean = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
    return min(1.1e-3, mean / 4)


def slow_count(times: list[float]) -> int:
    if len(times) == 1:
        return 1
    end = times[-1] - times[0] + (times[-1] - times[0]) / (len(times) - 1)
    return max(1, sum(k / 24 < end - lateness(times) for k in range(int(end * 24) + 3)))


def slow_resample(times: list[float], fps: float, count: int) -> list[int]:
    chosen = []
    for k in range(count):
        shown = [i for i, time in enumerate(times) if time - times[0] <= k / fps + lateness(times)]
        chosen.append(shown[-1])
    return chosen


def test_resampled_frames_equal_the_slow_ones_at_any_spacing() -> None:
    chooser = random.Random(5)
    for _ in range(150):
        first = chooser.uniform(-2, 5)
        times = [first]
        for _ in range(chooser.randint(0, 60)):
            times.append(times[-1] + chooser.choice([0.0, 1 / 60, 1 / 30, 1001 / 24000, 1 / 15, chooser.random()]))
        count = len(resample_times(times))
        assert count == slow_count(times)
        assert resample_times(times) == slow_resample(times, 24, count)
        start = chooser.randint(0, count - 1)
        frames = chooser.randint(0, count - start)
        assert resample_times(times, start=start, frames=frames) == slow_resample(times, 24, count)[start:][:frames]


@pytest.mark.parametrize("rate", [10, 12, 15, 23.976, 24, 25, 29.97, 30, 48, 50, 59.94, 60, 120])
def test_constant_rates_keep_the_speed_up_and_down(rate: float) -> None:
    """Elsewhere a source slower than 24 is not brought up, so that its clips come out too short and are skipped."""
    times = constant_rate_times(200, rate)
    chosen = resample_times(times)
    assert len(chosen) == pytest.approx(200 * 24 / rate, abs=1)
    assert chosen == sorted(chosen)
    for k, frame in enumerate(chosen):
        assert 0 <= k / 24 - times[frame] + 1.2e-3 < 1 / rate + 2e-3
    if rate == 24:
        assert chosen == list(range(200))
    if rate == 12:
        assert chosen == [k // 2 for k in range(400)]
    if rate == 48:
        assert chosen == list(range(0, 200, 2))


def test_ticks_that_are_rounded_choose_the_same_frames() -> None:
    """Containers store whole milliseconds or 1/90000 s; 24 frames a second must stay every frame once."""
    for ticks in (1000, 90_000, 15_360, 12_800):
        times = [round(k * ticks / 24) / ticks for k in range(500)]
        assert resample_times(times) == list(range(500))


def test_what_cannot_be_is_refused() -> None:
    assert resample_times([]) == []
    assert resample_times([3.0]) == [0]
    with pytest.raises(ValueError):
        resample_times([1.0, 0.5])
    with pytest.raises(ValueError):
        resample_times([0.0, 0.1], start=0, frames=100)
