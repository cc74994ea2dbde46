"""The whole thing as a person runs it: `make run`, a real generation, and kill -9 in the middle of it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from backend.config.generate import GenerateOptions
from backend.jobs.queue import JobQueue
from backend.jobs.states import JobState
from backend.jobs.store import RunStore
from backend.jobs.view import view_run

START_SECONDS = 180
CLIP_SECONDS = 180


def _until(what: Callable[[], Any], seconds: float, message: Callable[[], str]) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = what()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(message())


@contextmanager
def _make_run(repository: Path, workspace: Path, log: Path) -> Iterator[tuple[psutil.Process, str]]:
    """`make run` on a free port; yields the process of the app and its address."""
    with log.open("w", encoding="utf-8") as output:
        command = ["make", "run", f"ARGS=--port 0 --workspace {workspace}"]
        make = subprocess.Popen(command, cwd=repository, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            ready = _until(
                lambda: re.search(r"ready: (http://\S+)", log.read_text("utf-8")), START_SECONDS, log.read_text
            )
            app = next(p for p in psutil.Process(make.pid).children(recursive=True) if "app.py" in p.cmdline())
            yield app, ready[1]
        finally:
            for process in psutil.Process(make.pid).children(recursive=True) if make.poll() is None else []:
                if "app.py" in process.cmdline():
                    process.send_signal(signal.SIGINT)
            make.wait(timeout=60)


def test_a_generation_outlives_the_app_that_is_killed(repository: Path, workspace: Path, tmp_path: Path) -> None:
    """kill -9 of the app during denoising: the job ends with its clip, and the next app shows it."""
    store = RunStore(workspace)
    options = GenerateOptions(task="k5-demo-t2v", prompt="a red circle moves left on a black background", steps=40)
    run = store.create("generate", options, "outlives the app")
    queue = JobQueue(store)
    with _make_run(repository, workspace, tmp_path / "first.log") as (app, _):
        queue.enqueue(run.id)
        _until(lambda: (view_run(run).step or 0) >= 3, CLIP_SECONDS, lambda: str(view_run(run)))
        app.kill()
        app.wait(timeout=30)
    assert view_run(run).state is JobState.RUNNING
    _until(lambda: view_run(run).state.terminal, CLIP_SECONDS, lambda: str(view_run(run)))
    with _make_run(repository, workspace, tmp_path / "second.log") as (_, address):
        with urllib.request.urlopen(f"{address}api/runs", timeout=30) as answer:
            shown = json.load(answer)["runs"][0]
        assert (shown["id"], shown["state"]) == (run.id, "finished")
        with urllib.request.urlopen(f"{address.rstrip('/')}{shown['outputs'][0]['url']}", timeout=30) as answer:
            assert answer.headers["Content-Type"] == "video/mp4"
            assert answer.read(12)[4:8] == b"ftyp"
