"""The live view of trainings without a browser: increments, attempts, time budget, requests, comparison, routes."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from backend.errors import UserError
from k5ui.api import router
from k5ui.live_api import live_verbs
from k5ui.services import Services
from k5ui.tabs.training_live import live_view_verbs
from k5ui.training.compare import compare
from k5ui.training.journal import TrainingJournal
from k5ui.training.live import MAX_POINTS, Window
from tests.fakes.training_journal import RunWriter, curve, write_run
from tests.fakes.training_stub import TrainingStub

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(64)


@pytest.fixture
def services(workspace: Path) -> Services:
    return Services(workspace)


@pytest.fixture
def make(services: Services) -> Callable[..., RunWriter]:
    def one(run_id: str = "20261124-0100-aaaaaa", **more: Any) -> RunWriter:
        return RunWriter(services.store.runs_folder / run_id, **more)

    return one


class PageSide:
    """What static/training_live_chart.js does with the answers, in Python."""

    def __init__(self, services: Services, run: str, **window: Any) -> None:
        self.services, self.run, self.window = services, run, window
        self.key, self.rows, self.validations = "", 0, -1
        self.step: list[int] = []
        self.loss: list[float | None] = []
        self.smooth: list[float | None] = []
        self.answer: dict[str, Any] = {}

    def poll(self) -> PageSide:
        window = Window(self.rows, self.key, validations=self.validations, **self.window)
        answer = self.answer = self.services.live.series(self.run, window)
        cut, smooth_cut = (
            0 if answer["reset"] else sum(step < answer[name] for step in self.step) for name in ("from", "smooth_from")
        )
        self.step[cut:] = answer["step"]
        self.loss[cut:] = answer["loss"]
        self.smooth[smooth_cut:] = answer["smooth"]
        self.key, self.rows, self.validations = answer["key"], answer["rows"], answer["validations"]
        return self


# --- the chart by increments --------------------------------------------------------------------------------------


def test_a_page_that_polls_has_what_a_page_that_opens_late_gets(services: Services, make) -> None:
    """Only the end is sent and replaced, yet every value equals that of a whole answer, the smoothed ones too."""
    run, chance = make(), random.Random(3)
    run.claim()
    page = PageSide(services, run.folder.name)
    sent = []
    for step in range(1, 6001):
        run.step(step, 6000, curve(step, 6000, chance) if step % 97 else None)
        if step % 150 == 0:
            run.flush()
            page.poll()
            sent.append((page.answer["reset"], len(page.answer["step"])))
            late = PageSide(services, run.folder.name).poll()
            assert (page.step, page.loss) == (late.step, late.loss)
            assert len(page.smooth) == len(page.step) <= MAX_POINTS
            assert page.smooth == pytest.approx(late.smooth, rel=1e-4)
    increments = [count for reset, count in sent if not reset]
    assert len(increments) >= len(sent) / 2
    assert max(increments) <= 200
    assert page.poll().answer["step"] == [], "nothing new, nothing sent"


def test_zoom_shows_single_steps_and_the_same_smoothing(services: Services) -> None:
    run = write_run(services.store.runs_folder / "20261124-0100-aaaaaa", 8_000)
    wide = PageSide(services, run.folder.name)
    while wide.poll().answer["read"] < 1:
        continue
    near = PageSide(services, run.folder.name, first=3000, last=3100).poll()
    assert near.step[0] <= 3000
    assert near.step[-1] >= 3100
    assert near.step == list(range(near.step[0], near.step[-1] + 1))
    shared = [
        (wide.smooth[wide.step.index(step)], near.smooth[near.step.index(step)])
        for step in set(wide.step) & set(near.step)
    ]
    assert len(shared) > 4
    for from_far, from_near in shared:
        assert from_near == pytest.approx(from_far, rel=2e-3)


def test_a_long_journal_is_read_over_several_calls_each_of_them_short(services: Services) -> None:
    run = write_run(services.store.runs_folder / "20261124-0100-aaaaaa", 12_000)
    journal = TrainingJournal(run.folder / "events.jsonl")
    shares, longest = [], 0.0
    while not shares or shares[-1] < 1:
        began = time.monotonic()
        shares.append(journal.read(0.02))
        longest = max(longest, time.monotonic() - began)
    assert len(shares) > 2
    assert shares == sorted(shares)
    assert journal.columns.rows == 12_000
    assert longest < 1.0


def test_a_journal_that_was_replaced_is_read_anew(services: Services, make) -> None:
    run = make()
    run.claim()
    for step in range(1, 51):
        run.step(step, 100, 1.0)
    run.flush()
    page = PageSide(services, run.folder.name).poll()
    (run.folder / "events.jsonl").write_text("")
    assert page.poll().step == []
    assert page.answer["reset"]


def test_validations_are_sent_once_and_the_latest_of_a_step_counts(services: Services, make) -> None:
    run = make()
    run.claim()
    run.step(1, 10, 1.0)
    for loss in (0.5, 0.4):
        run.emit("validation", step=1, epoch=1, loss=loss, by_sigma=[], items=2, took_seconds=0.1)
    run.flush()
    page = PageSide(services, run.folder.name).poll()
    assert page.answer["validation"] == {"step": [1], "loss": [0.4]}
    assert page.poll().answer["validation"] is None


# --- where the time goes ------------------------------------------------------------------------------------------


def test_time_is_put_where_it_was_spent(services: Services, make) -> None:
    run = make()
    run.claim()
    run.time += 9
    run.emit("phase", phase="train", message="Training")
    for step in range(1, 11):
        run.step(step, 20, 1.0, 0.5)
    run.time += 4  # no phase told of it: what took longer than the sample says is still training
    run.emit(
        "sample", step=10, epoch=1, index=1, path="samples/x.png", kind="image", prompt="x", seed=1, took_seconds=3.0
    )
    run.time += 2
    run.save("a.safetensors", 10, took_seconds=2.0)
    run.emit("phase", phase="validate", message="")
    run.time += 6
    run.emit("validation", step=10, epoch=1, loss=1.0, by_sigma=[], items=2, took_seconds=6.0)
    run.step(11, 20, 1.0, 0.5)
    run.flush()
    page = services.live.page(run.folder.name)
    assert page["budget"] == pytest.approx({"load": 9, "train": 6.5, "sample": 3, "save": 2, "validate": 6}, abs=0.01)


# --- attempts -----------------------------------------------------------------------------------------------------


def two_attempts(services: Services, folder: str | None = None) -> tuple[RunWriter, RunWriter]:
    """A run of 100 steps with a state at 60, and one that went on from there to 90."""
    runs, now = services.store.runs_folder, time.time()
    more = {} if folder is None else {"output_dir": folder}
    first = RunWriter(runs / "20261124-0100-aaaaaa", "first", now - 2000, **more)
    first.claim()
    for step in range(1, 101):
        first.step(step, 200, 1.0)
        if step == 60:
            state = first.save("first-state", 60, "state")
            if folder is not None:
                state = state.rename(Path(folder) / "first-state")
                first._waiting[-1] = first._waiting[-1].replace("checkpoints/first-state", os.fspath(state))
    first.end("stopped", reason="Stopped on request.", step=100)
    second = RunWriter(runs / "20261124-0101-bbbbbb", "second", now - 1000, resume=os.fspath(state), **more)
    second.claim()
    for step in range(61, 91):
        second.step(step, 200, 2.0)
    second.end("stopped", reason="Stopped on request.", step=90)
    return first, second


@pytest.mark.parametrize("elsewhere", [False, True])
def test_earlier_attempts_are_found_by_the_state_and_end_where_the_next_began(
    services: Services, tmp_path: Path, elsewhere: bool
) -> None:
    first, second = two_attempts(services, os.fspath(tmp_path) if elsewhere else None)
    name = second.folder.name
    page = services.live.page(name)
    assert [(row["run"], row["after"]) for row in page["attempts"]] == [(first.folder.name, None), (name, 60)]
    assert PageSide(services, name).poll().step == list(range(61, 91))
    whole = PageSide(services, name, chain=True).poll()
    assert whole.step == list(range(1, 91))
    assert whole.loss == [1.0] * 60 + [2.0] * 30
    assert (60, "resume") in services.live.page(name, chain=True)["marks"]


def test_a_state_of_nobody_and_a_circle_of_states_end_the_search(services: Services, make) -> None:
    alone = make("20261124-0200-cccccc", resume="/nowhere/x-state")
    alone.claim()
    alone.end()
    assert len(services.live.page(alone.folder.name)["attempts"]) == 1
    same = services.store.runs_folder / "20261124-0201-dddddd" / "checkpoints" / "s"
    loop = make("20261124-0201-dddddd", resume=os.fspath(same))
    loop.claim()
    loop.save("s", 1, "state")
    loop.end()
    assert len(services.live.page(loop.folder.name)["attempts"]) == 1


# --- lists --------------------------------------------------------------------------------------------------------


def test_the_stub_of_the_engine_fills_every_list(services: Services) -> None:
    folder = services.store.runs_folder / "20261124-0100-aaaaaa"
    run = RunWriter(folder)
    options = {"max_train_steps": 40, "save_every_n_steps": 10, "save_state": True, "sample_every_n_steps": 20}
    from backend.events import Journal

    with Journal(folder / "events.jsonl") as journal:
        stub = TrainingStub(journal, folder, {**options, "validate_every_n_steps": 8, "training_comment": "[nan]"})
        assert stub.play("kandinsky5_train_network", PICTURE) == 0
    (folder / "result.json").write_text(json.dumps({"exit_code": 0, "signal": None, "ended": run.time}))
    page = services.live.page(folder.name)
    assert (page["state"], page["step"], page["epoch"], page["epochs"]) == ("finished", 40, 2, 2)
    assert page["skipped"] == 4
    assert {row["kind"] for row in page["checkpoints"]} == {"lora", "state"}
    assert [row["step"] for row in page["checkpoints"] if row["kind"] == "lora"] == [40, 30, 20, 10]
    assert [(row["step"], row["index"]) for row in page["samples"]] == [(40, 1), (40, 2), (20, 1), (20, 2)]
    assert [row["index"] for row in page["prompts"]] == [1, 2]
    assert services.media.resolve(page["samples"][0]["media"]) is not None
    assert {kind for _, kind in page["marks"]} == {"lora", "state", "sample"}
    again = services.live.page(folder.name, version=page["version"])
    assert "checkpoints" not in again
    assert PageSide(services, folder.name).poll().answer["validation"]["step"] == [8, 16, 24, 32, 40]


def test_what_was_removed_or_lies_elsewhere_is_not_offered(services: Services, make) -> None:
    run = make()
    run.claim()
    gone = run.save("gone.safetensors", 1)
    run.save("here.safetensors", 2)
    run.save("half-state", 2, "state")
    (run.folder / "checkpoints" / "half-state" / "COMPLETE.json").unlink()
    run.emit("checkpoint", step=3, epoch=1, path="../../../escape.safetensors", kind="lora", why="step", bytes=1)
    run.emit("checkpoint", step=3, epoch=1, path="checkpoints/x", kind="else", why="step", bytes=1)
    (services.workspace / "escape.safetensors").write_bytes(b"x")
    gone.unlink()
    run.end()
    rows = services.live.page(run.folder.name)["checkpoints"]
    assert [row["name"] for row in rows] == ["here.safetensors"]
    assert services.live.lora(run.folder.name, rows[0]["path"]) == (rows[0]["path"], "k5-demo-t2v")
    for path in (os.fspath(gone), "/etc/passwd", ""):
        with pytest.raises(UserError):
            services.live.lora(run.folder.name, path)


def test_an_exposed_app_offers_no_file_outside_of_its_roots(workspace: Path, tmp_path: Path) -> None:
    exposed = Services(workspace, exposed=True)
    run = RunWriter(exposed.store.runs_folder / "20261124-0100-aaaaaa")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"x")
    run.claim()
    run.emit("checkpoint", step=3, epoch=1, path=os.fspath(outside), kind="lora", why="step", bytes=1)
    run.end()
    assert exposed.live.page(run.folder.name)["checkpoints"] == []
    assert len(Services(workspace).live.page(run.folder.name)["checkpoints"]) == 1


def test_a_training_shows_in_lists_with_its_epoch_and_not_among_the_clips(services: Services, make) -> None:
    run = make()
    run.claim()
    run.step(7, 96, 0.25)
    run.emit("phase", phase="sample", message="Sampling")
    path = run.folder / "samples" / "a.png"
    path.parent.mkdir()
    path.write_bytes(PICTURE)
    run.emit("sample", step=7, epoch=1, index=1, path="samples/a.png", kind="image", prompt="x", seed=1)
    run.end()
    (row,) = services.live.list()
    assert (row["step"], row["total"], row["loss"], row["state"]) == (7, 96, 0.25, "finished")
    (listed,) = services.run_pages()
    assert (listed["epoch"], listed["epochs"], listed["unit"], listed["phase"]) == (1, 2, "steps", "sample")
    assert len(listed["outputs"]) == 1
    assert services.clips() == []


# --- requests -----------------------------------------------------------------------------------------------------


def test_requests_are_written_shown_and_refused_after_the_end(services: Services, make) -> None:
    run = make(created=time.time())
    run.claim(alive=True)
    run.step(1, 10, 1.0)
    run.flush()
    name = run.folder.name
    (ask,) = [verb for verb in live_verbs(services) if verb.__name__ == "ask_train"]
    assert ask([name, "save"]) == {}
    assert ask([name, "sample"]) == {}
    assert services.live.page(name)["requests"] == ["sample", "save"]
    (run.folder / "requests" / "save").unlink()  # as the engine takes it
    run.emit("request_done", request="save", step=2)
    assert ask([name, "stop_after_epoch"]) == {}
    (run.folder / "requests" / "stop_after_epoch").unlink()
    run.emit("request_done", request="stop_after_epoch", step=2)
    run.flush()
    assert services.live.page(name)["requests"] == ["sample", "stop_after_epoch"], "it will stop, so it says so"
    run.end("stopped", reason="Stopped.", step=2)
    assert services.live.page(name)["requests"] == []
    assert "not working" in ask([name, "save"])["error"]


@pytest.mark.parametrize("arguments", [None, [], ["x"], ["../x", "save"], ["nothing", "save"], [1, 2], ["a", "b", "c"]])
def test_hostile_requests_are_sentences(services: Services, arguments: Any) -> None:
    (ask,) = live_verbs(services)
    assert set(ask(arguments)) == {"error"}


def test_unknown_requests_make_no_file(services: Services, make) -> None:
    run = make(created=time.time())
    run.claim(alive=True)
    (ask,) = live_verbs(services)
    assert set(ask([run.folder.name, "../../evil"])) == {"error"}
    assert os.listdir(run.folder / "requests") == []


def test_the_view_has_the_verbs_that_its_buttons_call(services: Services) -> None:
    names = {verb.__name__ for verb in live_view_verbs(services)}
    assert names == {"stop", "dequeue", "kill", "trash", "ask_train", "clone_train", "resume_train"}


# --- comparison ---------------------------------------------------------------------------------------------------


def test_only_differences_are_rows_in_the_order_of_the_definitions() -> None:
    a = {"task": "k5-demo-t2v", "network_dim": 16, "learning_rate": 1, "seed": 3, "unknown": "x"}
    b = {"task": "k5-demo-t2v", "network_dim": 32, "learning_rate": 1.0, "output_name": "k5_lora"}
    rows = compare(("train", a), ("train", b))
    assert [row["name"] for row in rows] == ["seed", "network_dim", "unknown"]
    seed, rank, unknown = rows
    assert (seed["group"], seed["a"], seed["b"], seed["b_default"]) == ("length", 3, None, True)
    assert (rank["a_default"], rank["b_default"]) == (False, False)
    assert unknown["group"] == "other"


def test_runs_of_different_kinds_can_be_compared() -> None:
    rows = {row["name"]: row for row in compare(("train", {"seed": 1}), ("generate", {"seed": 1, "steps": 9}))}
    assert "seed" not in rows
    assert rows["steps"]["a"] is None
    assert not rows["steps"]["a_default"]
    assert rows["network_dim"]["a_default"]


# --- routes -------------------------------------------------------------------------------------------------------


def test_routes_answer_and_what_is_not_there_is_not_found(services: Services, make) -> None:
    app = FastAPI()
    app.include_router(router(services))
    client = TestClient(app)
    assert client.get("/api/live").json() == {"trainings": []}
    run = make()
    run.claim()
    run.step(1, 10, float("1.5"))
    run.end()
    name = run.folder.name
    assert client.get(f"/api/live/{name}").json()["step"] == 1
    assert client.get(f"/api/live/{name}/series").json()["loss"] == [1.5]
    assert client.get("/api/live/compare", params={"a": name, "b": name}).json()["rows"] == []
    (services.store.runs_folder / "clip").mkdir()
    (services.store.runs_folder / "clip" / "options.toml").write_text('task = "k5-demo-t2v"\n')
    for path in ("nothing", "clip", "%2e%2e", "nothing/series", "clip/series", "compare?a=clip&b=nothing"):
        assert client.get(f"/api/live/{path}").status_code == 404, path
    for query in ("points=2001", "points=9", "since=-1", "smoothing=5", "first=-1", "key=" + "x" * 8001):
        assert client.get(f"/api/live/{name}/series?{query}").status_code == 422, query
    assert client.post(f"/api/live/{name}").status_code == 405
