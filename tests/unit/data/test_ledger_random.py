"""Random changes of a dataset: a ledger that remembers says exactly what one says that reads everything."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import backend.data.ledger_index as index_module
from backend.data.cache_names import INDEX_FILE, SEAL_FILE, unconditional_cache_name
from backend.data.columns import pack_tables, unpack_tables
from backend.data.items import build_items
from backend.data.ledger import DatasetLedger, check_dataset
from backend.data.ledger_seal import ValidRows
from backend.data.scan import scan_dataset
from backend.data.stamps import stamp_of, stamps_of
from tests.unit.data.dataset_folder import LATENTS, TEXT, add_video, cache_item, cache_text, look_at_text, make_entry

SEQUENCES, CHANGES = 200, 5
# What a check remembers for the next one.
MEMORY = (INDEX_FILE, SEAL_FILE)


class _World:
    """One dataset of clips and everything that may happen to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.entry = make_entry(folder, "video")
        self.latents, self.text = LATENTS, TEXT
        self.times: set[int] = set()
        for number in range(3):
            add_video(folder / "source" / f"{number}.mp4", caption=f"clip {number}")
        self.cache_all()

    def pick(self, pattern: str) -> Path | None:
        found = sorted(path for path in self.folder.glob(pattern) if path.name not in MEMORY)
        return self.random.choice(found) if found else None

    def settle(self) -> None:
        """Give what was written a time of its own: two changes within one tick of the clock have the same one."""
        for path in self.folder.glob("*/*"):
            if path.name not in MEMORY and path.stat().st_mtime_ns not in self.times:
                self.times.add(10**18 + len(self.times))
                os.utime(path, ns=(1, 10**18 + len(self.times) - 1))

    def cache_all(self) -> None:
        self.settle()
        for item in build_items(self.entry, scan_dataset(self.entry).sources, look=look_at_text).items:
            cache_item(self.entry, item, self.latents, self.text)
        empty = Path(self.entry.cache_directory) / unconditional_cache_name("video")
        cache_text(empty, "video", "", self.text)

    def edit_caption(self) -> None:
        path = self.pick("source/*.txt")
        if path is not None:
            path.write_text(f"caption {self.random.randrange(3)}", encoding="utf-8")

    def touch(self) -> None:
        path = self.pick("source/*")
        if path is not None:
            os.utime(path, ns=(1, self.random.randrange(1, 10**18)))

    def change_content(self) -> None:
        path = self.pick("source/*.mp4")
        if path is not None:
            path.write_text(self.random.choice(["80 60 9 24", "80 60 8 24", "90 60 13 24", "80 60 3 24"]))

    def delete(self) -> None:
        path = self.pick(self.random.choice(["cache/*.safetensors", "source/*"]))
        if path is not None:
            path.unlink()

    def damage(self) -> None:
        path = self.pick("cache/*.safetensors")
        if path is not None:
            path.write_bytes(path.read_bytes()[: self.random.randrange(200)])

    def swap(self) -> None:
        """Another cache of the same size under this name."""
        first, second = self.pick("cache/*.safetensors"), self.pick("cache/*.safetensors")
        if first is not None and second is not None and first != second:
            shutil.copyfile(first, second)

    def add(self) -> None:
        caption = self.random.choice([None, "new"])
        add_video(self.folder / "source" / f"new{self.random.randrange(4)}.mp4", caption=caption)

    def change_settings(self) -> None:
        keys = {
            "resolution": self.random.choice([[64, 48], [128, 96]]),
            "target_frames": self.random.choice([[5], [5, 9]]),
        }
        prefix = self.random.choice([{}, {"caption_prefix": "sks"}])
        self.entry = make_entry(self.folder, "video", **keys, **prefix)

    def change_recipe(self) -> None:
        self.latents = replace(LATENTS, vae=self.random.choice(["vae-1", "vae-2"]))
        self.text = replace(TEXT, max_length=self.random.choice([None, 128]))

    def damage_index(self) -> None:
        index = self.folder / "cache" / INDEX_FILE
        if index.exists():
            raw = bytearray(index.read_bytes())
            raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
            index.write_bytes(raw[: self.random.choice([len(raw), self.random.randrange(len(raw))])])

    def damage_seal(self) -> None:
        seal = self.folder / "cache" / SEAL_FILE
        if seal.exists():
            raw = seal.read_bytes()
            kinds = [raw[: self.random.randrange(len(raw))], b"[]", b"{}", b'{"names": 1}', raw.replace(b"5", b"-5")]
            seal.write_bytes(self.random.choice(kinds))

    def check(self) -> DatasetLedger:
        return check_dataset(self.entry, latents=self.latents, text=self.text)

    @property
    def changes(self) -> list[Callable[[], None]]:
        once = [
            self.cache_all,
            self.damage_index,
            self.damage_seal,
            self.change_settings,
            self.change_recipe,
            self.swap,
        ]
        return [*once, *2 * [self.edit_caption, self.touch, self.change_content, self.delete, self.damage, self.add]]


def test_a_ledger_that_remembers_says_what_one_says_that_reads_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index remembers parts, the seal that all was valid; both hold only for files with the stamps they had."""
    monkeypatch.setattr(index_module, "look_at", look_at_text)
    states: set[str] = set()
    sealed = 0
    for seed in range(SEQUENCES):
        world = _World(tmp_path / str(seed), seed)
        memory = [world.folder / "cache" / name for name in MEMORY]
        done: list[str] = []
        for _ in range(CHANGES):
            change = world.random.choice(world.changes)
            change()
            world.settle()
            done.append(change.__name__)
            # The first sees the change; the second may find the seal of the first.
            ledgers = [world.check(), world.check()]
            # What was remembered stays for the next change, so that it may grow old.
            kept = [path.rename(path.with_suffix(".kept")) for path in memory if path.exists()]
            cold = world.check()
            for path in memory:
                path.unlink(missing_ok=True)
            for path in kept:
                path.rename(path.with_suffix(".json"))
            for warm in ledgers:
                sealed += isinstance(warm.latents, ValidRows)
                assert (warm.latent_states, warm.text_states) == (cold.latent_states, cold.text_states), done
                assert (warm.bytes, warm.ready, warm.shapes) == (cold.bytes, cold.ready, cold.shapes), done
                assert warm == cold, f"seed {seed}: {done}"
                states.update(row.verdict.state for row in (*warm.latents, *warm.texts))
        shutil.rmtree(world.folder)
    assert states == {"valid", "stale", "broken", "missing"}
    assert sealed > SEQUENCES / 4


def test_a_seal_waits_until_the_files_are_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was written a moment ago may be written again within one tick of the clock, with the same stamp."""
    monkeypatch.setattr(index_module, "look_at", look_at_text)
    world = _World(tmp_path, 0)
    seal = tmp_path / "cache" / SEAL_FILE
    for path in tmp_path.glob("*/*"):
        os.utime(path)
    assert world.check().ready
    assert not seal.exists()
    world.cache_all()
    world.settle()
    assert isinstance(world.check().latents, list)
    assert seal.exists()
    assert isinstance(world.check().latents, ValidRows)


def test_stamps_of_many_are_those_of_each(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    paths = [folder / "0.png", tmp_path / "gone", folder, tmp_path / "gone too", folder / "1.png", tmp_path / "last"]
    for number, path in enumerate((paths[0], paths[4])):
        path.write_bytes(b"x" * (number + 3))
    found = stamps_of([str(path) for path in paths])
    assert [found[number] for number in (0, 2, 4)] == [stamp_of(paths[number]) for number in (0, 2, 4)]
    assert [type(found[number]) for number in (1, 3, 5)] == [FileNotFoundError] * 3
    assert stamps_of([]) == []


def test_columns_come_back_as_they_were(tmp_path: Path) -> None:
    columns = [
        [1, -(2**63), 2**63 - 1],
        [1, 2, 2**63],
        ["a", "", os.fsdecode(b"caf\xe9")],
        ["with \0", "b", "c"],
        [None, "x", 1.5],
        [True, True, True],
        [True, 1, 0],
        ["same", "same", "same"],
        [1.5, 2.5, -0.25],
        [{"key": "value"}, {}, {"other": "ключ"}],
    ]
    tables = {"full": columns, "empty": [], "one": [[""]], "none": [[]]}
    packed = pack_tables({name: list(table) for name, table in tables.items()})
    back = unpack_tables(packed)
    assert back == tables
    assert [list(map(type, column)) for column in back["full"]] == [list(map(type, column)) for column in columns]
    with pytest.raises(ValueError, match=r"Expecting|holds"):
        unpack_tables(packed[:-1])
