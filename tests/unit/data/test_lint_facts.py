"""What was measured is kept and used again; what changed is measured again; damage costs time only."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from backend.config.dataset import DatasetEntry
from backend.data.frames import ClipRange
from backend.data.lint.facts import FACTS_FILE, FactStore
from backend.data.lint.finding import Finding
from backend.data.lint.frame_choice import MOST_FRAMES, runs_of, used_stretches
from backend.data.lint.measure import Measurement
from backend.data.lint.survey import Outcome, survey
from backend.data.scan import scan_dataset
from backend.data.watchdog import MediaReader
from backend.errors import UserError
from tests.unit.data.clips import damage, write_clip
from tests.unit.data.dataset_folder import make_entry
from tests.unit.data.lint_clips import scene, slow


class CountingReader(MediaReader):
    """Counts what is opened."""

    def __init__(self) -> None:
        super().__init__(1)
        self.opened: list[str] = []

    def probe(self, path: str | Path) -> Any:
        """Count, then probe."""
        self.opened.append(Path(path).name)
        return super().probe(path)

    def decode_clip(self, path: str | Path, wanted: Sequence[Any], *size: Any) -> Any:
        """Count, then decode."""
        self.opened.append(f"{Path(path).name} decoded")
        return super().decode_clip(path, wanted, *size)


@pytest.fixture(scope="module")
def reader():
    with CountingReader() as opened:
        yield opened


def _look(entry: DatasetEntry, reader: CountingReader) -> dict[str, Outcome]:
    reader.opened.clear()
    facts = FactStore(entry)
    found = {
        source.identity: outcome for source, outcome in survey(entry, scan_dataset(entry).sources, facts, reader, 2)
    }
    facts.save()
    return dict(sorted(found.items()))


def _dataset(folder: Path, **keys: object) -> DatasetEntry:
    entry = make_entry(folder, "video", **{"target_frames": [5], **keys})
    for number in range(3):
        write_clip(Path(entry.source) / f"{number}.mp4", 9, (96, 64), draw=lambda n, s=number: slow(s)(n)[:64, :96])
    return entry


def test_a_second_look_opens_only_what_changed(tmp_path: Path, reader: CountingReader) -> None:
    entry = _dataset(tmp_path)
    first = _look(entry, reader)
    assert sorted(reader.opened) == sorted(f"{n}.mp4{end}" for n in range(3) for end in ("", " decoded"))
    stored = (entry.cache_directory / FACTS_FILE).stat()
    assert _look(entry, reader) == first
    assert reader.opened == []
    assert (entry.cache_directory / FACTS_FILE).stat().st_mtime_ns == stored.st_mtime_ns  # nothing new: not written
    write_clip(Path(entry.source) / "1.mp4", 11, (96, 64), draw=lambda n: slow(9)(n)[:64, :96])
    second = _look(entry, reader)
    assert reader.opened == ["1.mp4", "1.mp4 decoded"]
    assert second["1.mp4"] != first["1.mp4"]
    assert {second[name] == first[name] for name in ("0.mp4", "2.mp4")} == {True}
    (Path(entry.source) / "0.mp4").unlink()
    assert list(_look(entry, reader)) == ["1.mp4", "2.mp4"]
    assert len(FactStore(entry)._old) == 2


def test_other_settings_measure_again(tmp_path: Path, reader: CountingReader) -> None:
    _look(_dataset(tmp_path), reader)
    entry = make_entry(tmp_path, "video", target_frames=[5], resolution=[128, 128])
    _look(entry, reader)
    assert reader.opened == []  # sizes do not decide which frames are looked at
    _look(make_entry(tmp_path, "video", target_frames=[9]), reader)
    assert len(reader.opened) == 6


@pytest.mark.parametrize("change", ["cut off", "bit", "empty", "other json", "folder", "binary"])
def test_a_damaged_facts_file_costs_time_only(tmp_path: Path, reader: CountingReader, change: str) -> None:
    entry = _dataset(tmp_path)
    first = _look(entry, reader)
    path = entry.cache_directory / FACTS_FILE
    whole = path.read_bytes()
    place = random.Random(change).randrange(70, len(whole))
    damaged = {
        "cut off": whole[:place],
        "bit": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        "empty": b"",
        "other json": b'{"0.mp4": {"settings": 1}}',
        "binary": numpy.random.default_rng(1).bytes(500),
    }
    if change == "folder":
        path.unlink()
        path.mkdir()
        facts = FactStore(entry)
        assert dict(survey(entry, scan_dataset(entry).sources, facts, reader, 1)).keys()
        with pytest.raises((UserError, OSError)):
            facts.save()
        return
    path.write_bytes(damaged[change])
    assert _look(entry, reader) == first
    assert len(reader.opened) == 6
    assert _look(entry, reader) == first
    assert reader.opened == []


def test_a_record_of_an_unknown_form_is_measured_again(tmp_path: Path, reader: CountingReader) -> None:
    """A sealed file of a version with other fields must not end the check."""
    entry = _dataset(tmp_path)
    first = _look(entry, reader)
    facts = FactStore(entry)
    for record in facts._old.values():
        del record["measured"]["bars"]
    facts._changed = True
    facts.save(whole=False)
    assert _look(entry, reader) == first
    assert len(reader.opened) == 6


def test_broken_sources_are_reported_and_tried_again(tmp_path: Path, reader: CountingReader) -> None:
    entry = _dataset(tmp_path)
    folder = Path(entry.source)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video", encoding="utf-8")
    (folder / "cut.mp4").write_bytes((folder / "0.mp4").read_bytes()[:-900])
    damage(write_clip(folder / "noise.mp4", 40, options={"g": "4"}), 2)
    os.symlink(folder / "nowhere", folder / "link.mp4")
    found = _look(entry, reader)
    broken = {name for name, outcome in found.items() if isinstance(outcome, UserError)}
    assert broken == found.keys() - {"0.mp4", "1.mp4", "2.mp4"}
    assert {"empty.mp4", "text.mp4", "cut.mp4", "noise.mp4"} <= broken
    assert len(_look(entry, reader)) == len(found)
    assert {name.split(" ")[0] for name in reader.opened} == broken - {"link.mp4"}


_HANGING_WORKER = """
import time
from backend.data import decode, worker

plain = decode._Clip._give

def give(self, number, frame, stream):
    plain(self, number, frame, stream)
    if number == 3 and "hang" in self._path.name:
        time.sleep(600)

decode._Clip._give = give
worker.main()
"""


def test_a_hanging_file_is_broken_and_the_others_are_measured(tmp_path: Path) -> None:
    entry = _dataset(tmp_path)
    folder = Path(entry.source)
    (folder / "1.mp4").rename(folder / "1 hangs.mp4")
    with MediaReader(1, stall_seconds=1.5, command=(sys.executable, "-c", _HANGING_WORKER)) as guarded:
        found = dict(survey(entry, scan_dataset(entry).sources, FactStore(entry), guarded, 2))
    outcomes = {source.identity: outcome for source, outcome in found.items()}
    assert "made no progress for 1.5 s" in str(outcomes.pop("1 hangs.mp4"))
    assert len(outcomes) == 2
    assert not any(isinstance(outcome, UserError) for outcome in outcomes.values())


def test_stills_are_measured(tmp_path: Path, reader: CountingReader) -> None:
    entry = make_entry(tmp_path, "image")
    Image.fromarray(scene(1, (400, 300))).save(Path(entry.source) / "a.png")
    Image.new("RGB", (200, 100)).save(Path(entry.source) / "black.png")
    found = _look(entry, reader)
    assert all(not isinstance(outcome, UserError) for outcome in found.values())
    a, black = (outcome.measurement for outcome in found.values() if not isinstance(outcome, UserError))
    assert (a.frames, a.black, a.bars) == (1, 0, None)
    assert a.look is not None
    assert (black.black, black.look) == (1, None)


def test_used_stretches_equal_a_slow_union_and_stay_bounded() -> None:
    rng = random.Random(3)
    for _ in range(300):
        clips = [ClipRange(rng.randrange(400), rng.randrange(1, 60)) for _ in range(rng.randrange(1, 12))]
        used = {frame for clip in clips for frame in range(clip.start, clip.end)}
        stretches = used_stretches(clips, 10_000)
        assert {frame for start, end in stretches for frame in range(start, end)} == used
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(stretches))
        few = [frame for start, end in used_stretches(clips, 200) for frame in range(start, end)]
        assert set(few) <= used
        assert len(few) <= 200
    long = used_stretches([ClipRange(0, 100_000)])
    assert (long[0][0], long[-1][1]) == (0, 100_000)
    assert sum(end - start for start, end in long) <= MOST_FRAMES


def test_runs_name_each_source_frame_once() -> None:
    times = numpy.arange(30) / 12
    [run] = runs_of([(4, 24)], times)
    assert run.numbers == tuple(range(2, 12))
    assert run.places == tuple(range(0, 20, 2))
    [plain] = runs_of([(4, 9)], None)
    assert plain.numbers == (4, 5, 6, 7, 8)


def test_measurements_survive_json() -> None:
    rng = random.Random(1)
    for _ in range(50):
        measured = Measurement(
            rng.randrange(99), rng.randrange(9), ((0.0, rng.random()),), 3, (), (rng.random(),), 1, 2,
            (0.1, 0.0, rng.random(), 0.0) if rng.random() < 0.5 else None,
        )  # fmt: skip
        assert Measurement.from_json(json.loads(json.dumps(measured.as_json()))) == measured


def test_ids_depend_on_kind_dataset_and_sources_alone() -> None:
    rng = random.Random(2)
    seen: dict[str, tuple[Any, ...]] = {}
    for _ in range(2000):
        names = tuple(f"{rng.randrange(50)}.mp4" for _ in range(rng.randrange(1, 4)))
        key = (rng.choice(("black", "frozen")), rng.randrange(3), names)
        one = Finding(key[0], "warning", key[1], names, "One.", {"n": 1})
        other = Finding(key[0], "info", key[1], names, "Another.", {"n": rng.random()}, ("exclude",))
        assert one.id == other.id
        assert len(one.id) == 16
        assert seen.setdefault(one.id, key) == key
    surrogate = Finding("black", "info", 0, ("\udcff.mp4",), "x")
    assert json.loads(json.dumps(surrogate.as_json()))["identities"] == ["\udcff.mp4"]
