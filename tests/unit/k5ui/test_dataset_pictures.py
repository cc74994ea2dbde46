"""Pictures of sources, and of what training sees: the frames, the crop and the rate of the real dataset code."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy
import pytest
from PIL import Image

from k5ui.datasets.preview_cache import PreviewCache
from tests.unit.k5ui.dataset_kit import Desk, open_desk, write_clip, write_image

FIRST, STEP = 20, 8


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One workspace for all tests here: its processes start once."""
    found = open_desk(tmp_path_factory.mktemp("pictures") / "workspace")
    yield found
    found.services.close()


@pytest.fixture(scope="module")
def dataset(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A clip at 24 and one at 12 frames a second, 80 x 48; a wide picture; a broken one of each kind."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "at24.mp4", frames=25, size=(80, 48))
    write_clip(folder / "at12.mp4", frames=25, size=(80, 48), fps=12)
    write_image(folder / "wide.png", (120, 60))
    (folder / "cut.mp4").write_bytes((folder / "at24.mp4").read_bytes()[:-600])
    whole = (folder / "wide.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return desk.new(folder)


def item(desk: Desk, dataset: str, name: str) -> dict:
    return next(item for item in desk.items(dataset) if item["name"] == name)


def frames_of(content: bytes) -> list[numpy.ndarray]:
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].pix_fmt == "yuv420p"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def number_of(frame: numpy.ndarray) -> int:
    """Which frame of a `write_clip` this is."""
    height, width = frame.shape[:2]
    return round((float(frame[height // 4 : -height // 4, width // 4 : -width // 4].mean()) - FIRST) / STEP)


def picture(desk: Desk, address: str) -> Image.Image:
    answer = desk.client.get("/" + address)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/webp"
    return Image.open(io.BytesIO(answer.content))


def test_thumbs_are_small_and_from_a_third_of_the_clip(desk: Desk, dataset: str) -> None:
    thumb = picture(desk, item(desk, dataset, "at24.mp4")["thumb"])
    assert (thumb.format, thumb.size) == ("WEBP", (80, 48))
    assert number_of(numpy.asarray(thumb.convert("RGB"))) == 8
    assert picture(desk, item(desk, dataset, "wide.png")["thumb"]).size == (120, 60)


def test_previews_play_and_can_be_sought(desk: Desk, dataset: str) -> None:
    address = item(desk, dataset, "at12.mp4")["preview"]
    answer = desk.client.get("/" + address)
    frames = frames_of(answer.content)
    assert frames[0].shape == (48, 80, 3)
    assert len(frames) == 33, "2.08 seconds at 16 a second"
    assert [number_of(frame) for frame in frames[:8]] == [0, 0, 1, 2, 3, 3, 4, 5]
    assert answer.content.index(b"moov") < answer.content.index(b"mdat"), "the index lies in front"
    part = desk.client.get("/" + address, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert "sandbox" in part.headers["content-security-policy"]
    assert item(desk, dataset, "wide.png")["preview"] is None


def test_what_training_sees_of_a_clip(desk: Desk, dataset: str) -> None:
    """T15: a clip at 12 a second is resampled, so each of its frames is seen twice and the speed stays."""
    seen = desk.get(f"datasets/{dataset}/seen/{item(desk, dataset, 'at12.mp4')['key']}")
    assert (seen["source"], seen["bucket"], seen["frames"], seen["start"]) == ([80, 48], [64, 64], 17, 0)
    assert seen["scaled"] == [107, 64]
    assert seen["crop"] == [21, 0, 85, 64]
    assert seen["source_numbers"] == [number // 2 for number in range(17)]
    assert seen["seconds"][2] == pytest.approx(1 / 12, abs=1e-3)
    answer = desk.client.get("/" + seen["video"])
    frames = frames_of(answer.content)
    assert [number_of(frame) for frame in frames] == seen["source_numbers"]
    assert frames[0].shape == (64, 64, 3)
    strip = numpy.asarray(picture(desk, seen["strip"]).convert("RGB"))
    assert strip.shape == (64, 8 * 64, 3)
    shown = [number_of(part) for part in numpy.split(strip, 8, axis=1)]
    assert shown == [seen["source_numbers"][place] for place in (0, 2, 5, 7, 9, 11, 14, 16)]


def test_what_training_sees_of_a_still(desk: Desk, dataset: str) -> None:
    seen = desk.get(f"datasets/{dataset}/seen/{item(desk, dataset, 'wide.png')['key']}")
    assert (seen["bucket"], seen["scaled"], seen["crop"]) == ([64, 64], [128, 64], [32, 0, 96, 64])
    assert (seen["video"], seen["source_numbers"], seen["frames"]) == (None, [0], 1)
    assert picture(desk, seen["strip"]).size == (64, 64)


def test_a_picture_is_made_once_and_again_when_its_source_changes(desk: Desk, tmp_path: Path) -> None:
    write_image(tmp_path / "p" / "x.png", colour=(255, 0, 0))
    dataset = desk.new(tmp_path / "p")
    first = item(desk, dataset, "x.png")["thumb"]
    assert picture(desk, first).convert("RGB").getpixel((5, 5))[0] > 240
    files = set(desk.services.datasets.previews.cache.folder.rglob("*.webp"))
    picture(desk, first)
    assert set(desk.services.datasets.previews.cache.folder.rglob("*.webp")) == files
    write_image(tmp_path / "p" / "x.png", (60, 60), (0, 0, 255))
    known = desk.services.datasets.get(dataset)
    desk.services.datasets.scans.refresh(known, wait=20)
    second = item(desk, dataset, "x.png")["thumb"]
    assert second != first
    assert picture(desk, second).convert("RGB").getpixel((5, 5))[2] > 240


def test_broken_media_say_why(desk: Desk, dataset: str) -> None:
    """They are looked at when somebody asks, by a process that may crash; the page gets a reason, never a picture."""
    broken = item(desk, dataset, "cut.png")
    answer = desk.client.get(f"/api/datasets/{dataset}/thumb/{broken['key']}")
    assert answer.status_code == 404
    assert "damaged" in answer.json()["error"]
    after = item(desk, dataset, "cut.png")
    assert after["thumb"] is None
    assert "damaged" in after["missing"]
    cut = item(desk, dataset, "cut.mp4")
    answer = desk.client.get(f"/api/datasets/{dataset}/clip/{cut['key']}/0")
    assert answer.status_code == 404
    assert answer.json()["error"]
    assert list(desk.services.datasets.previews.cache.folder.rglob("*.tmp*")) == []


def test_clips_that_are_not_there(desk: Desk, dataset: str) -> None:
    key = item(desk, dataset, "at24.mp4")["key"]
    for path in (f"clip/{key}/1", f"strip/{key}/99", f"thumb/{'0' * 16}", f"clip/{key}/-1", "thumb/x"):
        assert desk.client.get(f"/api/datasets/{dataset}/{path}").status_code in (404, 422), path
    assert desk.client.get(f"/api/datasets/{dataset}/seen/{key}?clip=5").status_code == 404
    still = item(desk, dataset, "wide.png")["key"]
    assert "no clip" in desk.client.get(f"/api/datasets/{dataset}/clip/{still}/0").json()["error"]


def test_the_least_used_pictures_make_room(tmp_path: Path) -> None:
    cache = PreviewCache(tmp_path / "cache", limit=1000)
    paths = [cache.path(["x", number], ".webp") for number in range(6)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 190)
        os.utime(path, (number, number))
    (tmp_path / "cache" / "note.txt").write_text("not a picture")
    assert cache.find(paths[0]), "used just now, so it stays"
    cache.added(paths[5])
    left = [path.is_file() for path in paths]
    assert left == [True, False, False, True, True, True]
    assert (tmp_path / "cache" / "note.txt").is_file()
