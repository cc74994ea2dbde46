"""The ledger of a dataset, its reports, its index, and what prune moves and never touches."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import backend.data.ledger_index as index_module
from backend.data.cache_names import INDEX_FILE, TRASH_FOLDER, unconditional_cache_name
from backend.data.items import build_items
from backend.data.ledger import DatasetLedger, check_dataset
from backend.data.ledger_report import to_json, to_text
from backend.data.prune import prune
from backend.data.scan import scan_dataset
from backend.errors import UserError
from tests.unit.data.dataset_folder import (
    LATENTS,
    TEXT,
    add_image,
    add_video,
    cache_item,
    cache_text,
    foreign_latent,
    foreign_text,
    look_at_text,
    make_entry,
)


def _cached(folder: Path, count: int = 4, **keys: object):
    entry = make_entry(folder, **keys)
    for number in range(count):
        add_image(folder / "source" / f"{number}.png", grey=number, caption=f"picture {number}")
    _cache(entry)
    return entry


def _cache(entry, look=None) -> None:
    plan = build_items(entry, scan_dataset(entry).sources, **({} if look is None else {"look": look}))
    for item in plan.items:
        cache_item(entry, item)
    cache_text(Path(entry.cache_directory) / unconditional_cache_name(entry.kind), entry.kind, "")


def _check(entry, **keys) -> DatasetLedger:
    return check_dataset(entry, **({"latents": LATENTS, "text": TEXT} | keys))


def _states(ledger: DatasetLedger) -> tuple[dict[str, int], dict[str, int]]:
    latents, texts = ledger.latent_states, ledger.text_states
    return {key: n for key, n in latents.items() if n}, {key: n for key, n in texts.items() if n}


def test_nothing_is_cached_yet(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    add_image(tmp_path / "source" / "a.png")
    ledger = _check(entry)
    assert _states(ledger) == ({"missing": 1}, {"missing": 2})
    assert not ledger.ready
    assert not (tmp_path / "cache").exists()
    assert ledger.bytes == 0


def test_a_cached_dataset_is_valid_the_first_and_the_second_time(tmp_path: Path) -> None:
    entry = _cached(tmp_path)
    for _ in range(3):
        ledger = _check(entry)
        assert _states(ledger) == ({"valid": 4}, {"valid": 5})
        assert ledger.ready
        assert not ledger.orphans
        files = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".safetensors"]
        assert ledger.bytes == sum(path.stat().st_size for path in files)
    # Without weights the caches are compared with the dataset alone.
    assert check_dataset(entry).ready


def test_the_second_look_opens_no_file(tmp_path: Path, monkeypatch) -> None:
    entry = _cached(tmp_path)
    _check(entry)

    def refuse(*_: object) -> None:
        raise AssertionError("opened again")

    before = (tmp_path / "cache" / INDEX_FILE).stat()
    monkeypatch.setattr(index_module, "look_at", refuse)
    monkeypatch.setattr(index_module, "read_caption", refuse)
    monkeypatch.setattr(index_module, "_READERS", {"latent": refuse, "text": refuse})
    assert _check(entry).ready
    assert (tmp_path / "cache" / INDEX_FILE).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("damage", [b"", b"x", b"null", b"0" * 64 + b"\n{}"])
def test_a_damaged_index_costs_time_only(damage: bytes, tmp_path: Path) -> None:
    entry = _cached(tmp_path)
    _check(entry)
    index = tmp_path / "cache" / INDEX_FILE
    raw = index.read_bytes()
    index.write_bytes(damage or raw[:-10] + b"1" + raw[-9:])
    assert _check(entry).ready
    assert index.read_bytes() == raw


def test_exactly_what_changed_is_stale(tmp_path: Path) -> None:
    entry = _cached(tmp_path)
    _check(entry)
    source = tmp_path / "source"
    (source / "1.txt").write_text("another picture", encoding="utf-8")
    add_image(source / "2.png", grey=200, caption=None)
    status = (source / "3.png").stat()
    os.utime(source / "3.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**10))
    for _ in range(2):
        ledger = _check(entry)
        assert {row.item.source.identity: row.verdict.state for row in ledger.latents} == {
            "0.png": "valid", "1.png": "valid", "2.png": "stale", "3.png": "valid",
        }  # fmt: skip
        assert [row.verdict.reasons for row in ledger.texts if row.verdict.state == "stale"] == [("caption: changed",)]
        stale = next(row for row in ledger.latents if row.verdict.state == "stale")
        assert stale.verdict.reasons[0].startswith("source: ")
    _cache(entry)
    assert _check(entry).ready


def test_another_vae_and_another_encoder_make_everything_stale(tmp_path: Path) -> None:
    entry = _cached(tmp_path)
    ledger = _check(entry, latents=replace(LATENTS, vae="vae-2"))
    assert _states(ledger) == ({"stale": 4}, {"valid": 5})
    assert {row.verdict.reasons for row in ledger.latents} == {("VAE: was vae-1, now vae-2",)}
    ledger = _check(entry, text=replace(TEXT, max_length=128))
    assert _states(ledger) == ({"valid": 4}, {"stale": 5})
    assert _check(entry).ready


def test_a_prefix_changes_every_caption_but_the_empty_one(tmp_path: Path) -> None:
    entry = _cached(tmp_path)
    _check(entry)
    ledger = _check(make_entry(tmp_path, caption_prefix="sks"))
    assert _states(ledger) == ({"valid": 4}, {"stale": 4, "valid": 1})


def test_another_resolution_makes_a_still_stale_in_place(tmp_path: Path) -> None:
    entry = _cached(tmp_path)
    ledger = _check(make_entry(tmp_path, resolution=[128, 96]))
    assert _states(ledger) == ({"stale": 4}, {"valid": 5})
    assert ledger.latents[0].verdict.reasons == ("resolution: was 64x48, now 128x96",)
    assert not ledger.orphans
    assert _check(entry).ready


def test_another_resolution_makes_a_clip_stale_and_its_old_file_an_orphan(tmp_path: Path, monkeypatch) -> None:
    """The names of clips hold their size, so the old file can only be told by its clip."""
    monkeypatch.setattr(index_module, "look_at", look_at_text)
    entry = make_entry(tmp_path, "video")
    add_video(tmp_path / "source" / "a.mp4")
    _cache(entry, look_at_text)
    assert _check(entry).ready
    ledger = _check(make_entry(tmp_path, "video", resolution=[128, 96]))
    (row,) = ledger.latents
    assert row.verdict == ("stale", ("resolution: was 64x48, now 128x96",), False)
    assert [orphan.name for orphan in ledger.orphans] == ["a_00000-005_0064x0048_k5.safetensors"]


def test_other_frames_are_missing_and_the_old_ones_orphans(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(index_module, "look_at", look_at_text)
    entry = make_entry(tmp_path, "video")
    add_video(tmp_path / "source" / "a.mp4")
    _cache(entry, look_at_text)
    ledger = _check(make_entry(tmp_path, "video", target_frames=[9]))
    assert _states(ledger) == ({"missing": 1}, {"valid": 2})
    assert [orphan.name for orphan in ledger.orphans] == ["a_00000-005_0064x0048_k5.safetensors"]


def test_caches_of_other_tools(tmp_path: Path, monkeypatch) -> None:
    """Trap T1: the text of a video by another tool is refused, its latents are used."""
    entry = make_entry(tmp_path)
    add_image(tmp_path / "source" / "a.png", caption="words")
    foreign_latent(tmp_path / "cache" / "a_0080x0060_k5.safetensors", (1, 6, 8), None)
    foreign_text(tmp_path / "cache" / "a_k5_te.safetensors", "words")
    cache_text(tmp_path / "cache" / unconditional_cache_name("image"), "image", "")
    for _ in range(2):
        ledger = _check(entry)
        assert _states(ledger) == ({"foreign": 1}, {"foreign": 1, "valid": 1})
        assert ledger.ready
    monkeypatch.setattr(index_module, "look_at", look_at_text)
    video = tmp_path / "video"
    entry = make_entry(video, "video")
    add_video(video / "source" / "a.mp4", caption="words")
    foreign_latent(video / "cache" / "a_00000-005_0064x0048_k5.safetensors", (2, 6, 8), 5)
    foreign_text(video / "cache" / "a_k5_te.safetensors", "words")
    ledger = _check(entry)
    assert _states(ledger) == ({"foreign": 1}, {"foreign": 1, "missing": 1})
    assert ledger.latents[0].verdict.usable
    assert not ledger.texts[0].verdict.usable
    assert not ledger.ready


def test_broken_missing_and_uncaptioned(tmp_path: Path) -> None:
    entry = _cached(tmp_path, 3)
    cache = tmp_path / "cache"
    (cache / "0_0080x0060_k5.safetensors").write_bytes(b"half")
    (cache / "1_k5_te.safetensors").unlink()
    add_image(tmp_path / "source" / "plain.png", caption=None)
    (tmp_path / "source" / "2.txt").write_bytes(b"\xff\xfe")
    ledger = _check(entry)
    assert _states(ledger) == ({"valid": 2, "broken": 1, "missing": 1}, {"valid": 2, "missing": 3})
    reasons = {
        row.source.identity: row.verdict.reasons[0] for row in ledger.texts if row.source and row.verdict.reasons
    }
    assert "no caption" in reasons["plain.png"]
    assert "UTF-8" in reasons["2.png"]
    assert [source.identity for source in ledger.missing_captions] == ["plain.png"]


def test_caches_of_a_source_that_broke_are_kept(tmp_path: Path) -> None:
    entry = _cached(tmp_path, 2)
    (tmp_path / "source" / "0.png").write_bytes(b"damaged")
    ledger = _check(entry)
    assert [skipped.source.identity for skipped in ledger.skipped] == ["0.png"]
    assert ledger.held == 2
    assert not ledger.orphans
    assert prune([ledger])[0].trash is None


def test_reports_say_everything(tmp_path: Path) -> None:
    entry = _cached(tmp_path, 3)
    (tmp_path / "source" / "0.txt").write_text("new", encoding="utf-8")
    (tmp_path / "source" / "1.png").unlink()
    ledger = _check(entry)
    text = to_text([ledger])
    for part in ("Dataset 1 (image", "2 sources, 2 items", "latents: 2 valid", "texts: 2 valid, 1 stale",
                 "0_k5_te.safetensors: stale (caption: changed)", "left over",
                 "1_0080x0060_k5.safetensors"):  # fmt: skip
        assert part in text
    document = json.loads(to_json([ledger]))
    (dataset,) = document["datasets"]
    assert document["version"] == 1
    assert dataset["latents"] == {"valid": 2, "stale": 0, "foreign": 0, "broken": 0, "missing": 0}
    assert [item["cache"] for item in dataset["items"]] == ["0_0080x0060_k5.safetensors", "2_0080x0060_k5.safetensors"]
    assert dataset["items"][0]["bucket"] == [64, 48]
    assert [row["state"] for row in dataset["captions"]] == ["stale", "valid", "valid"]
    assert {orphan["name"] for orphan in dataset["orphans"]} == {"1_0080x0060_k5.safetensors", "1_k5_te.safetensors"}
    short = json.loads(to_json([ledger], every_item=False))["datasets"][0]
    assert (len(short["items"]), len(short["captions"])) == (0, 1)


def test_a_report_shows_names_of_any_kind_in_one_line(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    add_image(tmp_path / "source" / "two\nlines \x1b[31m.png", caption=None)
    (tmp_path / "source" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    text = to_text([_check(entry)])
    assert "\x1b" not in text
    assert "two?lines" in text
    text.encode("utf-8")
    json.loads(to_json([_check(entry)]).encode("utf-8"))


# --- prune --------------------------------------------------------------------------------------------------------


def _tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != INDEX_FILE
    }


def test_prune_moves_orphans_to_the_trash_and_touches_nothing_else(tmp_path: Path) -> None:
    """Other tools delete every cache that the current run did not see."""
    # Sources, captions and caches share one folder, with files of people beside them.
    entry = _cached(tmp_path, 3, cache_directory=str(tmp_path / "source"))
    folder = tmp_path / "source"
    for name in ("my_lora.safetensors", "notes_k5.txt", "x_k5.safetensors", ".hidden_k5_te.safetensors", "a_wan.json"):
        (folder / name).write_bytes(b"mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "9_0080x0060_k5.safetensors").write_bytes(b"mine")
    (folder / "link_0080x0060_k5.safetensors").symlink_to(folder / "my_lora.safetensors")
    (folder / "0.png").unlink()
    old = folder / ".clip.0123abcd.tmp.safetensors"
    fresh = folder / ".clip.0123abce.tmp.safetensors"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    before = _tree(tmp_path)
    ledger = _check(entry)
    (result,) = prune([ledger])
    expected = {"0_0080x0060_k5.safetensors", "0_k5_te.safetensors", old.name}
    assert set(result.moved) == expected
    assert set(result.left) == {fresh.name, "link_0080x0060_k5.safetensors"}
    assert result.trash is not None
    assert result.trash.parent == folder / TRASH_FOLDER
    after = _tree(tmp_path)
    moved = {str((result.trash / name).relative_to(tmp_path)): before[f"source/{name}"] for name in expected}
    assert after == {key: value for key, value in before.items() if key[7:] not in expected} | moved
    assert result.bytes == sum(len(content) for content, _ in moved.values())
    again = _check(entry)
    assert prune([again])[0].trash is None
    assert again.ready


def test_an_orphan_that_changed_since_the_check_stays(tmp_path: Path) -> None:
    entry = _cached(tmp_path, 2)
    (tmp_path / "source" / "0.png").unlink()
    ledger = _check(entry)
    (tmp_path / "cache" / "0_k5_te.safetensors").write_bytes(b"somebody is at work here")
    (tmp_path / "cache" / "0_0080x0060_k5.safetensors").unlink()
    (result,) = prune([ledger])
    assert not result.moved
    assert len(result.left) == 2


def test_prune_refuses_when_it_cannot_know(tmp_path: Path) -> None:
    """An empty mount point, a list with a bad line, two datasets with one cache folder."""
    entry = _cached(tmp_path, 2)
    good = _check(entry)
    with pytest.raises(UserError, match="share the cache folder"):
        prune([good, good])
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    ledger = _check(entry)
    assert len(ledger.orphans) == 4
    with pytest.raises(UserError, match="no sources"):
        prune([ledger])
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text('{"image_path": "gone.png", "caption": ""}\n', encoding="utf-8")
    ledger = _check(make_entry(tmp_path, jsonl=jsonl))
    with pytest.raises(UserError, match="line 1"):
        prune([ledger])
    assert len(list((tmp_path / "cache").glob("[!.]*.safetensors"))) == 4
    (tmp_path / "source").rmdir()
    with pytest.raises(UserError, match="does not exist"):
        _check(entry)


def test_caches_of_sources_that_are_left_out_are_left_over(tmp_path: Path) -> None:
    entry = _cached(tmp_path, 3)
    ledger = _check(make_entry(tmp_path, exclude=["1.png"]))
    assert (ledger.sources, ledger.excluded, len(ledger.latents)) == (2, 1, 2)
    assert {orphan.name for orphan in ledger.orphans} == {"1_0080x0060_k5.safetensors", "1_k5_te.safetensors"}
    assert {orphan.why for orphan in ledger.orphans} == {"no item"}
    assert ledger.ready
    assert "2 sources and 1 left out" in to_text([ledger])
    assert json.loads(to_json([ledger]))["datasets"][0]["excluded"] == 1
    assert _check(entry).excluded == 0


def test_stretched_caches_of_one_bucket_and_another_crop_are_stale(tmp_path: Path) -> None:
    """For NABLA: the size before the stretch decides about the pixels, and the name of the file does not hold it."""
    recipe = replace(LATENTS, nabla="stretch")
    add_image(tmp_path / "source" / "0.png")
    entry = make_entry(tmp_path, resolution=[96, 144])
    for item in build_items(entry, scan_dataset(entry).sources, nabla="stretch").items:
        cache_item(entry, item, recipe)
    cache_text(tmp_path / "cache" / unconditional_cache_name("image"), "image", "")
    assert check_dataset(entry, latents=recipe, text=TEXT).ready
    other = make_entry(tmp_path, resolution=[112, 144])
    (row,) = check_dataset(other, latents=recipe, text=TEXT).latents
    assert (row.item.bucket.width, row.item.bucket.height) == (128, 256)
    assert row.verdict.state == "stale"
    assert row.verdict.reasons == ("resize: was crop to 96x144, stretch, now crop to 112x144, stretch",)
