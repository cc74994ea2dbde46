"""How long caching takes: measured from finished runs, never invented; and what is kept while it is made."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.jobs.store import Run
from k5ui.caching.keeper import Keeper
from k5ui.caching.pace import Measured, Work, expected_seconds, measure, note_work, same_kind
from tests.unit.k5ui.caching_kit import write_journal


def run_folder(folder: Path) -> Run:
    return Run("run", folder, "cache_latents", "a", 0.0, "")


def journal(folder: Path, kind: str = "items", total: int = 4, end: float = 15.0) -> None:
    """Ten seconds of loading, then work until second `end`."""
    write_journal(
        run_folder(folder),
        ("started", 0, {}),
        ("progress", 1, {"done": 9, "total": 9, "unit": "sources"}),
        ("phase", 2, {"phase": "load", "message": ""}),
        ("phase", 10, {"phase": "vae", "message": ""}),
        ("progress", 12, {"done": 1, "total": total, "unit": kind}),
        ("progress", end, {"done": total, "total": total, "unit": kind}),
        ("finished", 16, {"seconds": 16.0}),
    )


def test_a_latent_run_is_measured_by_its_pixels(tmp_path: Path) -> None:
    note_work(tmp_path, Work(4, 2.5))
    journal(tmp_path)
    found = measure(tmp_path, "cache_latents", 16.0)
    assert found is not None
    assert found.size == 2.5
    assert found.seconds == pytest.approx(5.0, abs=1e-3)
    assert found.before == pytest.approx(11.0, abs=1e-3)


def test_runs_that_tell_nothing_are_left_out(tmp_path: Path) -> None:
    """Another number of items than was asked for, no note of the work, an empty or a torn journal, no end."""
    journal(tmp_path, total=3)
    assert measure(tmp_path, "cache_latents", 16.0) is None
    note_work(tmp_path, Work(4, 2.5))
    assert measure(tmp_path, "cache_latents", 16.0) is None
    note_work(tmp_path, Work(3, 2.5))
    assert measure(tmp_path, "cache_latents", None) is None
    assert measure(tmp_path, "cache_latents", 16.0) is not None
    for content in (b"", b"{torn", b'{"v":1,"seq":1,"t":5.0,"type":"progress","unit":"items","total":"x"}\n'):
        (tmp_path / "events.jsonl").write_bytes(content)
        assert measure(tmp_path, "cache_latents", 16.0) is None


def test_captions_are_counted(tmp_path: Path) -> None:
    journal(tmp_path, "captions", total=20)
    found = measure(tmp_path, "cache_text", 16.0)
    assert found is not None
    assert found.size == 20


def test_the_forecast_is_the_mean_of_the_newest_runs() -> None:
    past = [Measured(10.0, 20.0, 4.0), Measured(6.0, 10.0, 2.0)]
    assert expected_seconds(past, Work(3, 8.0)) == pytest.approx(8.0 + 8.0 * 30 / 6)
    assert expected_seconds(past, Work()) == 0.0
    assert expected_seconds([], Work(3, 8.0)) is None, "nobody knows, so nothing is said"
    assert expected_seconds([Measured(0.0, 1.0, 1.0)] * 5 + [Measured(900.0, 900.0, 1.0)], Work(1, 1.0)) == 1.0


def test_other_weights_are_another_kind_of_run() -> None:
    options = {"vae": "/a", "vae_dtype": "float32", "dataset_config": "x", "seed": 1}
    assert same_kind("cache_latents", options) == same_kind("cache_latents", options | {"dataset_config": "y"})
    assert same_kind("cache_latents", options) != same_kind("cache_latents", options | {"vae": "/b"})
    assert same_kind("cache_latents", options) != same_kind("cache_text", options)


# --- the keeper ---------------------------------------------------------------------------------------------------


def look_until(keeper: Keeper, reasons: object, what) -> None:
    end = time.monotonic() + 5
    while not what(keeper.look("a", reasons)) and time.monotonic() < end:
        time.sleep(0.005)
    assert what(keeper.look("a", reasons))


def test_a_value_is_made_once_and_again_for_a_reason() -> None:
    made: list[int] = []
    keeper = Keeper(lambda key: made.append(1) or len(made))
    assert keeper.look("a", 1).working
    look_until(keeper, 1, lambda kept: kept.value == 1)
    for _ in range(5):
        keeper.look("a", 1)
    assert len(made) == 1
    look_until(keeper, 2, lambda kept: kept.value == 2)
    keeper.ask("a")
    look_until(keeper, 2, lambda kept: kept.value == 3)


def test_the_old_value_is_shown_while_the_new_one_is_made() -> None:
    gate = threading.Event()
    gate.set()
    keeper = Keeper(lambda key: gate.wait(5))
    look_until(keeper, 1, lambda kept: kept.value is True)
    gate.clear()
    kept = keeper.look("a", 2)
    assert kept.working
    assert kept.value is True
    gate.set()
    look_until(keeper, 2, lambda kept: not kept.working)


def test_a_failure_is_a_sentence_and_the_next_try_may_succeed(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Exception | None] = [UserError("The folder is gone."), ValueError("odd"), None]

    def make(key: str) -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "whole"

    keeper = Keeper(make)
    look_until(keeper, 1, lambda kept: kept.error == "The folder is gone.")
    look_until(keeper, 2, lambda kept: kept.error is not None and "log" in kept.error)
    assert "odd" in caplog.text
    look_until(keeper, 3, lambda kept: kept.value == "whole" and kept.error is None)


def test_what_is_done_meanwhile_makes_the_value_anew() -> None:
    made: list[int] = []
    done: list[int] = []
    keeper = Keeper(lambda key: made.append(1) or len(made))
    look_until(keeper, 1, lambda kept: kept.value == 1)
    keeper.run("a", lambda: done.append(len(made)))
    look_until(keeper, 1, lambda kept: kept.value == 2)
    assert done == [1]
