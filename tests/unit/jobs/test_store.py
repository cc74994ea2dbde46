"""Run folders: whole or not there, found by safe names only, moved to the trash and never deleted."""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.config.generate import GenerateOptions
from backend.config.options import from_mapping, load_toml
from backend.errors import K5Error, UserError
from backend.jobs import store as store_module
from backend.jobs.process import identify
from backend.jobs.states import JobState
from backend.jobs.store import Run, RunStore
from backend.jobs.supervisor import ENTRIES, claim
from backend.jobs.view import view_run
from tests.fakes.engine_stub import ENTRY
from tests.unit.jobs.conftest import put_json

HOSTILE_PROMPT = 'quotes " \' \\ and\nnew lines, {braces}, $HOME `id`, Кириллица, 🎬, "--", # no comment'


def test_a_run_folder_holds_what_the_engine_reads(store: RunStore) -> None:
    options = GenerateOptions(task="k5-demo-t2v", prompt=HOSTILE_PROMPT)
    run = store.create("generate", options, "  a \n title  ", entry=ENTRY)
    assert from_mapping(GenerateOptions, load_toml(run.folder / "options.toml")) == options
    assert run.title == "a title"
    assert (run.kind, run.entry) == ("generate", ENTRY)
    assert sorted(os.listdir(run.folder)) == ["options.toml", "request.json", "requests"]
    assert abs(run.created - time.time()) < 5
    assert os.listdir(store.runs_folder) == [run.id]
    assert store.get(run.id) == run


@pytest.mark.parametrize("kind", ENTRIES)
def test_each_kind_has_its_program(store: RunStore, kind: str) -> None:
    assert store.create(kind, GenerateOptions(), "x").entry == ENTRIES[kind]


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("generate", "os"),
        ("generate", "backend.kandinsky5_generate_video"),
        ("other", None),
        ("generate", ""),
        ("generate", "tests.fakes.other"),
    ],
)
def test_nothing_else_can_be_run(store: RunStore, kind: str, entry: str | None) -> None:
    with pytest.raises(UserError, match="not something that can be run"):
        store.create(kind, GenerateOptions(), "x", entry=entry)


def test_a_request_file_cannot_smuggle_a_program_in(store: RunStore, make_run: Callable[..., Run]) -> None:
    run = make_run()
    put_json(run.folder / "request.json", {"kind": "generate", "title": "x", "created": 1, "entry": "antigravity"})
    assert store.get(run.id).entry == ""
    assert RunStore(store.workspace).get(make_run().id).entry == ""


def test_the_program_list_of_the_supervisor_is_the_one_of_the_store(workspace: Path) -> None:
    assert RunStore(workspace).entries == set(ENTRIES.values())


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc",
        "x\0y",
        ".hidden",
        "a" * 200,
        "no-such-run",
        "C:x",
        "a\nb",
        "-x",
        None,
        5,
    ],
)
def test_hostile_and_unknown_names_are_refused(store: RunStore, name: object) -> None:
    (store.workspace / "x").mkdir()
    with pytest.raises(UserError, match="There is no run"):
        store.get(name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="There is no run"):
        store.trash(name)  # type: ignore[arg-type]


def test_a_link_is_no_run(store: RunStore, make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    (store.runs_folder / "link").symlink_to(run.folder, target_is_directory=True)
    assert [item.id for item in store.list()] == [run.id]
    with pytest.raises(UserError):
        store.get("link")


def test_a_crash_while_a_run_is_made_leaves_no_run(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise UserError("No space is left.")

    monkeypatch.setattr(store_module, "write_atomic", full)
    with pytest.raises(UserError, match="No space"):
        store.create("generate", GenerateOptions(), "x")
    assert store.list() == []
    assert os.listdir(store.runs_folder) == []
    (store.runs_folder / ".new-0123").mkdir()  # what a kill leaves
    assert store.list() == []


def test_a_workspace_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = RunStore(tmp_path / "file")
    assert store.list() == []
    with pytest.raises(UserError, match="cannot be"):
        store.create("generate", GenerateOptions(), "x")


def test_newest_first_and_damage_is_tolerated(store: RunStore, make_run: Callable[..., Run]) -> None:
    runs = [make_run(title=f"run {index}") for index in range(3)]
    (store.runs_folder / "notes.txt").write_text("mine")
    (store.runs_folder / "empty folder").mkdir()
    (store.runs_folder / "foreign").mkdir()
    (store.runs_folder / "foreign" / "photo.png").touch()
    (store.runs_folder / "from-terminal").mkdir()
    (store.runs_folder / "from-terminal" / "events.jsonl").touch()
    for content in (b"", b"{", b"[]", b'{"created": NaN, "kind": 5, "title": null, "entry": []}', b"\xff\xfe"):
        (runs[0].folder / "request.json").write_bytes(content)
        listed = store.list()
        assert {run.id for run in listed} == {*(run.id for run in runs), "from-terminal"}
        assert [run.title for run in listed if run.title.startswith("run ")] == ["run 2", "run 1"]
        damaged = store.get(runs[0].id)
        assert (damaged.kind, damaged.entry, damaged.title) == ("", "", runs[0].id)


def test_five_hundred_runs_are_listed_at_once(store: RunStore, make_run: Callable[..., Run]) -> None:
    first = make_run()
    request = json.loads((first.folder / "request.json").read_text())
    for index in range(499):
        folder = store.runs_folder / f"20260101-0000-{index:06x}"
        folder.mkdir()
        put_json(folder / "request.json", {**request, "created": index, "title": f"run {index}"})
        put_json(folder / "started.json", {"time": 1.0, "supervisor": None})
        put_json(folder / "result.json", {"exit_code": 0, "signal": None, "ended": 2.0})
    assert len(store.list()) == 500
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        runs = store.list()
        seconds.append(time.perf_counter() - began)
    assert len(runs) == 500
    assert min(seconds) < 0.1, seconds
    print(f"\nlist of 500 runs: {min(seconds) * 1000:.1f} ms warm")
    for moment in ("first", "again"):
        began, busy = time.perf_counter(), time.process_time()
        assert len([view_run(run) for run in runs]) == 500
        wall, busy = time.perf_counter() - began, time.process_time() - busy
        print(f"view of 500 runs, {moment}: {wall * 1000:.1f} ms, of these {busy * 1000:.1f} ms at work")


def test_trash_moves_and_keeps_everything(store: RunStore, make_run: Callable[..., Run]) -> None:
    run = make_run()
    (run.folder / "outputs").mkdir()
    (run.folder / "outputs" / "a.png").write_bytes(b"picture")
    target = store.trash(run.id)
    assert target.parent == store.workspace / "trash"
    assert (target / "outputs" / "a.png").read_bytes() == b"picture"
    assert store.list() == []
    assert not run.folder.exists()
    with pytest.raises(UserError):
        store.trash(run.id)


def test_trash_never_overwrites(store: RunStore, make_run: Callable[..., Run]) -> None:
    run = make_run()
    (store.workspace / "trash" / run.id).mkdir(parents=True)
    (store.workspace / "trash" / run.id / "old.txt").touch()
    assert store.trash(run.id).name.startswith(run.id + "-")
    assert (store.workspace / "trash" / run.id / "old.txt").exists()


def test_a_live_run_is_not_moved(store: RunStore, make_run: Callable[..., Run]) -> None:
    run = make_run()
    me = identify(os.getpid())
    assert me is not None
    assert claim(run.folder, {"supervisor": me.as_dict()})
    assert view_run(run).state is JobState.STARTING
    with pytest.raises(UserError, match="still working"):
        store.trash(run.id)
    assert run.folder.is_dir()


def test_a_waiting_run_that_goes_to_the_trash_can_never_start(store: RunStore, make_run: Callable[..., Run]) -> None:
    """Deleting and starting at the same moment: the claim decides, so one of the two is refused."""
    run = make_run()
    target = store.trash(run.id)
    assert not claim(target, {"supervisor": None})


def test_a_move_that_fails_leaves_the_run_as_it_was(
    store: RunStore, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(K5Error, match="Permission denied"):
        store.trash(run.id)
    monkeypatch.undo()
    assert view_run(run).state is JobState.QUEUED
    assert tomllib.loads((run.folder / "options.toml").read_text())["prompt"] == "a circle"
