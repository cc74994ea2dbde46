"""The first look at many sources: several processes, hostile files cost themselves, a second look opens nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.data import looking
from backend.data.items import build_items, look_at
from backend.data.ledger import check_dataset
from backend.data.ledger_index import LedgerIndex
from backend.data.looking import look_at_all
from backend.data.scan import scan_dataset
from backend.data.watchdog import MediaReader
from backend.errors import Stopped
from tests.unit.data.dataset_folder import add_image, make_entry


def _no_reader(*_: object) -> None:
    raise AssertionError("Nothing is new, so no process may be started.")


def test_many_sources_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = make_entry(tmp_path)
    for number in range(70):
        add_image(tmp_path / "source" / f"{number:02d}.png", (70 + number, 60))
    (tmp_path / "source" / "07.png").write_bytes(b"no picture")
    (tmp_path / "cache").mkdir()
    sources = scan_dataset(entry).sources
    (tmp_path / "source" / "08.png").unlink()
    index = LedgerIndex(tmp_path / "cache")
    told: list[tuple[int, int]] = []
    looks = look_at_all(sources, index=index, workers=2, on_progress=lambda done, total: told.append((done, total)))
    assert told[0] == (1, 70)
    assert told[-1] == (70, 70)
    assert [done for done, _ in told] == list(range(1, 71))
    plan = build_items(entry, sources, look=looks.look)
    expected = build_items(entry, sources, look=look_at)
    assert plan.items == expected.items
    assert [skipped[0] for skipped in plan.skipped] == [skipped[0] for skipped in expected.skipped]
    assert [skipped.source.name for skipped in plan.skipped] == ["07", "08"]
    index.save()
    # A second look, in another run: only what changed is opened.
    monkeypatch.setattr(looking, "MediaReader", _no_reader)
    (tmp_path / "source" / "07.png").unlink()
    again = look_at_all(sources, index=LedgerIndex(tmp_path / "cache"))
    assert build_items(entry, sources, look=again.look).items == plan.items
    add_image(tmp_path / "source" / "09.png", (90, 91))
    with pytest.raises(AssertionError):
        look_at_all(sources, index=LedgerIndex(tmp_path / "cache"))


def test_the_ledger_looks_with_a_reader_and_says_how_far_it_is(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    for number in range(3):
        add_image(tmp_path / "source" / f"{number}.png")
    (tmp_path / "cache").mkdir()
    told: list[tuple[int, int]] = []
    with MediaReader(1) as reader:
        ledger = check_dataset(entry, reader=reader, on_progress=lambda *step: told.append(step))
        assert len(ledger.latents) == 3
        assert told[-1] == (3, 3)
        assert len(reader.process_ids()) == 1
        told.clear()
        check_dataset(entry, reader=reader, on_progress=lambda *step: told.append(step))
        assert told == [(3, 3)]


def test_an_end_on_the_way_is_an_end(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    for number in range(5):
        add_image(tmp_path / "source" / f"{number}.png")
    sources = scan_dataset(entry).sources

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise Stopped("Asked to.")

    with pytest.raises(Stopped):
        look_at_all(sources, index=LedgerIndex(tmp_path / "cache"), on_progress=stop)


def test_an_index_keeps_the_tables_that_nobody_asked_about(tmp_path: Path) -> None:
    """The page looks at sources only; what the ledger knows of captions and caches stays."""
    entry = make_entry(tmp_path)
    add_image(tmp_path / "source" / "a.png")
    (tmp_path / "cache").mkdir()
    check_dataset(entry)
    index = LedgerIndex(tmp_path / "cache")
    add_image(tmp_path / "source" / "b.png", caption=None)
    for source in scan_dataset(entry).sources:
        index.look(source)
    index.save()
    saved = LedgerIndex(tmp_path / "cache")
    assert saved.count_new(scan_dataset(entry).sources) == 0
    assert list(saved._old["captions"]) == [str(tmp_path / "source" / "a.txt")]
