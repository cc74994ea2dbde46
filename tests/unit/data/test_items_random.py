"""Items of random sources under random settings equal a slow implementation that is written here from the rules.

Nothing of the product computes what is expected: sizes, clips, names and frames are counted out here with plain loops
and fractions.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest

from backend.config.dataset import dataset_config
from backend.data.items import MediaFacts, build_items, source_frame_numbers
from backend.data.scan import Source
from backend.data.stamps import Stamp

CASES = 120  # of each kind and mode: 600 for videos; 600 for images
MODES = ("head", "chunk", "slide", "uniform", "full")
NTSC = (Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001))
RATES = (8, 10, 12, 15, 24, 25, 30, 48, 50, 60, 120, *NTSC)


def slow_bucket(width: int, height: int, keys: dict[str, Any], step: int) -> tuple[int, int]:
    wide, high = keys["resolution"]
    if not keys["enable_bucket"]:
        return max(wide - wide % step, step), max(high - high % step, step)
    area = wide * high
    if keys["bucket_no_upscale"] and width * height <= area:
        return max(width - width % step, step), max(height - height % step, step)
    side = 0
    while (side + 1) * (side + 1) <= area:
        side += 1
    found = set()
    for first in range(step, side + 1, step):
        if first >= side // 2 - (side // 2) % step:
            second = area // first - (area // first) % step
            if second:
                found |= {(first, second), (second, first)}
    best = None
    for one in sorted(found or {(step, step)}):
        away = abs(one[0] / one[1] - width / height)
        if best is None or away < best[0]:
            best = (away, one)
    assert best is not None
    return best[1]


def slow_sizes(width: int, height: int, keys: dict[str, Any], nabla: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(the bucket, the size that is cropped to)."""
    if nabla is True:
        return (slow_bucket(width, height, keys, 128),) * 2
    plain = slow_bucket(width, height, keys, 16)
    if nabla == "stretch":
        return (plain[0] + -plain[0] % 128, plain[1] + -plain[1] % 128), plain
    return plain, plain


def slow_clips(count: int, keys: dict[str, Any]) -> list[tuple[int, int]]:
    mode = keys["frame_extraction"]
    if mode == "full":
        length = min(count, keys["max_frames"])
        while length > 0 and length % 4 != 1:
            length -= 1
        return [(0, length)] if length > 0 else []
    found = []
    for length in sorted({one - (one - 1) % 4 for one in keys["target_frames"]}):
        room = count - length
        if room < 0:
            continue
        if mode == "chunk":
            starts = [n * length for n in range(count) if (n + 1) * length <= count]
        elif mode == "slide":
            starts = [start for start in range(room + 1) if start % keys["frame_stride"] == 0]
        elif mode == "uniform" and keys["frame_sample"] > 1:
            starts = sorted({room * n // (keys["frame_sample"] - 1) for n in range(keys["frame_sample"])})
        else:
            starts = [0]
        found += [(start, length) for start in starts]
    return found


def slow_frames(times: list[Fraction]) -> list[int]:
    """The frame on screen every 1/24 s: the last one that is due, at most 1.1 ms or a quarter of a frame late."""
    if len(times) == 1:
        return [0]
    mean = (times[-1] - times[0]) / (len(times) - 1)
    late = min(Fraction(11, 10_000), mean / 4)
    end = times[-1] - times[0] + mean
    shown: list[int] = []
    here = 0
    while Fraction(len(shown), 24) < end - late or not shown:
        while here + 1 < len(times) and times[here + 1] - times[0] <= Fraction(len(shown), 24) + late:
            here += 1
        shown.append(here)
    return shown


def random_keys(chooser: random.Random, mode: str) -> dict[str, Any]:
    return {
        "resolution": [chooser.randint(32, 1100), chooser.randint(32, 1100)],
        "enable_bucket": chooser.random() < 0.7,
        "bucket_no_upscale": chooser.random() < 0.4,
        "target_frames": [chooser.randint(1, 70) for _ in range(chooser.randint(1, 3))],
        "frame_extraction": mode,
        "frame_stride": chooser.randint(1, 30),
        "frame_sample": chooser.randint(1, 7),
        "max_frames": chooser.randint(1, 150),
    }


def random_times(chooser: random.Random, frames: int, rate: Fraction) -> list[Fraction]:
    """Even, rounded to a container's ticks, or with frames that last longer than others."""
    kind = chooser.choice(["even", "ticks", "uneven"])
    if kind == "uneven":
        times = [Fraction(0)]
        while len(times) < frames:
            times.append(times[-1] + chooser.choice([1, 1, 1, 2, 3]) / rate)
        return times
    unit = chooser.choice([1000, 90_000, 600]) if kind == "ticks" else None
    return [Fraction(round(n / rate * unit), unit) if unit else n / rate for n in range(frames)]


def slow_name(stem: str, clip: tuple[int, int] | None, size: tuple[int, int]) -> str:
    middle = "" if clip is None else f"_{str(clip[0]).zfill(5)}-{str(clip[1]).zfill(3)}"
    return f"{stem}{middle}_{str(size[0]).zfill(4)}x{str(size[1]).zfill(4)}_k5.safetensors"


def covered(size: tuple[int, int], crop: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(scaled size, left and top of the crop): cover, nearest whole pixel, centre."""
    ratio = max(crop[0] / size[0], crop[1] / size[1])
    scaled = max(round(size[0] * ratio), crop[0]), max(round(size[1] * ratio), crop[1])
    return scaled, ((scaled[0] - crop[0]) // 2, (scaled[1] - crop[1]) // 2)


@pytest.mark.parametrize("mode", MODES)
def test_random_videos_give_the_expected_items_and_frames(mode: str) -> None:
    chooser = random.Random(f"videos {mode}")
    resampled = 0
    for number in range(CASES):
        keys = random_keys(chooser, mode)
        nabla = chooser.choice([False, False, True, "stretch"])
        rate = Fraction(chooser.choice(RATES))
        frames = chooser.randint(1, 160)
        times = random_times(chooser, frames, rate)
        if frames > 1:
            length = times[-1] + times[-1] / (frames - 1)
        else:
            length = 1 / rate
        fps = chooser.choice([None, None, "auto", "auto", float(rate), 30, 16])
        given = keys if fps is None else {**keys, "source_fps": fps}
        entry = dataset_config({"datasets": [{"video_directory": "/a", **given}]}).datasets[0]
        size = chooser.randint(40, 2500), chooser.randint(40, 2500)
        # The rate in the header may be up to 1 % off.
        said = float(rate) * chooser.uniform(0.991, 1.009)
        media = MediaFacts(*size, frames, said, float(length), False)
        source = Source(f"/a/v{number}.mp4", "video", f"v{number}.mp4", f"v{number}")
        plan = build_items(entry, [source], nabla=nabla, look=lambda _, media=media: (Stamp(1, 2, 3), media))
        if fps is None:
            shown = list(range(frames))
        elif fps == "auto":
            shown = slow_frames(times)
        else:
            shown = slow_frames([n / Fraction(fps) for n in range(frames)])
        bucket, crop = slow_sizes(*size, keys, nabla)
        clips = slow_clips(len(shown), keys)
        assert bool(plan.skipped) == (not clips)
        assert [(item.clip.start, item.clip.frames) for item in plan.items if item.clip] == clips
        for item, clip in zip(plan.items, clips, strict=True):
            assert (item.bucket.width, item.bucket.height) == bucket
            assert item.latent_name == slow_name(f"v{number}", clip, bucket)
            assert item.text_name == f"v{number}_k5_te.safetensors"
            assert item.resize_plan.size == crop
            assert (item.resize_plan.scaled, item.resize_plan.crop[:2]) == covered(size, crop)
            real = [float(time) for time in times]
            assert source_frame_numbers(entry, item, real) == shown[clip[0] : clip[0] + clip[1]]
            resampled += fps is not None
    assert resampled > 50


@pytest.mark.parametrize("nabla", [False, True, "stretch"])
def test_random_images_give_the_expected_items(nabla: Any) -> None:
    chooser = random.Random(f"images {nabla}")
    for number in range(200):
        keys = random_keys(chooser, "head")
        table = {key: keys[key] for key in ("resolution", "enable_bucket", "bucket_no_upscale")}
        entry = dataset_config({"datasets": [{"image_directory": "/a", **table}]}).datasets[0]
        size = chooser.randint(40, 5000), chooser.randint(40, 5000)
        media = MediaFacts(*size, 1, 0.0, 0.0, False)
        source = Source(f"/a/{number}.png", "image", f"{number}.png", str(number))
        (item,) = build_items(entry, [source], nabla=nabla, look=lambda _, media=media: (Stamp(1, 2, 3), media)).items
        bucket, crop = slow_sizes(*size, keys, nabla)
        assert ((item.bucket.width, item.bucket.height), item.clip) == (bucket, None)
        assert item.latent_name == slow_name(str(number), None, size)
        assert (item.resize_plan.size, item.resize_plan.scaled) == (crop, covered(size, crop)[0])
        assert source_frame_numbers(entry, item) == [0]
