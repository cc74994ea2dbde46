"""Buckets and resize plans equal a slow implementation that is written here from the rules."""

from __future__ import annotations

import random
from typing import Any

import pytest

from backend.config.dataset import DatasetEntry, dataset_config
from backend.data.buckets import Bucket, bucket_list, choose_bucket, plan_source, resize_plan


def entry_of(kind: str = "video", **keys: Any) -> DatasetEntry:
    return dataset_config({"datasets": [{f"{kind}_directory": "/a", **keys}]}).datasets[0]


def slow_buckets(width: int, height: int, step: int) -> list[tuple[int, int]]:
    area = width * height
    side = max(s for s in range(1, 9000) if s * s <= area)
    found = []
    first = side // 2 - side // 2 % step
    for w in range(first, side + 1):
        if (w - first) % step == 0 and w > 0:
            h = max(h for h in range(0, area // w + 1) if h % step == 0) if area // w < 20_000 else 0
            found += [(w, h), (h, w)]
    return sorted(set(found))


def test_the_list_equals_the_slow_one_and_the_known_counts() -> None:
    assert len(bucket_list((512, 512))) == 33
    assert len(bucket_list((768, 512))) == 41
    chooser = random.Random(1)
    for _ in range(40):
        size = chooser.randint(32, 1500), chooser.randint(32, 1500)
        assert [(b.width, b.height) for b in bucket_list(size)] == slow_buckets(*size, 16)


def test_choices_equal_the_slow_ones() -> None:
    chooser = random.Random(2)
    for _ in range(60):
        resolution = [chooser.randint(32, 1200), chooser.randint(32, 1200)]
        area = resolution[0] * resolution[1]
        buckets = slow_buckets(*resolution, 16)
        for kind in ("image", "video"):
            for no_upscale in (False, True):
                entry = entry_of(kind, resolution=resolution, enable_bucket=True, bucket_no_upscale=no_upscale)
                width, height = chooser.randint(16, 3000), chooser.randint(16, 3000)
                chosen = choose_bucket((width, height), entry)
                if no_upscale and width * height <= area:
                    assert chosen == Bucket(width - width % 16, height - height % 16)
                else:
                    away = [abs(w / h - width / height) for w, h in buckets]
                    w, h = buckets[away.index(min(away))]
                    assert chosen == Bucket(w, h)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_videos_obey_the_switches_as_images_do(kind: str) -> None:
    """Trap T15: elsewhere, caching of videos ignores enable_bucket = false and bucket_no_upscale."""
    fixed = entry_of(kind, resolution=[512, 768], bucket_no_upscale=True)
    assert {choose_bucket(size, fixed) for size in ((64, 64), (1920, 1080), (50, 4000))} == {Bucket(512, 768)}
    own = entry_of(kind, resolution=[512, 768], enable_bucket=True, bucket_no_upscale=True)
    assert choose_bucket((333, 250), own) == Bucket(320, 240)
    assert choose_bucket((1920, 1080), own) != Bucket(1920, 1072)
    assert choose_bucket((333, 250), entry_of(kind, resolution=[512, 768], enable_bucket=True)).width > 500
    assert choose_bucket((9, 9), own) == Bucket(16, 16)
    assert choose_bucket((9, 9), entry_of(kind, resolution=[500, 511])) == Bucket(496, 496)


def test_nabla_sizes_are_multiples_of_128() -> None:
    chooser = random.Random(3)
    for _ in range(300):
        entry = entry_of(
            resolution=[chooser.randint(32, 1400), chooser.randint(32, 1400)],
            enable_bucket=chooser.random() < 0.7,
            bucket_no_upscale=chooser.random() < 0.5,
        )
        size = chooser.randint(1, 3000), chooser.randint(1, 3000)
        for nabla in (True, "stretch"):
            bucket, plan = plan_source(size, entry, nabla=nabla)
            assert bucket.width % 128 == bucket.height % 128 == 0 < min(bucket.width, bucket.height)
            plain = choose_bucket(size, entry)
            if nabla == "stretch":
                assert plan.size == (plain.width, plain.height)
                assert 0 <= bucket.width - plain.width < 128
                assert 0 <= bucket.height - plain.height < 128
            else:
                assert plan.size == (bucket.width, bucket.height)
    entry = entry_of(resolution=[512, 512], enable_bucket=True)
    assert choose_bucket((512, 512), entry, nabla=True) == Bucket(512, 512)
    assert choose_bucket((100, 100), entry, nabla="stretch") == Bucket(512, 512)


def test_a_plan_covers_the_bucket_keeps_the_aspect_and_cuts_the_centre() -> None:
    chooser = random.Random(4)
    for _ in range(3000):
        width, height = chooser.randint(1, 4000), chooser.randint(1, 4000)
        bucket = Bucket(chooser.randint(1, 90) * 16, chooser.randint(1, 90) * 16)
        plan = resize_plan((width, height), bucket)
        left, top, right, bottom = plan.crop
        assert (right - left, bottom - top) == (bucket.width, bucket.height) == plan.size
        assert left >= 0 <= top
        assert right <= plan.scaled[0]
        assert bottom <= plan.scaled[1]
        assert 0 <= (plan.scaled[0] - right) - left <= 1
        assert 0 <= (plan.scaled[1] - bottom) - top <= 1
        ratio = max(bucket.width / width, bucket.height / height)
        assert abs(plan.scaled[0] - width * ratio) <= 0.5 + 1e-6
        assert abs(plan.scaled[1] - height * ratio) <= 0.5 + 1e-6
        assert plan.scaled[0] == bucket.width or plan.scaled[1] == bucket.height


def test_no_pixels_are_no_source() -> None:
    with pytest.raises(ValueError):
        choose_bucket((0, 5), entry_of())
    with pytest.raises(ValueError):
        resize_plan((5, 0), Bucket(16, 16))
