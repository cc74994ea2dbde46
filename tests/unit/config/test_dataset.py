"""Dataset configurations: every key, every mistake, precedence; JSON says the same as TOML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backend.config.dataset import (
    DEFAULTS,
    FOREIGN_KEYS,
    DatasetConfig,
    check_sources,
    dataset_config,
    load_dataset_config,
)
from backend.errors import Problems

VIDEO = {"video_directory": "/clips", "target_frames": [25]}
IMAGE = {"image_directory": "/stills"}


def problems_of(*tables: dict[str, Any], **top: Any) -> dict[str, str]:
    with pytest.raises(Problems) as caught:
        dataset_config({**top, "datasets": list(tables)})
    return {str(problem.field): problem.message for problem in caught.value.problems}


def notices_of(*tables: dict[str, Any], **top: Any) -> dict[str, str]:
    found = dataset_config({**top, "datasets": list(tables)}).notices
    return {str(notice.field): notice.message for notice in found}


def load(tmp_path: Path, text: str, name: str = "set.toml") -> DatasetConfig:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return load_dataset_config(path)


COMMON_VALUES = {
    "resolution": [512, 768],
    "enable_bucket": True,
    "bucket_no_upscale": True,
    "caption_extension": ".cap",
    "batch_size": 2,
    "num_repeats": 3,
    "enabled": False,
    "recursive": True,
    "caption_prefix": "sks, ",
    "caption_dropout": 0.25,
    "validation_split": 0.5,
    "exclude": ["a.mp4", "old/*"],
}


@pytest.mark.parametrize("key", COMMON_VALUES)
@pytest.mark.parametrize("source", [VIDEO, IMAGE])
def test_a_table_beats_general_and_general_beats_the_default(key: str, source: dict[str, Any]) -> None:
    def settled(table: dict[str, Any], general: dict[str, Any]) -> Any:
        return getattr(dataset_config({"general": general, "datasets": [{**source, **table}]}).datasets[0], key)

    wanted = COMMON_VALUES[key]
    wanted = tuple(wanted) if isinstance(wanted, list) else wanted
    others = {
        "resolution": [64, 64],
        "caption_extension": ".x",
        "caption_prefix": "",
        "validation_split": 0.75,
        "exclude": ["other"],
        **{name: not COMMON_VALUES[name] for name in ("enable_bucket", "bucket_no_upscale", "enabled", "recursive")},
    }
    other = others.get(key, 1)
    assert settled({}, {}) == DEFAULTS[key] != wanted
    assert settled({}, {key: COMMON_VALUES[key]}) == wanted
    assert settled({key: COMMON_VALUES[key]}, {key: other}) == wanted


def test_every_video_key_is_read() -> None:
    table = {
        **COMMON_VALUES,
        "video_jsonl_file": "/clips.jsonl",
        "cache_directory": "/cache",
        "target_frames": [45, 1, 25, 25],
        "frame_extraction": "uniform",
        "frame_stride": 7,
        "frame_sample": 4,
        "max_frames": 81,
        "source_fps": 29.97,
    }
    entry = dataset_config({"datasets": [table]}).datasets[0]
    assert (entry.kind, entry.source_directory, entry.jsonl_file) == ("video", None, Path("/clips.jsonl"))
    assert entry.cache_directory == Path("/cache")
    assert entry.target_frames == (1, 25, 45)
    assert (entry.frame_extraction, entry.frame_stride, entry.frame_sample) == ("uniform", 7, 4)
    assert (entry.max_frames, entry.source_fps, entry.resolution) == (81, 29.97, (512, 768))


@pytest.mark.parametrize("key", FOREIGN_KEYS)
@pytest.mark.parametrize("where", ["general", "datasets[0]"])
def test_keys_of_other_model_families_are_named_and_ignored(key: str, where: str) -> None:
    table = {**VIDEO, key: [1]} if where != "general" else VIDEO
    top = {"general": {key: [1]}} if where == "general" else {}
    found = notices_of(table, **top)
    assert "ignored" in found[f"{where}.{key}"]


def test_the_cache_lies_in_the_source_folder_unless_it_is_said() -> None:
    assert dataset_config({"datasets": [IMAGE]}).datasets[0].cache_directory == Path("/stills")
    found = problems_of({"image_jsonl_file": "/a.jsonl"})
    assert "is missing" in found["datasets[0].cache_directory"]


def test_cache_folders_are_unique_also_when_spelled_differently(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    first = {**VIDEO, "cache_directory": str(tmp_path / "real")}
    for spelling in (tmp_path / "real", tmp_path / "x" / ".." / "real", tmp_path / "link", f"{tmp_path}/real/"):
        found = problems_of(first, {**IMAGE, "cache_directory": str(spelling)})
        assert "also the cache of datasets[0]" in found["datasets[1].cache_directory"]
    assert "datasets[2].cache_directory" in problems_of(VIDEO, IMAGE, {**VIDEO, "enabled": False})


def test_images_and_videos_are_not_mixed() -> None:
    assert "mixes" in problems_of({**VIDEO, **IMAGE})["datasets[0]"]
    assert "two sources" in problems_of({**IMAGE, "image_jsonl_file": "/a", "cache_directory": "/c"})["datasets[0]"]
    assert "video datasets" in problems_of({**IMAGE, "source_fps": 30})["datasets[0].source_fps"]
    assert "no source" in problems_of({"resolution": 512})["datasets[0]"]


@pytest.mark.parametrize(("given", "read"), [(30, 30.0), (29.97, 29.97), ("auto", "auto")])
def test_source_fps_may_be_whole(given: Any, read: Any) -> None:
    """Other trainers refuse source_fps = 30 because it is no 30.0."""
    entry = dataset_config({"datasets": [{**VIDEO, "source_fps": given}]}).datasets[0]
    assert entry.source_fps == read
    assert type(entry.source_fps) is type(read)


def test_frames_are_rounded_down_with_a_notice() -> None:
    table = {**VIDEO, "target_frames": [24, 25, 3, 1, 48]}
    assert dataset_config({"datasets": [table]}).datasets[0].target_frames == (1, 21, 25, 45)
    message = notices_of(table)["datasets[0].target_frames"]
    assert "24 to 21" in message
    assert "48 to 45" in message
    assert "25 to" not in message


def test_things_that_are_legal_and_surprising_get_notices() -> None:
    assert "single frame" in notices_of({"video_directory": "/a"})["datasets[0].target_frames"]
    assert "head" in notices_of({**VIDEO, "frame_extraction": "uniform"})["datasets[0].frame_sample"]
    chunk = {**VIDEO, "frame_extraction": "chunk", "target_frames": [1, 25]}
    assert "every single frame" in notices_of(chunk)["datasets[0].target_frames"]
    full = {"video_directory": "/a", "frame_extraction": "full", "max_frames": 100}
    assert "97" in notices_of(full)["datasets[0].max_frames"]
    assert "496 x 512" in notices_of({**VIDEO, "resolution": [500, 512]})["datasets[0].resolution"]
    assert ".txt" in notices_of({**VIDEO, "caption_extension": "txt"})["datasets[0].caption_extension"]
    assert "kept in the file" in notices_of(VIDEO, mytool={"a": 1})["mytool"]
    assert not notices_of({**VIDEO, "resolution": [500, 512], "enable_bucket": True})


def test_sources_are_left_out_by_a_list_of_paths_and_patterns() -> None:
    for wrong in ("a.mp4", [1], [""], [["a"]], ["x" * 5000], ["a"] * 10_001):
        assert "exclude" in next(iter(problems_of({**VIDEO, "exclude": wrong})))
    assert "Did you mean exclude?" in problems_of({**VIDEO, "excludes": []})["datasets[0].excludes"]
    assert "every source" in notices_of({**VIDEO, "exclude": ["*"]})["datasets[0].exclude"]
    assert "inside the folder" in notices_of({**VIDEO, "exclude": ["/clips/a.mp4"]})["datasets[0].exclude"]
    jsonl = {"video_jsonl_file": "/a", "cache_directory": "/c", "target_frames": [25], "exclude": ["/clips/a.mp4"]}
    assert not notices_of(jsonl)
    assert not notices_of({**VIDEO, "exclude": ["a.mp4", "b?.mp4"]})


def test_all_problems_are_listed_with_table_and_key() -> None:
    found = problems_of(
        {"video_directory": "", "target_frame": [1], "batch_size": 0, "enabled": 1},
        {**IMAGE, "resolution": [512], "caption_prefix": 3, "num_repeats": 2.0},
        {**VIDEO, "frame_extraction": "heads", "source_fps": "30", "target_frames": 25},
        general={"enable_buckets": True, "target_frames": [1], "caption_dropout": 1.5},
        dataset=[],
        resolution=512,
    )
    assert "Did you mean datasets?" in found["dataset"]
    assert "[general]" in found["resolution"]
    assert "Did you mean enable_bucket?" in found["general.enable_buckets"]
    assert "[[datasets]]" in found["general.target_frames"]
    assert "at most 1" in found["general.caption_dropout"]
    assert "Did you mean target_frames?" in found["datasets[0].target_frame"]
    assert "empty" in found["datasets[0].video_directory"]
    assert "at least 1" in found["datasets[0].batch_size"]
    assert "true or false" in found["datasets[0].enabled"]
    assert "[width, height]" in found["datasets[1].resolution"]
    assert "text" in found["datasets[1].caption_prefix"]
    assert "whole number" in found["datasets[1].num_repeats"]
    assert "'head'" in found["datasets[2].frame_extraction"]
    assert "auto" in found["datasets[2].source_fps"]
    assert "list" in found["datasets[2].target_frames"]


def test_two_thousand_mistakes_are_not_all_listed() -> None:
    with pytest.raises(Problems) as caught:
        dataset_config({"datasets": [{f"key{n}": n for n in range(2000)}]})
    assert len(caught.value.problems) == 101
    assert "1901 more" in caught.value.problems[-1].message


@pytest.mark.parametrize("top", [{}, {"datasets": []}, {"datasets": {"a": 1}}, {"datasets": [1]}, {"general": {}}])
def test_no_datasets_is_a_problem(top: dict[str, Any]) -> None:
    with pytest.raises(Problems, match="datasets"):
        dataset_config(top)


@pytest.mark.parametrize("key", [*DEFAULTS, "video_directory", "cache_directory"])
@pytest.mark.parametrize(
    "value", [None, True, 5, 10**30, -1, 2.5, "x{y}", "", "\0", "\ud800", [], [[1]], [True, 2], {}, {"a": {}}], ids=repr
)
def test_any_value_of_any_type_is_read_or_answered(key: str, value: Any) -> None:
    """Wrong types everywhere, also those that only JSON has: a sentence names the key, nothing else is raised."""
    for top in ({"datasets": [{**VIDEO, key: value}]}, {"general": {key: value}, "datasets": [VIDEO]}):
        try:
            entry = dataset_config(top).datasets[0]
        except Problems as error:
            assert any(key in str(problem.field) for problem in error.problems)
            str(error).encode("utf-8")
        else:
            assert getattr(entry, "source" if key == "video_directory" else key) is not None


def test_json_says_the_same(tmp_path: Path) -> None:
    values = {"general": {"resolution": 512, "caption_prefix": "ü"}, "datasets": [VIDEO, {**IMAGE, "batch_size": 2}]}
    assert load(tmp_path, json.dumps(values), "set.JSON") == dataset_config(values)


def test_a_windows_file_is_read(tmp_path: Path) -> None:
    text = "\ufeff[general]\r\nresolution = 512\r\n[[datasets]]\r\nimage_directory = 'C:\\clips'\r\n"
    entry = load(tmp_path, text).datasets[0]
    assert (entry.resolution, str(entry.source_directory)) == ((512, 512), "C:\\clips")


def test_sources_that_are_missing_are_named_when_asked(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    tables = [
        {"image_directory": str(tmp_path / "here")},
        {"image_directory": str(tmp_path / "gone")},
        {"image_directory": str(tmp_path / "off"), "enabled": False},
        {"video_jsonl_file": str(tmp_path / "here"), "cache_directory": "/c"},
    ]
    config = dataset_config({"datasets": tables})
    fields = [problem.field for problem in check_sources(config)]
    assert fields == ["datasets[1].image_directory", "datasets[3].video_jsonl_file"]
    assert [entry.index for entry in config.enabled] == [0, 1, 3]
