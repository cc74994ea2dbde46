"""The Dataset tab under hostile hands: paths and keys, hostile JSON, links out of the roots, texts that are markup."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend.errors import Problems
from k5ui.datasets.keys import source_key
from tests.security.server import Server
from tests.unit.k5ui.dataset_kit import Desk, clip_folder, open_desk, write_image

HOSTILE = (
    *("..", "../..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "%00", "a%00b", "x" * 300, "%ff%fe", "~root"),
    *("known", "known.json", "undo", "0" * 12, "0" * 16, "C:%5cWindows", "..\\..", "%0a", "é"),
)
SECRET = "the secret of somebody else"


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """The folder that an exposed app may read."""
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that it may not read."""
    write_image(tmp_path / "outside" / "private.png")
    (tmp_path / "outside" / "private.txt").write_text(SECRET)
    return tmp_path / "outside"


@pytest.fixture
def desk(workspace: Path, inside: Path) -> Iterator[Desk]:
    """An exposed app with one root."""
    found = open_desk(workspace, (inside,), exposed=True)
    yield found
    found.services.close()


# --- through the real server --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_every_route(local: Server, name: str) -> None:
    known = "0" * 12
    for path in (
        f"datasets/{name}", f"datasets/{name}/items", f"datasets/{name}/lint", f"datasets/{name}/thumb/{'0' * 16}",
        f"datasets/{known}/thumb/{name}", f"datasets/{known}/preview/{name}", f"datasets/{known}/seen/{name}",
        f"datasets/{known}/strip/{name}/0", f"datasets/{known}/clip/{name}/0", f"datasets/{known}/clip/x/{name}",
    ):  # fmt: skip
        answer = local.fetch(f"/api/{path}".encode("ascii", "ignore").decode())
        assert answer.status in (307, 404, 422), path
        assert b"root:" not in answer.body
        assert str(local.workspace) not in answer.text
        assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=x", "offset=-1", "offset=9" * 9, "only=others", "entry=-2", "bucket=1x", "text="],
)
def test_hostile_queries(local: Server, query: str) -> None:
    assert local.fetch(f"/api/datasets/{'0' * 12}/items?{query}").status in (404, 422)


def test_strangers_see_no_datasets_and_no_folders(exposed: Server) -> None:
    for path in ("datasets", f"datasets/{'0' * 12}", "folders", f"datasets/{'0' * 12}/thumb/{'0' * 16}"):
        assert exposed.fetch(f"/api/{path}").status == 401


def test_an_exposed_app_lists_folders_of_its_roots_only(member: Server) -> None:
    page = member.fetch("/api/folders").json()
    roots = str(member.workspace.parent / "roots")
    assert page["path"] == roots
    assert page["parent"] is None
    for path in ("/", "/etc", roots + "/..", roots + "/../..", "~", str(member.workspace.parent), "%00", "../roots"):
        assert member.fetch(f"/api/folders?path={path}").status == 404, path
    assert str(member.workspace.parent / "local") not in json.dumps(page)


def test_routes_only_read(local: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in ("datasets", f"datasets/{'0' * 12}", "folders"):
            assert local.fetch(f"/api/{path}", method=method, body=b"[]").status in (403, 404, 405)


# --- verbs: wrong types, huge texts -------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (
    *(None, [], {}, 7, -1, 1.5, True, "", "x" * 200_000, "\0", "\ud800", [[]], [None] * 10, {"a": 1}),
    *([None, None, None, None, None], ["0" * 12, "x", "y", "z", "q"], ["../../etc", "r", 0, "batch_size", 1]),
    *([{"id": 1}, {}, {}, {}], [["x"]], [1e308, 2**70, -5, "a", "b"]),
)


def test_verbs_answer_anything_with_a_sentence(desk: Desk, inside: Path) -> None:
    dataset = desk.new(clip_folder(inside / "a", 1))
    path = desk.services.datasets.get(dataset).path
    before = path.read_bytes()
    revision = desk.get(f"datasets/{dataset}")["revision"]
    key = desk.items(dataset)[0]["key"]
    filled = [[dataset, value, value, value, value] for value in WRONG[:14]]
    filled += [[dataset, revision, value, value, value] for value in WRONG[:14]]
    filled += [[dataset, [key], value] for value in WRONG[:6] if not isinstance(value, bool)]
    for name, verb in desk.verbs.items():
        # An unknown finding may be ignored and an empty check may be started; these change no file of the dataset.
        for arguments in (*WRONG, *filled):
            if name in ("check", "forget_dataset", "undo_captions", "redo_captions", "ignore_findings"):
                arguments = (
                    [value for value in arguments if value != dataset] if isinstance(arguments, list) else arguments
                )
            answer = verb(arguments)
            assert "error" in answer or "problems" in answer, (name, str(arguments)[:200], answer)
            assert "Traceback" not in json.dumps(answer)
    assert path.read_bytes() == before
    assert (inside / "a" / "clip0.txt").read_text().startswith("a grey card")


@pytest.mark.parametrize(
    "value", ["x" * 2_100_000, ["x" * 1000] * 3000, [["nested"]], {"a": "b"}, 2**80, "half \ud800"]
)
def test_values_that_are_no_settings(desk: Desk, inside: Path, value: Any) -> None:
    dataset = desk.new(clip_folder(inside / "a", 1))
    before = desk.get(f"datasets/{dataset}")
    answer = desk.call("set_key", dataset, before["revision"], 0, "caption_prefix", value)
    assert "error" in answer or "problems" in answer
    assert desk.get(f"datasets/{dataset}")["revision"] == before["revision"]


@pytest.mark.parametrize("key", ["a.b", "a = 1\n[x]", "", "x" * 200, '"', "general", "datasets"])
def test_keys_that_are_none(desk: Desk, inside: Path, key: str) -> None:
    dataset = desk.new(clip_folder(inside / "a", 1))
    before = desk.get(f"datasets/{dataset}")
    answer = desk.call("set_key", dataset, before["revision"], 0, key, "x")
    assert "error" in answer or "problems" in answer
    assert desk.get(f"datasets/{dataset}")["text"] == before["text"]


# --- roots --------------------------------------------------------------------------------------------------------


def test_no_verb_leads_out_of_the_roots(desk: Desk, inside: Path, outside: Path, workspace: Path) -> None:
    dataset = desk.new(clip_folder(inside / "a", 1))
    revision = desk.get(f"datasets/{dataset}")["revision"]
    before = desk.services.datasets.get(dataset).path.read_bytes()
    (outside / "set.toml").write_text(f"[[datasets]]\nimage_directory = {json.dumps(str(outside))}\n")
    (inside / "link.toml").symlink_to(outside / "set.toml")
    (inside / "way").symlink_to(outside)
    text = f"[[datasets]]\nimage_directory = {json.dumps(str(outside))}\n"
    calls = [
        ("new_dataset", str(outside), None), ("new_dataset", str(inside / "way"), None),
        ("new_dataset", str(inside / "a" / ".." / ".." / "outside"), None),
        ("open_dataset", str(outside / "set.toml")), ("open_dataset", str(inside / "link.toml")),
        ("open_dataset", "/etc/passwd"), ("add_entry", dataset, revision, str(outside), "image"),
        ("set_key", dataset, revision, 0, "video_directory", str(outside)),
        ("set_key", dataset, revision, 0, "video_directory", str(inside / "way")),
        ("set_key", dataset, revision, 0, "video_directory", "../../outside"),
        ("set_key", dataset, revision, 0, "cache_directory", str(outside)),
        ("set_key", dataset, revision, 0, "cache_directory", "/tmp/anywhere"),
        ("save_text", dataset, revision, text),
    ]  # fmt: skip
    for name, *arguments in calls:
        answer = desk.call(name, *arguments)
        assert "error" in answer or "problems" in answer, (name, arguments)
        assert SECRET not in json.dumps(answer)
    assert desk.services.datasets.get(dataset).path.read_bytes() == before
    assert [row["id"] for row in desk.get("datasets")["datasets"]] == [dataset]


def test_names_of_new_datasets_stay_in_their_folder(desk: Desk, inside: Path, workspace: Path) -> None:
    folder = clip_folder(inside / "a", 1)
    for name in ("../../escaped", "/tmp/escaped", "..", "a/b", "x\0y", "con", ".hidden", "é" * 90, "known"):
        answer = desk.call("new_dataset", str(folder), name)
        if "id" in answer:
            path = desk.services.datasets.get(answer["id"]).path
            assert path.parent == workspace / "datasets", name
            assert not path.name.startswith(".")
    assert list(workspace.parent.glob("*escaped*")) == []


def test_links_out_of_a_dataset_show_nothing_when_exposed(desk: Desk, inside: Path, outside: Path) -> None:
    """Neither pictures nor captions; and an edit never goes through a link."""
    write_image(inside / "a" / "own.png")
    (inside / "a" / "link.png").symlink_to(outside / "private.png")
    (inside / "a" / "own.txt").symlink_to(outside / "private.txt")
    dataset = desk.new(inside / "a")
    rows = {item["name"]: item for item in desk.items(dataset)}
    assert SECRET not in json.dumps(rows)
    assert (rows["own.png"]["caption"], rows["own.png"]["caption_editable"]) == (None, False)
    assert (rows["link.png"]["thumb"], rows["link.png"]["clips"]) == (None, [])
    for what in ("thumb", "seen", "preview"):
        assert desk.client.get(f"/api/datasets/{dataset}/{what}/{rows['link.png']['key']}").status_code == 404
    assert "error" in desk.call("set_caption", dataset, rows["own.png"]["key"], "none", "mine")
    how = {"find": "secret", "replace": "mine", "regex": False}
    assert desk.call("change_captions", dataset, None, None, how, False)["changed"] == 0
    assert desk.items(dataset, text="secret") == []
    assert (outside / "private.txt").read_text() == SECRET


def test_no_job_reads_what_a_jsonl_or_a_link_names_outside(desk: Desk, inside: Path, outside: Path) -> None:
    """Checks and caches of an exposed app are refused before a run is made; inside its roots they start."""
    write_image(inside / "a" / "own.png")
    lines = inside / "lines.jsonl"
    table = f'[[datasets]]\nimage_jsonl_file = "{lines}"\ncache_directory = "{inside / "cache"}"\n'
    (inside / "set.toml").write_text(table)
    dataset = desk.call("open_dataset", str(inside / "set.toml"))["id"]
    link = inside / "a" / "link.png"
    link.symlink_to(outside / "private.png")
    for path in (outside / "private.png", inside / ".." / "outside" / "private.png", link):
        lines.write_text(json.dumps({"image_path": str(path), "caption": "x"}) + "\n")
        assert "lies outside" in json.dumps(desk.call("check", dataset, None))
        with pytest.raises(Problems, match="lies outside"):
            desk.services.caching.cache(dataset, "all")
    assert desk.services.store.list() == []
    lines.write_text(json.dumps({"image_path": str(inside / "a" / "own.png"), "caption": "x"}) + "\n")
    assert desk.services.caching.cache(dataset, "text")


def test_a_source_that_becomes_a_link_is_not_shown(
    desk: Desk, inside: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roots are asked at every request, not only when the dataset was looked at."""
    write_image(inside / "a" / "own.png")
    dataset = desk.new(inside / "a")
    key = desk.items(dataset)[0]["key"]
    scans = desk.services.datasets.scans
    looked = scans.look(desk.services.datasets.get(dataset))
    monkeypatch.setattr(scans, "look", lambda *_: looked)
    (inside / "a" / "own.png").unlink()
    (inside / "a" / "own.png").symlink_to(outside / "private.png")
    assert desk.client.get(f"/api/datasets/{dataset}/thumb/{key}").status_code == 404


def test_lists_that_name_files_outside_show_nothing(desk: Desk, inside: Path, outside: Path) -> None:
    (inside / "list.jsonl").write_text(
        json.dumps({"image_path": str(outside / "private.png"), "caption": "x"}) + "\n"
        + json.dumps({"image_path": "../outside/private.png", "caption": "y"}) + "\n"
    )  # fmt: skip
    path = inside / "set.toml"
    caches = json.dumps(str(inside / "cache"))
    path.write_text(f'[[datasets]]\nimage_jsonl_file = "{inside}/list.jsonl"\ncache_directory = {caches}\n')
    dataset = desk.done("open_dataset", str(path))["id"]
    desk.settle(dataset)
    for item in desk.items(dataset):
        assert item["thumb"] is None
        assert desk.client.get(f"/api/datasets/{dataset}/thumb/{item['key']}").status_code == 404


def test_a_dataset_written_by_hand_that_leads_out_shows_nothing(desk: Desk, inside: Path, outside: Path) -> None:
    path = desk.services.workspace / "datasets" / "hand.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f"[[datasets]]\nimage_directory = {json.dumps(str(outside))}\n")
    (row,) = desk.get("datasets")["datasets"]
    page = desk.settle(row["id"])
    assert page["entries"][0]["sources"] == 0
    assert "outside" in page["problems"][0]["message"]
    assert "outside" in desk.call("check", row["id"], None)["problems"][0]["message"]
    assert desk.client.get(f"/api/datasets/{row['id']}/thumb/{source_key(0, 'private.png')}").status_code == 404


def test_keys_of_one_dataset_do_not_open_another(desk: Desk, inside: Path) -> None:
    first, second = desk.new(clip_folder(inside / "a", 2)), desk.new(clip_folder(inside / "b", 1))
    key = source_key(0, "clip1.mp4")
    assert desk.client.get(f"/api/datasets/{first}/thumb/{key}").status_code == 200
    assert desk.client.get(f"/api/datasets/{second}/thumb/{key}").status_code == 404
    forged = source_key(0, "../a/clip1.mp4")
    assert desk.client.get(f"/api/datasets/{second}/thumb/{forged}").status_code == 404
    assert "error" in desk.call("exclude", second, [key], True)


# --- texts that are markup ----------------------------------------------------------------------------------------


def test_markup_passes_as_data(workspace: Path, tmp_path: Path) -> None:
    """Names and captions are JSON with no content type that a browser would run."""
    desk = open_desk(workspace)
    name = "<img src=x onerror=alert(1)>.png"
    write_image(tmp_path / "<script>" / name)
    dataset = desk.new(tmp_path / "<script>")
    (item,) = desk.items(dataset)
    assert item["name"] == name
    text = "</script><script>alert('x')</script> & \u2028 \" '"
    desk.done("set_caption", dataset, item["key"], "none", text)
    answer = desk.client.get(f"/api/datasets/{dataset}/items")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["items"][0]["caption"] == text
    assert "<" not in item["thumb"]
    picture = desk.client.get("/" + item["thumb"])
    assert picture.headers["content-type"] == "image/webp"
    assert "sandbox" in picture.headers["content-security-policy"]
    desk.services.close()


def test_names_that_are_no_text(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    write_image(folder / "a.png")
    os.rename(folder / "a.png", os.fsencode(folder) + b"/\xff\xfe.png")
    write_image(folder / "line\nbreak.png")
    desk = open_desk(workspace)
    dataset = desk.new(folder)
    items = desk.items(dataset)
    assert len(items) == 2
    for item in items:
        assert desk.client.get("/" + item["thumb"]).status_code == 200
    answer = desk.call("exclude", dataset, [item["key"] for item in items], True)
    assert "error" in answer or "revision" in answer
    desk.services.close()
