"""The pixels of items: the frames that were promised, at the size of the bucket, for clips and stills alike."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
from PIL import Image

from backend.data.clips import item_numbers, read_item
from backend.data.items import MediaFacts, build_items, look_at, source_frame_numbers
from backend.data.media import fit_image, presentation_times, read_image
from backend.data.scan import Source, scan_dataset
from backend.data.stamps import Stamp
from backend.data.watchdog import MediaReader
from backend.errors import UserError
from tests.unit.data.clips import corners, read_numbers, write_clip
from tests.unit.data.dataset_folder import make_entry


@pytest.fixture(scope="module")
def reader():
    with MediaReader(1) as opened:
        yield opened


@pytest.mark.parametrize("source_fps", [None, 30, "auto"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_clips_are_the_frames_that_their_items_promise(name: str, source_fps, tmp_path: Path, reader) -> None:
    """A source of 30 frames a second, taken as it is and brought to 24."""
    keys = {} if source_fps is None else {"source_fps": source_fps}
    entry = make_entry(tmp_path, "video", resolution=[64, 32], frame_extraction="chunk", target_frames=[9], **keys)
    write_clip(tmp_path / "source" / name, 40, (64, 48), 30)
    items = build_items(entry, scan_dataset(entry).sources).items
    assert len(items) == (4 if source_fps is None else 3)
    for item in items:
        start = item.clip.start
        numbers = item_numbers(reader, entry, item)
        wanted = range(start, start + 9) if source_fps is None else [k * 5 // 4 for k in range(start, start + 9)]
        assert numbers == list(wanted)
        clip = read_item(reader, entry, item)
        assert (clip.shape, clip.dtype) == ((9, 32, 64, 3), numpy.uint8)
        # 48 rows are cropped to the 32 in the middle: the fields of the outer rows are cut, their order stays.
        whole = read_item(reader, entry, item._replace(bucket=item.bucket.__class__(64, 48)))
        assert read_numbers(whole) == numbers
        assert (whole[:, 8:40] == clip).all()
        few = read_item(reader, entry, item, numbers[::4])
        assert (few == clip[::4]).all()


@pytest.mark.parametrize("off", [0.991, 1.0, 1.009])
def test_the_last_clip_does_not_overrun_when_the_header_is_a_little_off(off: float, tmp_path: Path, reader) -> None:
    """The rate in the header may be 1 % beside the real one; what counts is when frames are shown."""
    entry = make_entry(
        tmp_path, "video", resolution=[64, 48], frame_extraction="chunk", target_frames=[5], source_fps="auto"
    )
    path = write_clip(
        tmp_path / "source" / "a.mkv",
        240,
        rate=Fraction(24),
        pts=[round(k * 1000 / 24 * off) for k in range(240)],
        unit=Fraction(1, 1000),
    )
    times = presentation_times(path)
    length = times[-1] * 240 / 239
    items = build_items(entry, scan_dataset(entry).sources).items
    assert len(items) == math.floor(math.ceil((length - 1.1e-3) * 24) / 5)
    for item in items:
        numbers = source_frame_numbers(entry, item, times)
        moments = [k / 24 for k in range(item.clip.start, item.clip.end)]
        assert numbers == [max(n for n in range(240) if times[n] <= moment + 1.1e-3) for moment in moments]
    assert read_numbers(read_item(reader, entry, items[-1])) == source_frame_numbers(entry, items[-1], times)


def test_a_file_that_became_shorter_is_said_and_rounding_is_not(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "video", frame_extraction="chunk", target_frames=[5], source_fps="auto")
    media = MediaFacts(80, 60, 10, 24.0, 10 / 24, False)
    source = Source(str(tmp_path / "a.mp4"), "video", "a.mp4", "a")
    plan = build_items(entry, [source], look=lambda _: (Stamp(1, 1, 1), media))
    last = plan.items[-1]
    assert last.clip.end == 10
    assert source_frame_numbers(entry, last, [k / 24 for k in range(9)]) == [5, 6, 7, 8, 8]
    with pytest.raises(UserError, match="changed since"):
        source_frame_numbers(entry, last, [k / 24 for k in range(8)])
    with pytest.raises(ValueError):
        source_frame_numbers(entry, last, None)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (97, 31), (300, 200)])
def test_stills_are_scaled_to_cover_and_cropped(size: tuple[int, int], tmp_path: Path, reader) -> None:
    entry = make_entry(tmp_path, resolution=[64, 48], enable_bucket=True)
    Image.fromarray(corners(size)).save(tmp_path / "source" / "a.png")
    (item,) = build_items(entry, scan_dataset(entry).sources).items
    pixels = read_item(reader, entry, item)
    plan = item.resize_plan
    expected = fit_image(read_image(item.source.location), plan.scaled, plan.crop)
    assert pixels.shape == (1, item.bucket.height, item.bucket.width, 3)
    assert (pixels[0] == expected).all()
    assert source_frame_numbers(entry, item) == [0]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_stretched_items_are_cropped_first_and_then_widened(kind: str, tmp_path: Path, reader) -> None:
    """As other trainers resize for NABLA: the ordinary bucket, then up to multiples of 128 without regard to aspect."""
    entry = make_entry(tmp_path, kind, resolution=[96, 144])
    if kind == "image":
        Image.fromarray(corners((300, 200))).save(tmp_path / "source" / "a.png")
    else:
        write_clip(tmp_path / "source" / "a.mp4", 5, (300, 200))
    sources = scan_dataset(entry).sources
    (plain,) = build_items(entry, sources).items
    (item,) = build_items(entry, sources, nabla="stretch").items
    (stepped,) = build_items(entry, sources, nabla=True).items
    assert plain.cropped is None
    assert stepped.cropped is None
    assert (stepped.bucket.width, stepped.bucket.height) == (128, 128)
    assert item.cropped == plain.bucket
    assert (item.bucket.width, item.bucket.height) == (128, 256)
    before, after = read_item(reader, entry, plain), read_item(reader, entry, item)
    assert after.shape == (item.frames, 256, 128, 3)
    assert numpy.abs(_bilinear(before[0], 128, 256) - after[0]).max() <= 1


def _bilinear(pixels: numpy.ndarray, width: int, height: int) -> numpy.ndarray:
    """Pixel centres as in every library: output x lies at (x + 1/2) * ratio - 1/2 of the input, edges repeated."""

    def along(values: numpy.ndarray, length: int) -> numpy.ndarray:
        place = (numpy.arange(length) + 0.5) * len(values) / length - 0.5
        low = numpy.floor(place).astype(int)
        part = (place - low)[:, None, None]
        last = len(values) - 1
        return values[numpy.clip(low, 0, last)] * (1 - part) + values[numpy.clip(low + 1, 0, last)] * part

    return along(along(pixels.astype(float), height).transpose(1, 0, 2), width).transpose(1, 0, 2)


def test_sources_that_are_far_too_narrow_are_skipped(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, resolution=[512, 512])
    Image.new("RGB", (1, 2000)).save(tmp_path / "source" / "a.png")
    plan = build_items(entry, scan_dataset(entry).sources)
    assert not plan.items
    assert "too narrow" in plan.skipped[0].reason
    assert not plan.skipped[0].broken


def test_a_broken_still_costs_one_file(tmp_path: Path, reader) -> None:
    entry = make_entry(tmp_path)
    noise = random.Random(0).randbytes(4000)
    Image.new("RGB", (80, 60)).save(tmp_path / "source" / "a.png")
    (item,) = build_items(entry, scan_dataset(entry).sources).items
    data = bytearray(Path(item.source.location).read_bytes())
    Path(item.source.location).write_bytes(bytes(data[: len(data) // 2]) + noise)
    with pytest.raises(UserError):
        read_item(reader, entry, item)
    Image.new("RGB", (80, 60)).save(tmp_path / "source" / "a.png")
    assert read_item(reader, entry, item).shape == (1, 48, 64, 3)
    assert look_at(item.source)[1][:2] == (80, 60)
