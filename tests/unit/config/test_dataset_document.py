"""A configuration is edited as a document: comments, order, unknown tables and outside edits survive."""

from __future__ import annotations

import json
import os
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
import toml

from backend.config.dataset import dataset_config, load_dataset_config
from backend.config.dataset_document import DatasetDocument
from backend.errors import UserError

TEXT = """# my clips
[general]
resolution = 512 # square
caption_extension = ".txt"

# first set
[[datasets]]
video_directory = "/clips" # on the fast disk
target_frames = [
  1, # a still
  25,
]
batch_size = 1

# second set
[[datasets]]
image_directory = '/stills'

[datasets.notes]
who = "me"

# of another tool
[mytool]
colour = "red" # keep
when = 1979-05-27
"""


def document(tmp_path: Path, text: str = TEXT) -> DatasetDocument:
    path = tmp_path / "set.toml"
    path.write_bytes(text.encode("utf-8"))
    return DatasetDocument.open(path)


def comments(text: str) -> list[str]:
    return [line[line.index("#") :] for line in text.splitlines() if "#" in line]


def test_comments_and_unknown_tables_survive_edits(tmp_path: Path) -> None:
    opened = document(tmp_path)
    opened.set("general", "resolution", [768, 512])
    opened.set("general", "enable_bucket", True)
    opened.set(0, "video_directory", "/other")
    opened.set(0, "frame_extraction", "chunk")
    opened.set(1, "num_repeats", 4)
    opened.remove(0, "batch_size")
    opened.remove(0, "never_there")
    assert comments(opened.text) == comments(TEXT)
    assert opened.text.index("frame_extraction") < opened.text.index("# second set") < opened.text.index("num_repeats")
    assert opened.text.index("num_repeats") < opened.text.index("[datasets.notes]")
    opened.save()
    found = tomllib.loads((tmp_path / "set.toml").read_text("utf-8"))
    assert found["mytool"] == tomllib.loads(TEXT)["mytool"]
    assert found["general"] == {"resolution": [768, 512], "caption_extension": ".txt", "enable_bucket": True}
    assert found["datasets"] == [
        {"video_directory": "/other", "target_frames": [1, 25], "frame_extraction": "chunk"},
        {"image_directory": "/stills", "num_repeats": 4, "notes": {"who": "me"}},
    ]


def test_setting_what_is_there_changes_no_byte(tmp_path: Path) -> None:
    opened = document(tmp_path)
    opened.set(0, "target_frames", [1, 25])
    opened.set("general", "resolution", 512)
    assert opened.text == TEXT


def test_removing_and_adding_tables_leaves_the_comments_of_the_others(tmp_path: Path) -> None:
    opened = document(tmp_path)
    assert opened.add_dataset({"image_directory": "/new", "resolution": [512, 256]}) == 2
    opened.remove_dataset(0)
    assert "# second set\n[[datasets]]\nimage_directory = '/stills'" in opened.text
    assert [table["image_directory"] for table in opened.datasets] == ["/stills", "/new"]
    opened.remove_dataset(0)
    assert "# of another tool\n[mytool]" in opened.text
    opened.remove_dataset(0)
    assert opened.datasets == []
    assert opened.values["mytool"]["colour"] == "red"
    assert opened.add_dataset({"image_directory": "/last"}) == 0


def test_sources_are_left_out_and_taken_back(tmp_path: Path) -> None:
    """What the page writes: the whole list anew, paths of any letters."""
    opened = document(tmp_path)
    for paths in (["a [1].mp4", "sub/é 'x\".mp4"], ["a [1].mp4"], []):
        opened.set(0, "exclude", paths)
        assert opened.save() == []
        assert DatasetDocument.open(opened.path).datasets[0]["exclude"] == paths
        assert comments(opened.text) == comments(TEXT)
    opened.remove(0, "exclude")
    assert opened.datasets == document(tmp_path).datasets


def test_a_change_made_outside_is_noticed(tmp_path: Path) -> None:
    opened = document(tmp_path)
    opened.set(0, "batch_size", 2)
    assert not opened.changed_outside()
    opened.path.write_text(TEXT + "# by hand\n", "utf-8")
    assert opened.changed_outside()
    with pytest.raises(UserError, match="changed by another program"):
        opened.save()
    assert opened.path.read_text("utf-8") == TEXT + "# by hand\n"
    opened.path.unlink()
    with pytest.raises(UserError, match="changed by another program"):
        opened.save()
    again = document(tmp_path)
    again.set(0, "batch_size", 3)
    again.save()
    again.set(0, "batch_size", 4)
    again.save()
    assert DatasetDocument.open(again.path).datasets[0]["batch_size"] == 4


def test_a_new_file_does_not_replace_one_that_came_meanwhile(tmp_path: Path) -> None:
    new = DatasetDocument.new(tmp_path / "new.toml")
    new.set("general", "resolution", 512)
    new.add_dataset({"video_directory": "/a", "target_frames": [25]})
    new.save()
    assert load_dataset_config(new.path) == new.config()
    other = DatasetDocument.new(tmp_path / "new.toml")
    with pytest.raises(UserError):
        other.save()
    with pytest.raises(UserError, match=r"\.toml"):
        DatasetDocument.new(tmp_path / "new.json")


@pytest.mark.parametrize(
    "text",
    [
        "datasets = [{ image_directory = '/a' }] # list\n",
        "general.resolution = 512\ndatasets = [{ image_directory = '/a', batch_size = 1 }]\n",
        "[[datasets]]\nimage_directory = '''\n[[datasets]]\n'''\nbatch_size = 1 # one\n[[datasets]]\nx = 1",
        "general = { resolution = 64 }\n[[datasets]]\nimage_directory = '/a'\n[tool]\n[[datasets]]\nbatch_size = 1",
        TEXT.replace("\n", "\r\n"),
    ],
)
def test_other_ways_of_writing_are_edited_rightly_or_refused(text: str, tmp_path: Path) -> None:
    opened = document(tmp_path, text)
    wanted = opened.values
    for place, key, value in (("general", "resolution", 96), (0, "batch_size", 3), (0, "num_repeats", 2)):
        before = opened.text
        try:
            opened.set(place, key, value)
            (wanted.setdefault("general", {}) if place == "general" else wanted["datasets"][0])[key] = value
        except UserError:
            assert opened.text == before
    try:
        opened.add_dataset({"image_directory": "/new"})
        wanted["datasets"].append({"image_directory": "/new"})
    except UserError:
        pass
    opened.save()
    assert tomllib.loads(opened.path.read_bytes().decode("utf-8")) == wanted
    assert comments(opened.text) == comments(text)


def test_mistakes_get_sentences_and_change_nothing(tmp_path: Path) -> None:
    opened = document(tmp_path)
    for place, key, value in (
        (2, "batch_size", 1),
        (-1, "batch_size", 1),
        (True, "batch_size", 1),
        (0, "a.b", 1),
        (0, "a", "x\0"),
        (0, "a", "\ud800"),
        (0, "a", 10**40),
        (0, "a", float("nan")),
        (0, "a", None),
    ):
        with pytest.raises(UserError):
            opened.set(place, key, value)  # type: ignore[arg-type]
    for text in ("a = ", "a = 1\na = 2", "x" * 30_000, "\ud800", "\0"):
        with pytest.raises(UserError):
            opened.replace_text(text)
    assert opened.text == TEXT
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="JSON"):
        DatasetDocument.open(tmp_path / "a.json")


ALPHABET = "abcXYZ019 ,.:;#'\"\\[]{}=/-_\n\t éж漢😀\u2028\x7f"


def random_text(chooser: random.Random) -> str:
    return "".join(chooser.choice(ALPHABET) for _ in range(chooser.randint(1, 12))) + "x"


def random_values(chooser: random.Random, index: int) -> dict[str, Any]:
    kind = chooser.choice(["image", "video"])
    source = chooser.choice(["directory", "jsonl_file"])
    table: dict[str, Any] = {f"{kind}_{source}": f"/d{index}/" + random_text(chooser).replace("/", "")}
    table["cache_directory"] = f"/c{index}/" + random_text(chooser).replace("/", "")
    table.update(random_common(chooser))
    video = {
        "target_frames": [chooser.randint(1, 200) for _ in range(chooser.randint(1, 4))],
        "frame_extraction": chooser.choice(["head", "chunk", "slide", "uniform", "full"]),
        "frame_stride": chooser.randint(1, 50),
        "frame_sample": chooser.randint(1, 9),
        "max_frames": chooser.randint(1, 200),
        "source_fps": chooser.choice([30, 29.97, 24.0, "auto"]),
    }
    return {**table, **{k: v for k, v in video.items() if kind == "video" and chooser.random() < 0.6}}


def random_common(chooser: random.Random) -> dict[str, Any]:
    side = [chooser.randint(32, 2000) for _ in range(2)]
    values = {
        "resolution": chooser.choice([side, side[0]]),
        "enable_bucket": chooser.random() < 0.5,
        "bucket_no_upscale": chooser.random() < 0.5,
        "caption_extension": chooser.choice([".txt", ".caption", "_c.txt"]),
        "batch_size": chooser.randint(1, 8),
        "num_repeats": chooser.randint(1, 20),
        "enabled": chooser.random() < 0.8,
        "recursive": chooser.random() < 0.5,
        "caption_prefix": random_text(chooser),
        "caption_dropout": chooser.random(),
        "validation_split": chooser.choice([0, 0.1, 0.5]),
        "exclude": [random_text(chooser) for _ in range(chooser.randint(0, 3))],
    }
    return {key: value for key, value in values.items() if chooser.random() < 0.4}


def same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_a_thousand_random_configurations_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TOML, as JSON, and in the TOML reader of other trainers, which misreads what is written carelessly."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # Thousands of them would only measure the disk.
    chooser = random.Random(6)
    misread = 0
    for number in range(1000):
        values: dict[str, Any] = {"general": random_common(chooser)} if chooser.random() < 0.6 else {}
        values["datasets"] = [random_values(chooser, index) for index in range(chooser.randint(1, 2))]
        if not values.get("general"):
            values.pop("general", None)
        path = tmp_path / f"{number}.toml"
        made = DatasetDocument.new(path)
        for key, value in values.get("general", {}).items():
            made.set("general", key, value)
        for table in values["datasets"]:
            made.add_dataset(table)
        notices = made.save()
        assert same(DatasetDocument.open(path).values, values)
        wanted = dataset_config(values)
        assert load_dataset_config(path) == wanted
        as_json = tmp_path / "set.json"
        as_json.write_text(json.dumps(values), "utf-8")
        assert load_dataset_config(as_json) == wanted
        misread += bool(notices)
        assert notices or same(toml.loads(path.read_text("utf-8")), values)
        path.unlink()
    assert misread <= 10


def test_texts_that_the_other_reader_misreads_are_written_in_another_form(tmp_path: Path) -> None:
    opened = document(tmp_path)
    for text in ('"', '""', '\\"', 'it\'s "x"', "C:\\new\\[x]#", "a\\", "'''", "#", '"""'):
        opened.set(0, "caption_prefix", text)
        assert opened.save() == []
        assert toml.loads(opened.path.read_text("utf-8"))["datasets"][0]["caption_prefix"] == text


def test_what_the_other_reader_cannot_read_at_all_is_told(tmp_path: Path) -> None:
    opened = document(tmp_path, '[[datasets]]\nimage_directory = "/a"\ncaption_prefix = "\\""\n[x]\nt = 07:32:00\n')
    fields = [notice.field for notice in opened.notices()]
    assert fields
    opened.save()
