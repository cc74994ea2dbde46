"""Captions on the page: edited whole, never over somebody's edit, undone after a restart, patterns that cannot hang."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.jobs.supervisor import engine_environment
from k5ui.datasets.caption_journal import CaptionJournal, Change
from k5ui.datasets.replacing import Replacement, replace_texts
from k5ui.roots import Roots
from tests.unit.k5ui.dataset_kit import Desk, open_desk, write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, two captions."""
    for name in ("a", "b", "c"):
        write_image(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "pictures" / "a.txt").write_text("a red card\n")
    (tmp_path / "pictures" / "b.txt").write_bytes("\ufeffred,\r\nred card".encode())
    return tmp_path / "pictures"


@pytest.fixture
def desk(workspace: Path) -> Iterator[Desk]:
    found = open_desk(workspace)
    yield found
    found.services.close()


@pytest.fixture
def dataset(desk: Desk, folder: Path) -> str:
    return desk.new(folder)


def item(desk: Desk, dataset: str, name: str) -> dict:
    return next(item for item in desk.items(dataset) if item["name"] == f"{name}.png")


def test_a_caption_is_edited_and_made(desk: Desk, dataset: str, folder: Path) -> None:
    shown = item(desk, dataset, "a")
    assert (shown["caption"], shown["caption_editable"]) == ("a red card", True)
    answer = desk.done("set_caption", dataset, shown["key"], shown["caption_revision"], "a <b>blue</b> card ")
    assert (folder / "a.txt").read_text() == "a <b>blue</b> card\n"
    assert item(desk, dataset, "a")["caption_revision"] == answer["caption_revision"]
    bare = item(desk, dataset, "c")
    assert (bare["caption"], bare["caption_revision"]) == (None, "none")
    desk.done("set_caption", dataset, bare["key"], "none", "new")
    assert (folder / "c.txt").read_text() == "new\n"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    desk.until(dataset, lambda page: page["entries"][0]["missing_captions"] == 0)


def test_line_ends_stay(desk: Desk, dataset: str, folder: Path) -> None:
    shown = item(desk, dataset, "b")
    assert shown["caption"] == "red,\nred card"
    desk.done("set_caption", dataset, shown["key"], shown["caption_revision"], "one\ntwo")
    assert (folder / "b.txt").read_bytes() == b"one\r\ntwo"


@pytest.mark.parametrize("name", ["a", "c"])
def test_an_edit_from_outside_is_not_overwritten(desk: Desk, dataset: str, folder: Path, name: str) -> None:
    shown = item(desk, dataset, name)
    (folder / f"{name}.txt").write_text("theirs")
    answer = desk.call("set_caption", dataset, shown["key"], shown["caption_revision"], "mine")
    assert answer["conflict"] is True
    assert answer["caption"] == "theirs"
    assert (folder / f"{name}.txt").read_text() == "theirs"
    desk.done("set_caption", dataset, shown["key"], answer["caption_revision"], "mine")
    assert (folder / f"{name}.txt").read_text() == "mine", "its own end of line stays away"


def test_an_edit_in_place_is_shown_at_once(desk: Desk, dataset: str, folder: Path) -> None:
    """The folder's time does not tell of it."""
    with open(folder / "a.txt", "r+") as handle:
        handle.write("A")
    assert item(desk, dataset, "a")["caption"] == "A red card"


def test_undo_and_redo_survive_a_restart(desk: Desk, dataset: str, folder: Path, workspace: Path) -> None:
    for name, text in (("a", "one"), ("c", "two")):
        shown = item(desk, dataset, name)
        desk.done("set_caption", dataset, shown["key"], shown["caption_revision"], text)
        desk.until(dataset, lambda page: page["scanning"] is None)
    desk.services.close()
    again = open_desk(workspace)
    page = again.settle(dataset)
    assert (page["undo"], page["redo"]) == (2, 0)
    assert again.done("undo_captions", dataset) == {"changed": 1, "conflicts": [], "left": 1, "undo": 1, "redo": 1}
    assert not (folder / "c.txt").exists(), "it was made here, and the journal still holds its text"
    assert again.done("undo_captions", dataset)["left"] == 0
    assert (folder / "a.txt").read_text() == "a red card\n"
    assert "no change" in again.call("undo_captions", dataset)["error"]
    assert again.done("redo_captions", dataset)["left"] == 1
    assert again.done("redo_captions", dataset)["left"] == 0
    assert (folder / "a.txt").read_text() == "one\n"
    assert (folder / "c.txt").read_text() == "two\n"
    again.services.close()


def test_undo_leaves_what_others_changed_since(desk: Desk, dataset: str, folder: Path) -> None:
    how = {"find": "red", "replace": "green", "regex": False, "prefix": "", "suffix": ""}
    assert desk.done("change_captions", dataset, None, None, how, False)["changed"] == 2
    (folder / "a.txt").write_text("theirs")
    answer = desk.done("undo_captions", dataset)
    assert (answer["changed"], answer["conflicts"]) == (1, ["a.txt"])
    assert (folder / "a.txt").read_text() == "theirs"
    assert (folder / "b.txt").read_bytes() == "\ufeffred,\r\nred card".encode(), "byte for byte"


def test_find_and_replace(desk: Desk, dataset: str, folder: Path) -> None:
    how = {"find": r"(\w+) card", "replace": r"card, \1", "regex": True, "prefix": "k5x ", "suffix": "."}
    dry = desk.done("change_captions", dataset, 0, None, how, True)
    assert dry["changed"] == 2
    assert (folder / "a.txt").read_text() == "a red card\n"
    before = {example["name"]: (example["before"], example["after"]) for example in dry["examples"]}
    assert before["a.png"] == ("a red card", "k5x a card, red.")
    assert desk.done("change_captions", dataset, 0, None, how, False)["changed"] == 2
    assert (folder / "a.txt").read_text() == "k5x a card, red.\n"
    again = {"find": "", "replace": "", "regex": False, "prefix": "k5x ", "suffix": "."}
    assert desk.done("change_captions", dataset, None, None, again, False)["changed"] == 0, "not twice"
    keys = [item(desk, dataset, "a")["key"]]
    only = {"find": "k5x ", "replace": "", "regex": False, "prefix": "", "suffix": ""}
    assert desk.done("change_captions", dataset, None, keys, only, False)["changed"] == 1
    assert (folder / "b.txt").read_text().startswith("k5x ")
    assert not (folder / "c.txt").exists(), "a source without a caption does not get an invented one"


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "(?P<a>x)(?P<a>y)", "*x"])
def test_patterns_that_are_none_get_a_sentence(desk: Desk, dataset: str, pattern: str) -> None:
    how = {"find": pattern, "replace": "", "regex": True}
    assert "pattern cannot be used" in desk.call("change_captions", dataset, None, None, how, True)["error"]


@pytest.mark.parametrize("replace", [r"\9", r"\g<nobody>"])
def test_replacements_that_are_none(replace: str) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        replace_texts(["abc"], Replacement("b", replace, True), engine_environment())


def test_a_pattern_that_would_run_for_ever_is_ended(desk: Desk, dataset: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("k5ui.datasets.replacing.SECONDS", 1.5)
    (folder / "a.txt").write_text("a" * 60 + "!")
    desk.services.datasets.scans.refresh(desk.services.datasets.get(dataset), wait=10)
    started = time.monotonic()
    answer = desk.call("change_captions", dataset, None, None, {"find": "(a+)+b", "replace": "", "regex": True}, True)
    assert "takes longer" in answer["error"]
    assert time.monotonic() - started < 20
    assert (folder / "a.txt").read_text() == "a" * 60 + "!"


def test_results_that_explode_are_refused() -> None:
    text = "a" * 100_000
    for how in (Replacement("a", "b" * 1000), Replacement("a{100}", r"\g<0>" * 30, True)):
        with pytest.raises(UserError, match="1 MB"):
            replace_texts([text], how, engine_environment())


def test_captions_that_are_links_or_of_other_kinds_are_not_edited(desk: Desk, folder: Path, tmp_path: Path) -> None:
    """A setting such as caption_extension = ".py" must not turn this into an editor of programs."""
    (tmp_path / "elsewhere.txt").write_text("of somebody else")
    (folder / "c.txt").symlink_to(tmp_path / "elsewhere.txt")
    dataset = desk.new(folder)
    shown = item(desk, dataset, "c")
    assert (shown["caption"], shown["caption_editable"]) == ("of somebody else", False)
    assert "link" in desk.call("set_caption", dataset, shown["key"], shown["caption_revision"], "x")["error"]
    assert (tmp_path / "elsewhere.txt").read_text() == "of somebody else"
    revision = desk.get(f"datasets/{dataset}")["revision"]
    desk.done("set_key", dataset, revision, 0, "caption_extension", ".py")
    desk.until(dataset, lambda page: page["entries"][0]["missing_captions"] == 3)
    answer = desk.call("set_caption", dataset, shown["key"], "none", "import os")
    assert ".txt" in answer["error"]
    assert list(folder.glob("*.py")) == []


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00x", b"x" * (1 << 20) + b"yz"])
def test_captions_that_are_no_text(desk: Desk, folder: Path, raw: bytes) -> None:
    (folder / "c.txt").write_bytes(raw)
    dataset = desk.new(folder)
    shown = item(desk, dataset, "c")
    assert (shown["caption"], shown["caption_editable"]) == (None, False)
    assert shown["caption_problem"]
    assert "error" in desk.call("set_caption", dataset, shown["key"], shown["caption_revision"], "x")
    assert (folder / "c.txt").read_bytes() == raw


# --- the journal --------------------------------------------------------------------------------------------------


def journal(tmp_path: Path) -> CaptionJournal:
    return CaptionJournal(tmp_path / "undo.jsonl", Roots([], False))


def test_a_step_that_was_cut_off_is_undone_as_far_as_it_went(tmp_path: Path) -> None:
    """The journal is written first; a kill in the middle leaves some files as they were."""
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_text("new")
    two.write_text("old")
    change = {"path": str(one), "before": "old", "after": "new"}, {"path": str(two), "before": "old", "after": "new"}
    (tmp_path / "undo.jsonl").write_text(json.dumps({"op": "edit", "changes": list(change)}) + '\n{"op": "un')
    assert journal(tmp_path).left() == (1, 0)
    outcome = journal(tmp_path).undo()
    assert (outcome.changed, outcome.conflicts) == (1, ["2.txt"])
    assert (one.read_text(), two.read_text()) == ("old", "old")
    assert journal(tmp_path).left() == (0, 1), "a torn line before it does not swallow the new one"


def test_a_new_step_ends_what_could_be_redone(tmp_path: Path) -> None:
    path = tmp_path / "1.txt"
    path.write_text("a")
    for before, after in ((b"a", b"b"), (b"b", b"c")):
        journal(tmp_path).apply([Change(str(path), before, after)])
    journal(tmp_path).undo()
    journal(tmp_path).apply([Change(str(path), b"b", b"d")])
    assert journal(tmp_path).left() == (2, 0)
    journal(tmp_path).undo()
    assert path.read_bytes() == b"b"


def test_old_steps_are_dropped_before_the_journal_grows_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("k5ui.datasets.caption_journal.MAX_STEPS", 10)
    path = tmp_path / "1.txt"
    path.write_bytes(b"0")
    for number in range(30):
        journal(tmp_path).apply([Change(str(path), str(number).encode(), str(number + 1).encode())])
    undo, _ = journal(tmp_path).left()
    assert 5 <= undo <= 10
    journal(tmp_path).undo()
    assert path.read_bytes() == b"29"


@pytest.mark.parametrize(
    "damage", [b"\x00\xff\n", b'{"op":"edit","changes":[{"path":1}]}\n', b"[]\n", b'{"op":"undo"}\n']
)
def test_a_damaged_journal_changes_nothing(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "undo.jsonl").write_bytes(damage * 3)
    before = set(os.listdir(tmp_path))
    outcome = None
    try:
        outcome = journal(tmp_path).undo()
    except UserError as error:
        assert "no change" in error.message
    assert outcome is None or outcome.changed == 0
    assert set(os.listdir(tmp_path)) == before
