"""Finding sources: which files, which captions, which cache keys, and everything that is wrong said at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from backend.data.cache_names import latent_cache_name, text_cache_name, unique_keys
from backend.data.scan import join_caption, read_caption, scan_dataset
from backend.errors import UserError
from tests.unit.data.dataset_folder import make_entry


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_media_of_any_letter_case_with_their_captions_in_order(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    source = tmp_path / "source"
    _touch(*(source / name for name in ("b.Jpg", "a.PNG", "c.webp", "d.avif", "e.mp4", "notes.md", "x.bmp.part")))
    _touch(source / "b.txt", source / "c.txt", source / "sub" / "f.png")
    scan = scan_dataset(entry)
    assert [item.identity for item in scan.sources] == ["a.PNG", "b.Jpg", "c.webp", "d.avif"]
    assert [item.name for item in scan.sources] == ["a", "b", "c", "d"]
    assert [item.path for item in scan.sources] == [source / item.identity for item in scan.sources]
    assert [item.caption_path for item in scan.sources] == [None, source / "b.txt", source / "c.txt", None]
    assert scan.missing_captions == [scan.sources[0], scan.sources[3]]
    assert not scan.problems


def test_only_videos_in_a_video_dataset(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "video")
    _touch(*(tmp_path / "source" / name for name in ("b.MKV", "a.mp4", "c.png", "d.gif")))
    assert [item.identity for item in scan_dataset(entry).sources] == ["a.mp4", "b.MKV"]
    assert {item.kind for item in scan_dataset(entry).sources} == {"video"}


def test_hidden_files_folders_called_like_media_and_broken_links_are_left_out(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, recursive=True)
    source = tmp_path / "source"
    _touch(source / "._a.png", source / ".hidden" / "b.png", source / "folder.png" / "c.png", source / "d.png")
    (source / "gone.png").symlink_to(source / "nothing.png")
    assert [item.identity for item in scan_dataset(entry).sources] == ["d.png", "folder.png/c.png"]


def test_recursive_finds_subfolders_each_with_its_own_captions(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _touch(source / "a.png", source / "x" / "a.png", source / "x" / "y.z" / "a.png", source / "w" / "b.png")
    _touch(source / "x" / "a.txt", source / "b.txt")
    flat = scan_dataset(make_entry(tmp_path))
    assert [item.identity for item in flat.sources] == ["a.png"]
    scan = scan_dataset(make_entry(tmp_path, recursive=True))
    assert [item.identity for item in scan.sources] == ["a.png", "w/b.png", "x/a.png", "x/y.z/a.png"]
    assert [item.has_caption for item in scan.sources] == [False, False, True, False]
    keys = [item.name for item in scan.sources]
    assert keys[:2] == ["a", "b"]
    assert len(set(keys)) == 4
    assert all(key.startswith("a-") for key in keys[2:])


def test_a_circle_of_links_ends_and_the_cache_folder_is_no_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _touch(source / "a.png", source / "cache" / "debug.png", source / "sub" / "b.png")
    (source / "sub" / "round").symlink_to(source, target_is_directory=True)
    entry = make_entry(tmp_path, recursive=True, cache_directory=str(source / "cache"))
    assert [item.identity for item in scan_dataset(entry).sources] == ["a.png", "sub/b.png"]


def test_left_out_sources_are_listed_apart_and_rename_nothing(tmp_path: Path) -> None:
    """A path with brackets means that file alone; patterns go over folders; cache names stay as they were."""
    source = tmp_path / "source"
    _touch(*(source / name for name in ("a.jpg", "a.png", "a 1.png", "a [1].png", "b.png", "old/c.png", "old/x/d.png")))
    whole = {item.identity: item for item in scan_dataset(make_entry(tmp_path, recursive=True)).sources}

    def left_out(*exclude: str) -> set[str]:
        scan = scan_dataset(make_entry(tmp_path, recursive=True, exclude=list(exclude)))
        assert all(item == whole[item.identity] for item in (*scan.sources, *scan.excluded))
        assert sorted(item.identity for item in (*scan.sources, *scan.excluded)) == sorted(whole)
        assert not {item.identity for item in scan.missing_captions} & {item.identity for item in scan.excluded}
        assert scan.missing_captions == scan.sources
        return {item.identity for item in scan.excluded}

    assert left_out() == set()
    assert left_out("a.jpg", "gone.png") == {"a.jpg"}
    assert left_out("a [1].png") == {"a [1].png"}
    assert left_out("a [12].png") == {"a 1.png"}
    assert left_out("old/*", "?.jpg") == {"old/c.png", "old/x/d.png", "a.jpg"}
    assert left_out("A.jpg") == set()
    assert left_out("*") == set(whole)


def test_left_out_lines_of_a_jsonl_file(tmp_path: Path) -> None:
    _touch(tmp_path / "m" / "a.png", tmp_path / "m" / "b.png")
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text("".join(f'{{"image_path": "m/{name}.png", "caption": "x"}}\n' for name in "ab"))
    scan = scan_dataset(make_entry(tmp_path, jsonl=jsonl, exclude=["m/a.png"]))
    assert [item.identity for item in scan.sources] == ["m/b.png"]
    assert [item.identity for item in scan.excluded] == ["m/a.png"]


def test_same_stems_never_share_a_name_and_the_first_keeps_the_plain_one(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    source = tmp_path / "source"
    _touch(source / "a.jpg", source / "a.png", source / "a.webp", source / "A.bmp")
    before = {item.identity: item.name for item in scan_dataset(entry).sources}
    assert len({name.casefold() for name in before.values()}) == 4
    assert before["A.bmp"] == "A"
    # Those with a hash keep it whatever is added or removed beside them.
    _touch(source / "z.png", source / "b.png")
    (source / "a.webp").unlink()
    after = {item.identity: item.name for item in scan_dataset(entry).sources}
    assert after["a.png"] == before["a.png"]


def test_keys_are_unique_for_hostile_stems() -> None:
    """Stems that are another one's hash, that differ by accents only, hidden, empty, and one identity twice."""
    hashed = unique_keys([("a", "1"), ("a", "2")])[1]
    pairs = [("a", "1"), ("a", "2"), (hashed, "3"), ("a", "2"), (".a", "4"), ("", "5"), ("e\u0301", "6"), ("\xe9", "7")]
    pairs += [("straße", "8"), ("STRASSE", "9"), ("\udcff", "10")]
    keys = unique_keys(pairs)
    assert len({key.casefold() for key in keys}) == len(pairs)
    assert keys[0] == "a"
    assert keys[2] == hashed
    assert keys[6] == "e\u0301"
    assert not any(key.startswith(".") or not key for key in keys)
    for key in keys:
        key.encode("utf-8")


@pytest.mark.parametrize("letter", ["a", "ж", "🎬"])
def test_long_names_fit_into_a_file_name(letter: str, tmp_path: Path) -> None:
    size = len(letter.encode())
    stems = [letter * (count // size) for count in (180, 213, 214, 240, 251)]
    keys = unique_keys((stem, stem) for stem in stems)
    assert len(set(keys)) == len(keys)
    for key in keys:
        for name in (latent_cache_name(key, 12345, 12345, 1234567, 12345), text_cache_name(key)):
            assert len(name.encode()) <= 255
            (tmp_path / name).write_bytes(b"")
    assert keys[0] == stems[0]
    assert keys[-1] != stems[-1]


@pytest.mark.parametrize(
    "stem", ["кино 映画", "a [1] (2)", " two  spaces ", "100%_off", "line\nbreak", "a.b.c", "'\"$`"]
)
def test_odd_names_are_found_with_their_captions(stem: str, tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    _touch(tmp_path / "source" / f"{stem}.png")
    (tmp_path / "source" / f"{stem}.txt").write_text(" words \n", encoding="utf-8")
    (found,) = scan_dataset(entry).sources
    assert found.name == stem
    assert found.path.read_bytes() == b"x"
    assert read_caption(found) == "words"


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    name = os.fsdecode(b"caf\xe9.png")
    try:
        _touch(tmp_path / "source" / name)
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    (found,) = scan_dataset(entry).sources
    assert found.path.read_bytes() == b"x"
    found.name.encode("utf-8")


def test_the_missing_folder_is_named_with_its_key(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    (tmp_path / "source").rmdir()
    with pytest.raises(UserError) as caught:
        scan_dataset(entry)
    assert caught.value.field == "datasets[0].image_directory"
    assert str(tmp_path / "source") in caught.value.message


def test_captions_are_read_as_written(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    source = tmp_path / "source"
    for name, raw in {
        "a": b"\xef\xbb\xbf  with a mark \r\n",
        "b": b"",
        "c": b"caf\xe9",
        "d": b"x" * (1 << 20) + b"y",
        "e": "две\nстроки".encode(),
    }.items():
        _touch(source / f"{name}.png")
        (source / f"{name}.txt").write_bytes(raw)
    a, b, c, d, e = scan_dataset(entry).sources
    assert read_caption(a, " trigger ") == "trigger with a mark"
    assert read_caption(b) == ""
    assert read_caption(b, "trigger") == "trigger"
    assert read_caption(e) == "две\nстроки"
    for source_item, word in ((c, "UTF-8"), (d, "1 MB")):
        with pytest.raises(UserError, match=word):
            read_caption(source_item)
    with pytest.raises(UserError, match="has no caption"):
        read_caption(a._replace(caption_location=None))


def test_join_caption() -> None:
    assert join_caption("", " a ") == "a"
    assert join_caption("sks", "a") == "sks a"
    assert join_caption("sks ", "") == "sks"


def test_jsonl_lines_with_relative_absolute_and_repeated_paths(tmp_path: Path, monkeypatch) -> None:
    media = tmp_path / "lists" / "media"
    elsewhere = tmp_path / "elsewhere"
    _touch(media / "b.png", media / "a.png", elsewhere / "a.png", elsewhere / "only_here.png")
    monkeypatch.chdir(elsewhere)
    lines = [
        {"image_path": "media/b.png", "caption": "b"},
        {"image_path": str(elsewhere / "a.png"), "caption": " first a "},
        {"image_path": "media/a.png", "caption": "second a", "control_path": "ignored"},
        {"image_path": "only_here.png", "caption": ""},
        {"image_path": "media/b.png", "caption": "b again"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    jsonl = tmp_path / "lists" / "list.jsonl"
    jsonl.write_text(text, encoding="utf-8")
    scan = scan_dataset(make_entry(tmp_path, jsonl=jsonl))
    assert not scan.problems
    assert [item.path for item in scan.sources] == [
        media / "b.png", elsewhere / "a.png", media / "a.png", elsewhere / "only_here.png", media / "b.png",
    ]  # fmt: skip
    assert [read_caption(item) for item in scan.sources] == ["b", "first a", "second a", "", "b again"]
    names = [item.name for item in scan.sources]
    assert names[:2] == ["b", "a"]
    assert names[3] == "only_here"
    assert len(set(names)) == 5
    assert not scan.missing_captions


def test_all_bad_lines_are_listed_with_their_numbers(tmp_path: Path) -> None:
    _touch(tmp_path / "a.png")
    jsonl = tmp_path / "list.jsonl"
    lines: list[tuple[bytes, str | None]] = [
        (b'{"image_path": "a.png", "caption": "fine"}', None),
        (b"{not json", "is not JSON"),
        (b"[1, 2]", "is not a table"),
        (b'{"caption": "no path"}', "has no image_path"),
        (b'{"video_path": "a.mp4", "caption": "x"}', "this is a dataset of images"),
        (b'{"image_path": 7, "caption": "x"}', "has no image_path"),
        (b'{"image_path": "gone.png", "caption": "x"}', "gone.png does not exist"),
        (b'{"image_path": "a.png", "caption": 5}', "caption is not text but 5"),
        (b'{"image_path": "caf\xe9.png"}', "is not UTF-8"),
        (b'{"image_path": "a\\u0000.png", "caption": "x"}', "is not a path"),
        (b'{"image_path": "a.png", "caption": "\\ud800"}', "broken character"),
        (b"   ", None),
        (b'{"image_path": "a.png"}', None),
        (b"[" * 100_000, "is not JSON"),
        (b'{"image_path": "a.png", "caption": "' + b"x" * (5 << 20) + b'"}', "longer than 4 MB"),
        (b'{"image_path": "a.png", "caption": "last"}', None),
    ]
    jsonl.write_bytes(b"\n".join(line for line, _ in lines))
    scan = scan_dataset(make_entry(tmp_path, jsonl=jsonl))
    expected = {number: text for number, (_, text) in enumerate(lines, 1) if text}
    assert len(scan.problems) == len(expected)
    for problem, (number, text) in zip(scan.problems, expected.items(), strict=True):
        assert problem.field == "datasets[0].image_jsonl_file"
        assert problem.message.startswith(f"line {number}: ")
        assert text in problem.message
        assert len(problem.message) < 700
    assert [item.caption for item in scan.sources] == ["fine", None, "last"]
    assert scan.missing_captions == [scan.sources[1]]


def test_a_folder_of_frames_is_a_video_in_jsonl_only(tmp_path: Path) -> None:
    _touch(tmp_path / "shots" / "one.v2" / "0001.png", tmp_path / "clip.mp4")
    jsonl = tmp_path / "list.jsonl"
    lines = [{"video_path": "shots/one.v2/", "caption": "x"}, {"video_path": "clip.mp4", "caption": "y"}]
    jsonl.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    scan = scan_dataset(make_entry(tmp_path, "video", jsonl=jsonl))
    assert [item.name for item in scan.sources] == ["one", "clip"]
    assert not scan.problems


def test_a_missing_jsonl_file(tmp_path: Path) -> None:
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text("", encoding="utf-8")
    entry = make_entry(tmp_path, jsonl=jsonl)
    jsonl.unlink()
    with pytest.raises(UserError, match=r"list\.jsonl cannot be read"):
        scan_dataset(entry)
