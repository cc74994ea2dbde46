"""A real server in its own workspace, a real browser, a page that fails the test on errors or foreign requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect, sync_playwright

from tests.real_clips import caption, real_clip

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_SECONDS = 120
#: A clip of the demo model, with the start of its process, on a machine that is busy with other things.
CLIP_SECONDS = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here drives a browser."""
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(CLIP_SECONDS * 2))


class Server:
    """The app as a process of its own, as `make run` starts it."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.log = workspace.parent / "server.log"
        self._output = open(self.log, "w", encoding="utf-8")  # noqa: SIM115 - closed by stop
        command = [sys.executable, "app.py", "--port", "0", "--workspace", str(workspace)]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT
        )
        self.url = self._wait()

    def _wait(self) -> str:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            found = re.search(r"ready: (http://\S+)", self.log.read_text("utf-8"))
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        self.stop()
        raise AssertionError(f"The app did not start:\n{self.log.read_text('utf-8')}")

    def get(self, path: str) -> Any:
        """A JSON answer of the app."""
        with urllib.request.urlopen(f"{self.url}api/{path}", timeout=20) as answer:
            return json.load(answer)

    def wait(self, what: Callable[[], Any], seconds: float = CLIP_SECONDS) -> Any:
        """The first true answer of `what`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = what()
            if answer:
                return answer
            time.sleep(0.3)
        raise AssertionError(f"Not within {seconds} s. Runs: {json.dumps(self.get('runs'))[:3000]}")

    def run(self, run_id: str) -> dict[str, Any]:
        """One run."""
        return self.get(f"runs/{run_id}")

    def ended(self, run_id: str) -> dict[str, Any]:
        """A run after its end."""
        ends = ("finished", "stopped", "failed", "crashed", "interrupted")
        return self.wait(lambda: (run := self.run(run_id))["state"] in ends and run)

    def stop(self) -> None:
        """End the app; jobs would go on."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._output.close()


class Studio:
    """A page of the app, and what a person does with it."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page = page
        self.server = server
        self.errors: list[str] = []
        self.foreign: list[str] = []
        page.on("console", self._logged)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._seen)

    def _logged(self, message: Any) -> None:
        # Gradio's client logs that a reload has cut its open stream of events.
        cut = "AbortError" in message.text or "errored out" in message.text
        if message.type == "error" and not cut:
            self.errors.append(message.text)

    def _seen(self, request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname != "127.0.0.1":
            self.foreign.append(request.url)

    def open(self) -> Studio:
        """Load the page and wait until its form is filled."""
        self.page.goto(self.server.url)
        return self.ready()

    def ready(self) -> Studio:
        """Wait until the form shows the draft."""
        self.page.wait_for_selector("#k5-slot-weights .k5-weights", timeout=60_000)
        self.page.wait_for_function("window.K5 && K5.status")
        return self

    def reload(self) -> Studio:
        """Load the page again."""
        self.page.reload()
        return self.ready()

    def field(self, name: str) -> Any:
        """The input of an option."""
        return self.page.locator(f"#k5-f-{name}").locator("input, textarea").first

    def tab(self, name: str) -> None:
        """Open a tab."""
        self.page.click(f"#k5-tab-{name}-button")

    def choose(self, title: str) -> None:
        """Choose a model by its title."""
        self.field("task").click()
        self.page.get_by_role("option", name=title, exact=True).click()

    def problems(self) -> str:
        """The list of problems over the Generate button."""
        return self.page.locator(".k5-problems").inner_text()

    def generate(self) -> str:
        """Press Generate; the id of the run that this makes."""
        before = {run["id"] for run in self.server.get("runs")["runs"]}
        self.page.click("#k5-generate")

        def made() -> str | None:
            return next((run["id"] for run in self.server.get("runs")["runs"] if run["id"] not in before), None)

        return self.server.wait(made, 30)


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The app, one for all tests of the session."""
    wanted = os.environ.get("K5_SCREENSHOTS") == "1"  # pictures show the folder: a short one, removed afterwards
    folder = Path(tempfile.mkdtemp(prefix="studio-")) if wanted else tmp_path_factory.mktemp("studio")
    running = Server(folder / "workspace")
    yield running
    running.stop()
    if wanted:
        shutil.rmtree(folder, ignore_errors=True)


def training_material(server: Server, name: str, repeats: int = 1) -> Path:
    """A dataset called `name` of two real clips in the size of the demo model, not cached; its configuration file."""
    folder = server.workspace / f"{name}-material"
    caption(real_clip(folder / "bikes.mp4", "bikes", (64, 64), 18), "a street with bicycles")
    caption(real_clip(folder / "bunny.mp4", "bunny", (64, 64), 18), "a rabbit in a meadow")
    config = server.workspace / "datasets" / f"{name}.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(
        f"[general]\nresolution = [64, 64]\ncaption_extension = '.txt'\n\n[[datasets]]\nvideo_directory = '{folder}'\n"
        f"cache_directory = '{folder / 'cache'}'\ntarget_frames = [17]\nnum_repeats = {repeats}\n",
        encoding="utf-8",
    )
    return config


@pytest.fixture(scope="package")
def playwright_driver() -> Iterator[Playwright]:
    """Playwright's driver."""
    expect.set_options(timeout=20_000)  # the engine works on the same two cores
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="package")
def chromium(playwright_driver: Playwright) -> Iterator[Browser]:
    """Debian's Chromium, or the one that CHROMIUM names."""
    if not Path(CHROMIUM).exists():
        pytest.fail(f"{CHROMIUM} is missing. Install Debian's chromium, or set CHROMIUM to a Chromium or Chrome.")
    browser = playwright_driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield browser
    browser.close()


@pytest.fixture
def open_studio(chromium: Browser, server: Server) -> Iterator[Callable[..., Studio]]:
    """Opens pages; after the test none of them may have logged an error or asked another machine."""
    contexts: list[BrowserContext] = []
    studios: list[Studio] = []

    def open_one(width: int = 1280, height: int = 900, scheme: Any = "dark", **more: Any) -> Studio:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        contexts.append(context)
        studio = Studio(context.new_page(), server)
        studios.append(studio)
        return studio.open()

    yield open_one
    for context in contexts:
        context.close()
    assert [error for studio in studios for error in studio.errors] == []
    assert [url for studio in studios for url in studio.foreign] == []


@pytest.fixture
def studio(open_studio: Callable[..., Studio], server: Server) -> Studio:
    """A page with untouched forms, whatever other tests of the same server have left in them."""
    for draft in (server.workspace / "drafts").glob("*.json"):
        draft.unlink()
    return open_studio()


@pytest.fixture(scope="package")
def pictures() -> Path:
    """Where screenshots go: docs/images when K5_SCREENSHOTS=1, else build/screenshots."""
    wanted = os.environ.get("K5_SCREENSHOTS") == "1"
    folder = REPOSITORY / "docs" / "images" if wanted else REPOSITORY / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="package")
def first_run(chromium: Browser, server: Server) -> dict[str, Any]:
    """The run of a first visitor who presses Generate; what the page shows meanwhile is in `seen`."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    first = Studio(context.new_page(), server).open()
    seen: dict[str, Any] = {"task": first.field("task").input_value(), "prompt": first.field("prompt").input_value()}
    run_id = first.generate()
    first.page.wait_for_selector(".k5-live.on")
    first.reload()
    first.page.wait_for_selector(".k5-live.on")
    seen["after_reload"] = first.page.locator(".k5-job-text").inner_text()
    other = context.new_page()
    second = Studio(other, server).open()
    other.wait_for_selector(".k5-live.on")
    seen["second_tab"] = second.page.locator(".k5-job-text").inner_text()
    seen["second_prompt"] = second.field("prompt").input_value()
    run = server.ended(run_id)
    first.page.wait_for_selector(".k5-screen video")
    context.close()
    return run | {"seen": seen, "errors": first.errors + second.errors, "foreign": first.foreign + second.foreign}
