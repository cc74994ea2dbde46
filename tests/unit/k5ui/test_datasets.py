"""Datasets on the page: made from folders, listed, looked at in the background, edited without losing anything."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.config.dataset import load_dataset_config
from k5ui.datasets.keys import dataset_id, source_key
from tests.unit.k5ui.dataset_kit import Desk, clip_folder, open_desk, write_clip, write_image


@pytest.fixture
def desk(workspace: Path) -> Iterator[Desk]:
    found = open_desk(workspace)
    yield found
    found.services.close()


def test_an_empty_workspace_has_no_datasets(desk: Desk) -> None:
    assert desk.get("datasets")["datasets"] == []
    assert desk.services.datasets.list() == []


def test_a_dataset_from_a_folder(desk: Desk, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "my clips")
    write_image(folder / "still.png")
    dataset = desk.new(folder)
    known = desk.services.datasets.get(dataset)
    text = known.path.read_text("utf-8")
    assert known.path == desk.services.workspace / "datasets" / "my-clips.toml"
    assert "# " in text
    video, image = load_dataset_config(known.path).datasets
    assert (video.kind, video.source, video.resolution, video.target_frames) == ("video", folder, (64, 64), (17,))
    assert (image.kind, image.source, image.enable_bucket) == ("image", folder, False)
    assert video.source_fps is None, "the clips are at 24 already"
    assert video.cache_directory != image.cache_directory
    page = desk.settle(dataset)
    assert (page["items"], page["steps_per_epoch"]) == (4, 4)
    assert page["entries"][0] | {"items": 3, "sources": 3, "missing_captions": 0} == page["entries"][0]
    assert page["entries"][0]["buckets"] == [
        {"width": 64, "height": 64, "frames": 17, "items": 3, "repeats": 1, "batch_size": 1, "batches": 3}
    ]
    assert page["general"]["resolution"] == [64, 64]


def test_larger_sources_get_buckets_and_their_rate(desk: Desk, tmp_path: Path) -> None:
    """T15: a rate that is not 24 is resampled, or motion is learned at the wrong speed."""
    (tmp_path / "c").mkdir()
    write_clip(tmp_path / "c" / "a.mp4", frames=40, size=(320, 192), fps=30, step=1)
    (tmp_path / "c" / "a.caption").write_text("x")
    (entry,) = desk.services.datasets.config(desk.new(tmp_path / "c")).datasets
    assert (entry.resolution, entry.enable_bucket, entry.source_fps) == ((512, 512), True, "auto")
    assert entry.target_frames == (29,), "40 frames at 30 are 32 at 24, and 29 is the next 4n + 1 below"
    assert entry.caption_extension == ".caption"


def test_names_are_never_used_twice(desk: Desk, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "a", 1)
    first, second = desk.new(folder, "set"), desk.new(folder, "set")
    paths = [desk.services.datasets.get(dataset).path.name for dataset in (first, second)]
    assert paths == ["set.toml", "set-2.toml"]
    configs = [desk.services.datasets.config(dataset).datasets[0].cache_directory for dataset in (first, second)]
    assert configs[0] != configs[1]


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_folders_that_are_none(desk: Desk, tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    answer = desk.call("new_dataset", str(tmp_path / what), None)
    assert answer["problems"][0]["field"] == "folder"
    assert desk.get("datasets")["datasets"] == []


def test_opened_files_are_remembered_and_forgotten_ones_stay(desk: Desk, tmp_path: Path, workspace: Path) -> None:
    folder = clip_folder(tmp_path / "a", 1)
    outside = tmp_path / "elsewhere.toml"
    outside.write_text(f"[[datasets]]\nvideo_directory = {json.dumps(str(folder))}\ntarget_frames = [5]\n")
    dataset = desk.done("open_dataset", str(outside))["id"]
    assert dataset == dataset_id(outside)
    own = desk.new(folder, "own")
    desk.services.close()
    again = open_desk(workspace)
    assert {row["id"] for row in again.get("datasets")["datasets"]} == {dataset, own}
    for one in (dataset, own):
        again.done("forget_dataset", one)
    assert again.get("datasets")["datasets"] == []
    assert outside.is_file()
    assert (workspace / "datasets" / "own.toml").is_file()
    again.get(f"datasets/{own}", status=404)
    assert again.done("open_dataset", str(workspace / "datasets" / "own.toml"))["id"] == own
    again.services.close()


def test_new_files_captions_and_settings_are_noticed(desk: Desk, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "a", 1)
    dataset = desk.new(folder)
    write_clip(folder / "new.mp4")
    page = desk.until(dataset, lambda page: page["entries"][0]["items"] == 2)
    assert page["entries"][0]["missing_captions"] == 1
    (folder / "new.txt").write_text("here it is")
    desk.until(dataset, lambda page: page["entries"][0]["missing_captions"] == 0)
    path = desk.services.datasets.get(dataset).path
    path.write_text(path.read_text().replace("num_repeats = 1", "num_repeats = 3"))
    desk.until(dataset, lambda page: page["steps_per_epoch"] == 6)


def test_a_second_look_opens_only_what_changed(desk: Desk, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "a", 3)
    dataset = desk.new(folder)
    looker = desk.services.datasets.scans._task(desk.services.datasets.get(dataset))._looker
    assert looker.opened == 3
    write_clip(folder / "clip1.mp4", frames=30)
    desk.services.datasets.scans.refresh(desk.services.datasets.get(dataset))
    desk.until(dataset, lambda page: page["scanning"] is None)
    assert looker.opened == 4


def test_steps_of_an_epoch_are_rounded_up_in_each_bucket(desk: Desk, tmp_path: Path) -> None:
    for number in range(5):
        write_image(tmp_path / "a" / f"{number}.png", (600, 400) if number < 3 else (400, 600))
    dataset = desk.new(tmp_path / "a")
    revision = desk.settle(dataset)["revision"]
    for key, value in (("batch_size", 2), ("num_repeats", 3), ("bucket_no_upscale", False)):
        revision = desk.done("set_key", dataset, revision, 0, key, value)["revision"]
    page = desk.until(dataset, lambda page: page["entries"][0]["values"].get("bucket_no_upscale") is False)
    assert sorted(bucket["batches"] for bucket in page["entries"][0]["buckets"]) == [3, 5], "6 / 2 and 9 / 2"
    assert page["steps_per_epoch"] == 8
    desk.done("set_key", dataset, revision, 0, "enabled", False)
    desk.until(dataset, lambda page: page["steps_per_epoch"] == 0)


def test_pages_filters_and_search(desk: Desk, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "a", 3)
    write_image(folder / "still.png")
    (folder / "broken.mp4").write_bytes(b"junk")
    write_clip(folder / "short.mp4", frames=3)
    dataset = desk.new(folder)
    assert [item["name"] for item in desk.items(dataset, only="image")] == ["still.png"]
    assert {item["name"] for item in desk.items(dataset, only="skipped")} == {"broken.mp4"}, "3 frames set the length"
    assert {item["name"] for item in desk.items(dataset, only="no_caption")} == {"still.png", "broken.mp4", "short.mp4"}
    assert [item["name"] for item in desk.items(dataset, text="TAKE 2")] == ["clip2.mp4"]
    assert [item["name"] for item in desk.items(dataset, entry=0, offset=2, limit=2)] == ["clip1.mp4", "clip2.mp4"]
    page = desk.get(f"datasets/{dataset}/items", offset=5, limit=200)
    assert (page["total"], page["offset"], len(page["items"])) == (6, 5, 1)
    (item,) = desk.items(dataset, text="clip1")
    assert item["key"] == source_key(0, "clip1.mp4")
    assert (item["width"], item["height"], item["frames"], item["fps"]) == (64, 48, 20, 24.0)
    assert item["clips"] == [{"index": 0, "start": 0, "frames": 1, "width": 64, "height": 64}]
    assert len(desk.items(dataset, bucket="64x64x1")) == 5
    assert desk.items(dataset, bucket="64x64x99") == []
    (broken,) = desk.items(dataset, text="broken")
    assert broken["thumb"] is None
    assert str(folder) not in broken["reason"]


def test_editing_keeps_comments_and_notices_other_editors(desk: Desk, tmp_path: Path) -> None:
    """T4 of the page: an edit made elsewhere is never overwritten."""
    dataset = desk.new(clip_folder(tmp_path / "a", 1))
    path = desk.services.datasets.get(dataset).path
    revision = desk.get(f"datasets/{dataset}")["revision"]
    after = desk.done("set_key", dataset, revision, "general", "batch_size", 4)["revision"]
    assert after != revision
    assert "# Captions: a text file" in path.read_text()
    assert load_dataset_config(path).datasets[0].batch_size == 4
    path.write_text(path.read_text() + "\n# from outside\n")
    answer = desk.call("set_key", dataset, after, 0, "num_repeats", 2)
    assert answer["conflict"] is True
    assert path.read_text().endswith("# from outside\n")
    page = desk.get(f"datasets/{dataset}", revision=after)
    assert page["changed_outside"] is True
    assert desk.get(f"datasets/{dataset}", revision=page["revision"])["changed_outside"] is False
    assert desk.call("save_text", dataset, after, "x = 1")["conflict"] is True


def test_wrong_values_are_refused_and_wrong_texts_can_be_repaired(desk: Desk, tmp_path: Path) -> None:
    dataset = desk.new(clip_folder(tmp_path / "a", 1))
    path = desk.services.datasets.get(dataset).path
    before, revision = path.read_text(), desk.get(f"datasets/{dataset}")["revision"]
    answer = desk.call("set_key", dataset, revision, 0, "batch_size", 0)
    assert answer["problems"][0]["field"] == "datasets[0].batch_size"
    assert desk.call("set_key", dataset, revision, 7, "batch_size", 1)["error"]
    assert "error" in desk.call("save_text", dataset, revision, "[[datasets")
    assert path.read_text() == before
    revision = desk.done("save_text", dataset, revision, before.replace('"head"', '"tail"'))["revision"]
    page = desk.until(dataset, lambda page: page["problems"] != [])
    assert page["problems"][0]["field"] == "datasets[0].frame_extraction"
    (entry,) = page["entries"]
    assert (entry["kind"], entry["given"]["frame_extraction"], entry["values"]) == ("video", "tail", {})
    desk.done("set_key", dataset, revision, 0, "frame_extraction", "chunk")
    assert desk.until(dataset, lambda page: page["items"] == 1)["problems"] == []


def test_tables_are_added_and_removed(desk: Desk, tmp_path: Path) -> None:
    dataset = desk.new(clip_folder(tmp_path / "a", 1))
    write_image(tmp_path / "b" / "x.png")
    revision = desk.get(f"datasets/{dataset}")["revision"]
    answer = desk.done("add_entry", dataset, revision, str(tmp_path / "b"), "image")
    assert answer["index"] == 1
    page = desk.until(dataset, lambda page: len(page["entries"]) == 2)
    assert page["entries"][1]["items"] == 1
    assert "error" in desk.call("add_entry", dataset, answer["revision"], str(tmp_path / "b"), "video")
    desk.done("remove_entry", dataset, answer["revision"], 0)
    page = desk.until(dataset, lambda page: len(page["entries"]) == 1)
    assert page["entries"][0]["kind"] == "image"
    assert (tmp_path / "a" / "clip0.mp4").is_file()


def test_sources_are_left_out_and_taken_back(desk: Desk, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "a", 3)
    write_clip(folder / "odd [1]*.mp4")
    dataset = desk.new(folder)
    keys = [item["key"] for item in desk.items(dataset) if item["name"] in ("clip1.mp4", "odd [1]*.mp4")]
    desk.done("exclude", dataset, keys, True)
    page = desk.until(dataset, lambda page: page["entries"][0]["excluded"] == 2)
    assert (page["entries"][0]["sources"], page["items"]) == (2, 2)
    assert {item["name"] for item in desk.items(dataset, only="excluded")} == {"clip1.mp4", "odd [1]*.mp4"}
    assert desk.services.datasets.config(dataset).datasets[0].exclude == ("clip1.mp4", "odd [1]*.mp4")
    desk.done("exclude", dataset, keys, False)
    desk.until(dataset, lambda page: page["items"] == 4)
    assert "exclude" not in desk.services.datasets.get(dataset).path.read_text()
    revision = desk.get(f"datasets/{dataset}")["revision"]
    desk.done("set_key", dataset, revision, 0, "exclude", ["odd*"])
    desk.until(dataset, lambda page: page["entries"][0]["excluded"] == 1)
    assert "pattern" in desk.call("exclude", dataset, keys, False)["error"]


def test_jsonl_datasets_are_shown_and_their_captions_are_not_edited(desk: Desk, tmp_path: Path) -> None:
    clip_folder(tmp_path / "a", 1)
    (tmp_path / "list.jsonl").write_text('{"video_path": "a/clip0.mp4", "caption": "from the list"}\nno json\n')
    path = tmp_path / "set.json"
    table = {"video_jsonl_file": str(tmp_path / "list.jsonl"), "cache_directory": str(tmp_path / "c")}
    path.write_text(json.dumps({"datasets": [table | {"target_frames": [5]}]}))
    dataset = desk.done("open_dataset", str(path))["id"]
    page = desk.settle(dataset)
    assert page["editable"] is False
    assert "line 2" in page["problems"][0]["message"]
    (item,) = desk.items(dataset)
    assert (item["caption"], item["caption_editable"]) == ("from the list", False)
    assert "JSONL" in desk.call("set_caption", dataset, item["key"], "none", "x")["error"]
    assert "JSON" in desk.call("set_key", dataset, page["revision"], 0, "batch_size", 2)["error"]


def test_the_folder_chooser(desk: Desk, tmp_path: Path) -> None:
    clip_folder(tmp_path / "here" / "b clips", 2)
    (tmp_path / "here" / ".hidden").mkdir()
    write_image(tmp_path / "here" / "a" / "x.png")
    (tmp_path / "here" / "set.toml").write_text("")
    page = desk.get("folders", path=str(tmp_path / "here"))
    assert [(item["name"], item["images"], item["videos"]) for item in page["folders"]] == [
        ("a", 1, 0),
        ("b clips", 0, 2),
    ]
    assert (page["parent"], page["files"]) == (str(tmp_path), ["set.toml"])
    assert desk.get("folders", path="/")["parent"] is None
    assert "no folder" in desk.get("folders", status=404, path=str(tmp_path / "gone"))["error"]
    assert os.path.isdir(desk.get("folders")["path"])


def test_counting_stops(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "many" / "in").mkdir(parents=True)
    for number in range(1200):
        (tmp_path / "many" / "in" / f"{number}.png").touch()
    (row,) = desk.get("folders", path=str(tmp_path / "many"))["folders"]
    assert row["images"] == 1000


def test_closing_ends_a_look(workspace: Path, tmp_path: Path) -> None:
    desk = open_desk(workspace)
    folder = clip_folder(tmp_path / "a", 1)
    for number in range(40):
        os.link(folder / "clip0.mp4", folder / f"copy{number}.mp4")
    desk.done("new_dataset", str(folder), None)
    started = time.monotonic()
    desk.services.close()
    assert time.monotonic() - started < 8
