"""Checks of datasets from the page: the job that is queued, its report with keys, what is ignored, what is repaired."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backend.config.cache import CheckDatasetOptions
from backend.config.options import from_mapping, load_toml
from k5ui.datasets.findings import Reports
from k5ui.datasets.keys import source_key
from tests.unit.k5ui.dataset_kit import Desk, open_desk, write_image


@pytest.fixture
def desk(workspace: Path) -> Iterator[Desk]:
    found = open_desk(workspace)
    yield found
    found.services.close()


@pytest.fixture
def dataset(desk: Desk, tmp_path: Path) -> str:
    for name in ("a", "b", "c"):
        write_image(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text("the same")
    return desk.new(tmp_path / "pictures")


def finding(kind: str, names: list[str], **more: Any) -> dict[str, Any]:
    values = {"id": f"{kind[:8]:0<16}", "kind": kind, "severity": "warning", "dataset": 0, "identities": names}
    return values | {"message": f"about {kind}", "values": {}, "fixes": ["exclude"]} | more


def finish(desk: Desk, run_id: str, found: list[Any], **more: Any) -> None:
    """Let a run end as the engine would have ended it."""
    desk.services.queue.remove(run_id)
    folder = desk.services.store.get(run_id).folder
    now = time.time()
    (folder / "started.json").write_text(json.dumps({"time": now}))
    (folder / "result.json").write_text(json.dumps({"exit_code": 0, "signal": None, "ended": now}))
    record = {"v": 1, "seq": 1, "t": now, "type": "finished", "outputs": [], "seconds": 1.0}
    (folder / "events.jsonl").write_text(json.dumps(record) + "\n")
    report = {"version": 1, "datasets": [{"index": 0, "sources": 3, "checked": 3}], "findings": found} | more
    (folder / "findings.json").write_text(json.dumps(report))


def test_a_check_is_queued_with_its_options(desk: Desk, dataset: str) -> None:
    assert desk.get(f"datasets/{dataset}/lint") | {"run": None, "findings": [], "stale": False} == desk.get(
        f"datasets/{dataset}/lint"
    )
    run_id = desk.done("check", dataset, " k5x ")["run"]
    run = desk.services.store.get(run_id)
    assert (run.kind, run.entry) == ("check_dataset", "kandinsky5_check_dataset")
    assert desk.services.queue.pending() == [run_id]
    options = from_mapping(CheckDatasetOptions, load_toml(run.folder / "options.toml"))
    assert options.dataset_config == str(desk.services.datasets.get(dataset).path)
    assert options.trigger_word == "k5x"
    assert options.text_encoder_qwen is not None, "a dataset of the demo's size is counted with the demo's tokenizer"
    assert Path(options.text_encoder_qwen).is_dir()
    assert desk.get(f"datasets/{dataset}/lint")["run"]["state"] == "queued"


def test_findings_have_keys_and_can_be_ignored(desk: Desk, dataset: str, workspace: Path) -> None:
    run_id = desk.done("check", dataset, None)["run"]
    rows = [finding("black", ["a.png"]), finding("near_duplicate", ["b.png", "c.png"])]
    finish(desk, run_id, rows)
    page = desk.get(f"datasets/{dataset}/lint")
    assert (page["stale"], page["run"]["state"]) == (False, "finished")
    assert (page["checked"], page["counts"]) == (3, {"black": 1, "near_duplicate": 1})
    assert page["findings"][1]["keys"] == [source_key(0, "b.png"), source_key(0, "c.png")]
    short = {item["name"]: [row["kind"] for row in item["findings"]] for item in desk.items(dataset)}
    assert short == {"a.png": ["black"], "b.png": ["near_duplicate"], "c.png": ["near_duplicate"]}
    desk.done("ignore_findings", dataset, [rows[1]["id"]], True)
    assert [item["name"] for item in desk.items(dataset, only="findings")] == ["a.png"]
    page = desk.get(f"datasets/{dataset}/lint")
    assert [row["ignored"] for row in page["findings"]] == [False, True]
    assert page["counts"] == {"black": 1}
    assert (workspace / "datasets" / "ignored" / f"{dataset}.json").is_file()
    desk.done("ignore_findings", dataset, [rows[1]["id"]], False)
    assert len(desk.items(dataset, only="findings")) == 3


def test_a_report_of_an_older_file_is_stale(desk: Desk, dataset: str) -> None:
    finish(desk, desk.done("check", dataset, None)["run"], [])
    path = desk.services.datasets.get(dataset).path
    path.write_text(path.read_text() + "# more\n")
    assert desk.get(f"datasets/{dataset}/lint")["stale"] is True


def test_the_newest_finished_check_counts(desk: Desk, dataset: str) -> None:
    finish(desk, desk.done("check", dataset, None)["run"], [finding("black", ["a.png"])])
    waiting = desk.done("check", dataset, None)["run"]
    page = desk.get(f"datasets/{dataset}/lint")
    assert page["run"]["id"] == waiting
    assert page["counts"] == {"black": 1}


def test_duplicates_are_excluded_but_for_the_first(desk: Desk, dataset: str) -> None:
    run_id = desk.done("check", dataset, None)["run"]
    row = finding("near_duplicate", ["a.png", "b.png", "c.png"])
    finish(desk, run_id, [row, finding("black", ["a.png"])])
    assert "error" in desk.call("fix_finding", dataset, row["id"], "exclude", [source_key(0, "other.png")])
    desk.done("fix_finding", dataset, row["id"], "exclude", None)
    assert desk.services.datasets.config(dataset).datasets[0].exclude == ("b.png", "c.png")
    desk.until(dataset, lambda page: page["items"] == 1)


def test_settings_are_repaired(desk: Desk, dataset: str) -> None:
    run_id = desk.done("check", dataset, "k5x")["run"]
    missing = finding("missing_trigger", ["a.png"], values={"trigger_word": "k5x"}, fixes=["add_prefix"])
    odd = finding("odd_fps", ["a.png"], fixes=["set_source_fps_auto"])
    finish(desk, run_id, [missing, odd])
    desk.done("fix_finding", dataset, missing["id"], "add_prefix", None)
    desk.done("fix_finding", dataset, missing["id"], "add_prefix", None)
    assert desk.services.datasets.config(dataset).datasets[0].caption_prefix == "k5x", "once"
    answer = desk.call("fix_finding", dataset, odd["id"], "set_source_fps_auto", None)
    assert answer["problems"], "these are images, which have no rate"
    assert "no such finding" in desk.call("fix_finding", dataset, odd["id"], "exclude", None)["error"]
    assert "no such finding" in desk.call("fix_finding", dataset, "0" * 16, "exclude", None)["error"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b'{"findings": 7}', b'{"findings": [1, {"id": 2}, {"identities": [3]}], "datasets": "x"}',
        b'{"findings": [{"id": "a", "kind": "b", "severity": "c", "message": "d", "dataset": "e"}]}',
    ],
)  # fmt: skip
def test_damaged_reports_hold_no_findings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "findings.json").write_bytes(content)
    report = Reports().read(tmp_path)
    assert report is None or report["findings"] == []
