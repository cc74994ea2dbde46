"""From sources to items: clips, buckets, names, and the sources that give none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backend.data.items import MediaFacts, build_items, look_at, media_facts, usable_frames
from backend.data.probe import MediaInfo
from backend.data.scan import Source, scan_dataset
from backend.data.stamps import content_hash, stamp_of
from backend.errors import UserError
from tests.unit.data.dataset_folder import add_image, add_video, look_at_text, make_entry, read_name_as_others


def test_stills_are_named_by_their_own_size(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    add_image(tmp_path / "source" / "b.png", (100, 60))
    add_image(tmp_path / "source" / "a.png", (80, 60))
    plan = build_items(entry, scan_dataset(entry).sources)
    assert [item.latent_name for item in plan.items] == ["a_0080x0060_k5.safetensors", "b_0100x0060_k5.safetensors"]
    assert [item.text_name for item in plan.items] == ["a_k5_te.safetensors", "b_k5_te.safetensors"]
    assert all(item.clip is None and item.frames == 1 for item in plan.items)
    assert all((item.bucket.width, item.bucket.height) == (64, 48) for item in plan.items)
    assert [item.stamp for item in plan.items] == [stamp_of(item.source.location) for item in plan.items]


def test_clips_are_named_by_start_frames_and_bucket(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "video", target_frames=[5, 9], frame_extraction="chunk")
    add_video(tmp_path / "source" / "one_two.mp4", "640 480 19 24")
    plan = build_items(entry, scan_dataset(entry).sources, look=look_at_text)
    found = {read_name_as_others(item.latent_name, True) for item in plan.items}
    expected = {(0, 5), (5, 5), (10, 5), (0, 9), (9, 9)}
    assert found == {("one_two", (64, 48), clip) for clip in expected}
    assert {item.text_name for item in plan.items} == {"one_two_k5_te.safetensors"}
    assert len({item.latent_name for item in plan.items}) == len(plan.items)


def test_sources_without_items_are_listed_with_their_reason(tmp_path: Path) -> None:
    """Other tools drop short and broken videos without a word."""
    entry = make_entry(tmp_path, "video", target_frames=[25, 9])
    add_video(tmp_path / "source" / "fits.mp4", "80 60 9 24")
    add_video(tmp_path / "source" / "short.mp4", "80 60 8 24")
    plan = build_items(entry, scan_dataset(entry).sources, look=look_at_text)
    assert [item.source.name for item in plan.items] == ["fits"]
    (skipped,) = plan.skipped
    assert (skipped.source.name, skipped.broken) == ("short", False)
    assert "8 frames" in skipped.reason
    assert "9" in skipped.reason


def test_broken_and_vanished_sources_are_skipped_as_broken(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    for name in ("a", "b", "c"):
        add_image(tmp_path / "source" / f"{name}.png")
    sources = scan_dataset(entry).sources
    (tmp_path / "source" / "a.png").write_bytes(b"not a picture")
    (tmp_path / "source" / "b.png").unlink()
    plan = build_items(entry, sources)
    assert [item.source.name for item in plan.items] == ["c"]
    assert [(skipped.source.name, skipped.broken) for skipped in plan.skipped] == [("a", True), ("b", True)]
    assert all(str(skipped.source.path) in skipped.reason for skipped in plan.skipped)


@pytest.mark.parametrize(
    ("source_fps", "fps", "frames", "expected"),
    [(None, 30.0, 100, 100), (30.0, 25.0, 100, 80), (12.0, 25.0, 10, 20), ("auto", 30.0, 100, 80),
     ("auto", 24.0, 100, 100), ("auto", 23.976, 48, 49), ("auto", 0.0, 7, 7), (60.0, 25.0, 1, 1)],
)  # fmt: skip
def test_usable_frames_after_resampling(source_fps, fps: float, frames: int, expected: int, tmp_path: Path) -> None:
    """Other tools only drop frames: a slow source gave too few and was skipped without a word."""
    keys = {} if source_fps is None else {"source_fps": source_fps}
    entry = make_entry(tmp_path, "video", **keys)
    media = MediaFacts(80, 60, frames, fps, frames / fps if fps else 0.0, False)
    assert usable_frames(entry, media) == expected


def test_media_facts_need_a_frame_count() -> None:
    info = MediaInfo("video", 80, 60, 0, 24.0, None, "h264")
    with pytest.raises(UserError, match="how many frames"):
        media_facts(info, Path("a.mp4"))
    assert media_facts(MediaInfo("video", 80, 60, 3, None, None, "images"), Path("a")).fps == 0.0


def test_a_folder_of_frames_has_a_stamp_and_a_hash_of_all_its_frames(tmp_path: Path) -> None:
    folder = tmp_path / "shot"
    for number in range(3):
        add_image(folder / f"{number}.png", caption=None, grey=number)
    stamp, digest = stamp_of(folder), content_hash(folder)
    assert stamp.size == sum(file.stat().st_size for file in folder.iterdir())
    status = (folder / "1.png").stat()
    os.utime(folder / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**12))
    assert stamp_of(folder) != stamp
    assert content_hash(folder) == digest
    add_image(folder / "1.png", caption=None, grey=77)
    assert content_hash(folder) != digest
    source = Source(str(folder), "video", "shot", "shot")
    assert look_at(source)[1][:3] == (80, 60, 3)
