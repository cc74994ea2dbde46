"""Opaque media ids: bound to a run and a path, made by this workspace only."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from backend.errors import UserError
from k5ui.media import MediaIds


@pytest.fixture
def media(workspace: Path) -> MediaIds:
    (workspace / "runs" / "r1" / "outputs").mkdir(parents=True)
    (workspace / "runs" / "r1" / "outputs" / "clip é.mp4").write_bytes(b"clip")
    (workspace / "runs" / "r2").mkdir()
    (workspace / "runs" / "r2" / "x.png").write_bytes(b"x")
    (workspace / "outside.png").write_bytes(b"outside")
    return MediaIds(workspace / "runs", workspace / ".secret")


def test_an_id_leads_back_to_its_file(media: MediaIds, workspace: Path) -> None:
    offered = media.offer("r1", "outputs/clip é.mp4")
    assert offered is not None
    found = media.resolve(offered[0])
    assert found is not None
    assert (found.path.read_bytes(), found.run_id, found.content_type) == (b"clip", "r1", "video/mp4")
    again = MediaIds(workspace / "runs", workspace / ".secret")
    assert again.resolve(offered[0]) == found, "addresses survive a restart"


@pytest.mark.parametrize(
    "path",
    [
        "../r2/x.png",
        "../../outside.png",
        "/etc/passwd",
        "outputs",
        "outputs/none.mp4",
        "options.toml",
        "",
        "a\0.png",
        "link.png",
    ],
)
def test_what_is_never_offered(media: MediaIds, workspace: Path, path: str) -> None:
    (workspace / "runs" / "r1" / "link.png").symlink_to(workspace / "outside.png")
    assert media.offer("r1", path) is None
    assert media.resolve(media.id_for("r1", path)) is None, "not even under a right signature"


@pytest.mark.parametrize("run", ["", "..", ".", "r1/../r2", "nobody"])
def test_runs_that_are_none(media: MediaIds, run: str) -> None:
    assert media.resolve(media.id_for(run, "x.png")) is None


def test_a_linked_run_is_none(media: MediaIds, workspace: Path) -> None:
    (workspace / "runs" / "r3").symlink_to(workspace / "runs" / "r2")
    assert media.offer("r3", "x.png") is None


def test_one_changed_character_is_another_id(media: MediaIds) -> None:
    good = media.id_for("r2", "x.png")
    assert media.resolve(good) is not None
    for index, letter in enumerate(good):
        other = good[:index] + ("A" if letter != "A" else "B") + good[index + 1 :]
        assert media.resolve(other) is None
    for other in ("", "=", good + "=", good + "A", good[:-1], "x" * 5000, good.replace("-", "+"), "é" + good):
        assert other == good or media.resolve(other) is None


def test_the_secret_is_private_and_shared_by_two_apps(workspace: Path) -> None:
    (workspace / "runs" / "r").mkdir(parents=True)
    made: list[str] = []

    def start() -> None:
        made.append(MediaIds(workspace / "runs", workspace / "fresh").id_for("r", "x.png"))

    threads = [threading.Thread(target=start) for _ in range(2)]
    start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert (workspace / "fresh").stat().st_mode & 0o777 == 0o600


def test_a_damaged_secret_is_reported(workspace: Path) -> None:
    (workspace / ".secret").write_bytes(b"short")
    with pytest.raises(UserError, match="Delete it"):
        MediaIds(workspace / "runs", workspace / ".secret")
