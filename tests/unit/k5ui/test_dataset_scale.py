"""Ten thousand items: pages come from the snapshot, nothing is looked at again, and the look itself is not felt."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.k5ui.dataset_kit import Desk, open_desk, write_image

COUNT = 10_000
CAPTIONS = 2_000


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    found = open_desk(tmp_path_factory.mktemp("scale") / "workspace")
    yield found
    found.services.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_image(folder / "00000.png", (16, 16))
    for number in range(1, COUNT):
        os.link(folder / "00000.png", folder / f"{number:05d}.png")
    for number in range(CAPTIONS):
        (folder / f"{number:05d}.txt").write_text(f"card number {number}")
    return folder


def timed(desk: Desk, route: str, **query: object) -> tuple[float, dict]:
    started = time.perf_counter()
    page = desk.get(route, **query)
    return time.perf_counter() - started, page


def test_ten_thousand_items(desk: Desk, folder: Path) -> None:
    started = time.perf_counter()
    dataset = desk.done("new_dataset", str(folder), None)["id"]
    created = time.perf_counter() - started
    slowest = 0.0
    while True:
        seconds, page = timed(desk, f"datasets/{dataset}")
        slowest = max(slowest, seconds)
        if page["scanned"]:
            break
        time.sleep(0.02)
    looked = time.perf_counter() - started
    library = desk.services.datasets
    looker = library.scans._task(library.get(dataset))._looker
    assert looker.opened == COUNT
    first = library.snapshot(library.get(dataset))
    queries = {
        "first page": {"limit": 60},
        "last page": {"offset": COUNT - 60, "limit": 60},
        "200 items": {"limit": 200, "offset": 4000},
        "search": {"text": "number 77", "limit": 60},
        "no caption": {"only": "no_caption"},
    }
    print(f"\n{COUNT} items: made in {created:.2f} s, looked at in {looked:.2f} s")
    print(f"  slowest answer meanwhile: {slowest * 1000:.0f} ms")
    for name, query in queries.items():
        seconds = min(timed(desk, f"datasets/{dataset}/items", **query)[0] for _ in range(3))
        print(f"  {name}: {seconds * 1000:.0f} ms")
    assert timed(desk, f"datasets/{dataset}/items", text="number 77")[1]["total"] == 11
    assert timed(desk, f"datasets/{dataset}/items", only="no_caption")[1]["total"] == COUNT - CAPTIONS
    assert looker.opened == COUNT, "no page looked at the files again"
    assert library.snapshot(library.get(dataset)) is first


@pytest.mark.bench
def test_many_captions_at_once(desk: Desk, folder: Path) -> None:
    for number in range(CAPTIONS, COUNT):
        (folder / f"{number:05d}.txt").write_text(f"card number {number}")
    row = {"id": desk.new(folder)}
    how = {"find": r"number (\d+)", "replace": r"no. \1", "regex": True, "prefix": "k5x ", "suffix": ""}
    started = time.perf_counter()
    assert desk.done("change_captions", row["id"], None, None, how, True)["changed"] == COUNT
    dry = time.perf_counter() - started
    answer = desk.done("change_captions", row["id"], None, None, how, False)
    done = time.perf_counter() - started - dry
    assert (answer["changed"], answer["undo"]) == (COUNT, 1)
    assert (folder / "00077.txt").read_text() == "k5x card no. 77"
    started = time.perf_counter()
    assert desk.done("undo_captions", row["id"])["changed"] == COUNT
    undone = time.perf_counter() - started
    print(f"\n{COUNT} captions: tried in {dry:.2f} s, changed in {done:.2f} s, undone in {undone:.2f} s")
    assert (folder / "00077.txt").read_text() == "card number 77"
