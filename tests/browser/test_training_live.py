"""The live view of a training in a real browser: points within a second, a page that does not grow, samples, files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import av
import numpy
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import REPOSITORY, Server, Studio
from tests.fakes.training_journal import RunWriter, write_run

GROWTH_LIMIT = 50 << 20
# What the page shows as its last step, with the time at which it did.
WATCH = """() => {
  const cell = document.querySelector('.k5-training-live .k5-readout b');
  window.k5seen = [];
  const note = () => window.k5seen.push([Date.now() / 1000, Number(cell.textContent.replace(/\\D/g, ''))]);
  new MutationObserver(note).observe(cell, { childList: true, characterData: true, subtree: true });
}"""


@pytest.fixture
def drawn() -> Path:
    """Where pictures of made-up runs go: never into the documentation."""
    folder = REPOSITORY / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clip(path: Path, shift: int) -> None:
    """Two seconds of a square that moves."""
    path.parent.mkdir(exist_ok=True)
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"  # type: ignore[union-attr]
        for number in range(24):
            picture = numpy.full((64, 96, 3), (30, 34, 60), numpy.uint8)
            picture[20:44, 4 + number * 3 : 22 + number * 3] = (220, 60 + shift * 30, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):  # type: ignore[union-attr]
                container.mux(packet)
        for packet in stream.encode():  # type: ignore[union-attr]
            container.mux(packet)


def show(studio: Studio, run: str) -> Page:
    """The Training tab with this run."""
    page = studio.page
    studio.tab("training")
    page.locator(f".k5-which option[value='{run}']").wait_for(state="attached")
    page.select_option(".k5-which select", value=run)
    return page


def heap(page: Page) -> float:
    """Bytes of live JavaScript objects."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.enable")
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    metrics = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
    session.detach()
    return metrics["JSHeapUsedSize"]


def delays(folder: Path, seen: list[list[float]]) -> list[float]:
    """Seconds from the writing of a step to the chart that shows it, for every tenth of a second of writing."""
    written = [line.split() for line in (folder / "written.txt").read_text().splitlines()]
    found = []
    for moment, step in written:
        first = next((at for at, shown in seen if shown >= int(step)), None)
        found += [first - float(moment)] if first is not None else []
    return found


@pytest.fixture
def grow(server: Server) -> Iterator[Callable[[str, int, float], Path]]:
    """Starts runs that are alive and grow; they end with the test."""
    begun: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(run: str, steps: int, seconds: float) -> Path:
        folder = server.workspace / "runs" / run
        command = [sys.executable, "-m", "tests.fakes.training_journal", str(folder), str(steps), str(seconds)]
        begun.append((subprocess.Popen(command, cwd=REPOSITORY), folder))
        return folder

    yield start
    for process, folder in begun:
        (folder / "end").touch()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def watch(studio: Studio, server: Server, folder: Path, steps: int, wait: float) -> dict[str, Any]:
    """Leave the page open while the run grows to `steps`; what was measured."""
    server.wait(lambda: (folder / "written.txt").exists(), 30)
    page = show(studio, folder.name)
    page.wait_for_function("/\\d/.test(document.querySelector('.k5-training-live .k5-readout b').textContent)")
    page.evaluate(WATCH)
    page.wait_for_timeout(1000)
    before, began = heap(page), time.monotonic()
    page.wait_for_function(
        "(steps) => window.k5seen.length && window.k5seen.at(-1)[1] >= steps", arg=steps, timeout=wait * 1000
    )
    took = time.monotonic() - began
    seen = page.evaluate("window.k5seen")
    first = seen[0][0]
    late = [delay for delay in delays(folder, seen) if delay >= 0]
    # Those written before the page looked are no measure of it.
    written = [float(line.split()[0]) for line in (folder / "written.txt").read_text().splitlines()]
    late = late[sum(moment < first for moment in written) :]
    return {"growth": heap(page) - before, "delays": late, "took": took}


def test_points_arrive_within_a_second_and_the_page_does_not_grow(
    studio: Studio, server: Server, grow: Callable[[str, int, float], Path]
) -> None:
    folder = grow("20261124-0900-aaaaaa", 4000, 8)
    found = watch(studio, server, folder, 4000, 60)
    print({name: value for name, value in found.items() if name != "delays"}, median(found["delays"]))
    assert len(found["delays"]) > 20
    assert median(found["delays"]) < 1.0
    assert found["growth"] < GROWTH_LIMIT / 5
    studio.page.get_by_role("button", name="Save now").click()
    server.wait(lambda: (folder / "requests" / "save").exists(), 10)
    expect(studio.page.get_by_role("button", name="Save now")).to_be_disabled()
    expect(studio.page.locator(".k5-training-live .k5-live-head")).to_contain_text("saving asked for")
    studio.page.get_by_role("button", name="Stop after epoch").click()
    expect(studio.page.locator(".k5-training-live .k5-live-head")).to_contain_text("stops after this epoch")
    expect(studio.page.get_by_role("button", name="Stop and save")).to_be_enabled()
    assert (folder / "requests" / "stop_after_epoch").exists()


@pytest.mark.slow
def test_ten_thousand_steps_in_front_of_an_open_page(
    studio: Studio, server: Server, grow: Callable[[str, int, float], Path]
) -> None:
    folder = grow("20261124-0901-bbbbbb", 10_000, 60)
    found = watch(studio, server, folder, 10_000, 180)
    ninth = quantiles(found["delays"], n=10)[-1]
    print(f"growth {found['growth'] / 1e6:.1f} MB, delay {median(found['delays']):.2f} s, nine of ten {ninth:.2f} s")
    assert ninth < 1.0
    assert found["growth"] < GROWTH_LIMIT


@pytest.fixture(scope="module")
def finished(server: Server) -> RunWriter:
    """A run of 100,000 steps that went on from a state of another one, with samples and files."""
    runs = server.workspace / "runs"
    before = RunWriter(runs / "20261124-0800-cccccc", "first try", time.time() - 200_000, learning_rate=1e-4)
    before.claim()
    for step in range(1, 401):
        before.step(step, 1000, 1.0 - step / 1000)
    state = before.save("first-state", 400, "state", why="stop")
    before.end("stopped", reason="Stopped and saved on request.", step=400)
    options = {"resume": os.fspath(state), "learning_rate": 3e-4}
    run = RunWriter(runs / "20261124-0801-dddddd", "second try", time.time() - 100_000, **options)
    run.claim()
    run.emit("phase", phase="train", message="Training")
    for step in range(401, 1001):
        run.step(step, 1000, 0.6 - step / 5000 + (step % 7) / 50)
        if step % 200 == 0:
            for index in (1, 2):
                path = run.folder / "samples" / f"s{step}-{index}.mp4"
                clip(path, step // 200)
                shown = {"path": f"samples/{path.name}", "kind": "video", "width": 96, "height": 64, "frames": 24}
                about = {"step": step, "epoch": 1, "index": index, "prompt": f"prompt {index}", "seed": index}
                run.emit("sample", **shown, **about, fps=12, seconds=2.0, took_seconds=0.1)
    run.save("second.safetensors", 1000, why="end")
    run.save("second-state", 1000, "state", why="end")
    run.end(outputs=[], seconds=400.0)
    return run


def test_curves_zoom_show_earlier_attempts_and_other_runs(finished: RunWriter, studio: Studio, drawn: Path) -> None:
    page = show(studio, finished.folder.name)
    view = page.locator(".k5-training-live .k5-training-view")
    expect(view.locator(".k5-readout")).to_contain_text("1,000")
    chart = view.locator(".k5-curves .u-over").first
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    expect(view.locator(".k5-readout")).to_contain_text("Step70")
    with page.expect_response(lambda answer: "first=" in answer.url) as asked:
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60, steps=4)
        page.mouse.up()
    assert 690 <= asked.value.json()["step"][0] <= 702
    everything = view.get_by_role("button", name="All", exact=True)
    expect(everything).to_be_enabled()
    chart.dblclick()
    expect(everything).to_be_disabled()
    with page.expect_response(lambda answer: "chain=true" in answer.url and "/series" in answer.url) as asked:
        view.get_by_label("Include earlier attempts").check()
    assert asked.value.json()["step"][0] == 1
    view.locator(".k5-overlays summary").click()
    with page.expect_response(lambda answer: "cccccc/series" in answer.url):
        view.get_by_label("first try").check()
    expect(view.locator(".k5-overlay-key")).to_contain_text("first try")
    page.keyboard.press("Escape")
    for name in ("Log", "Clip"):
        view.get_by_role("button", name=name, exact=True).click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=drawn / "training-live.png")


def test_samples_play_together_and_are_compared_under_a_wipe(finished: RunWriter, studio: Studio) -> None:
    page = show(studio, finished.folder.name)
    grid = page.locator(".k5-training-live .k5-samples")
    expect(grid.locator("video")).to_have_count(6)
    assert grid.locator(".k5-sample-step").all_inner_texts() == ["1,000", "800", "600"]
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_function("[...document.querySelectorAll('.k5-samples video')].every((v) => !v.paused)")
    page.wait_for_timeout(1500)
    times = page.evaluate("[...document.querySelectorAll('.k5-samples video')].map((v) => v.currentTime)")
    apart = max(min(abs(a - times[0]), 2.0 - abs(a - times[0])) for a in times)
    assert apart < 0.35, times
    page.get_by_role("button", name="Compare", exact=True).click()
    viewer = page.locator(".k5-viewer")
    expect(viewer.locator("video")).to_have_count(2)
    viewer.locator(".k5-wipe-range").fill("0.25")
    assert viewer.locator(".k5-wipe").evaluate("(node) => node.style.getPropertyValue('--k5-wipe')") == "25.00%"
    page.keyboard.press("Escape")
    expect(viewer).to_have_count(0)


def test_a_file_goes_to_generate_and_a_state_into_the_form(finished: RunWriter, studio: Studio, server: Server) -> None:
    page = show(studio, finished.folder.name)
    page.get_by_role("button", name="Generate with this").click()
    field = page.locator("#k5-loras .k5-lora-row input[type=text]")
    expect(field).to_have_value(os.fspath(finished.folder / "checkpoints" / "second.safetensors"))
    expect(page.locator("#k5-tab-generate-button")).to_have_attribute("aria-selected", "true")
    show(studio, finished.folder.name)
    page.get_by_role("button", name="Resume from here").click()
    state = os.fspath(finished.folder / "checkpoints" / "second-state")
    server.wait(lambda: server.get("training/form")["values"].get("resume") == state, 20)


def test_runs_shows_the_same_view_and_compares_configurations(
    finished: RunWriter, open_studio: Callable[..., Studio], drawn: Path
) -> None:
    narrow = open_studio(width=400, height=860, scheme="light")
    page = narrow.page
    page.evaluate("(run) => K5.openRun(run)", finished.folder.name)
    view = page.locator(".k5-runs .k5-training-view")
    expect(view.locator(".k5-readout")).to_contain_text("1,000")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    view.locator(".k5-curves").scroll_into_view_if_needed()
    page.screenshot(path=drawn / "training-live-narrow.png")
    page.locator(".k5-runs").get_by_role("button", name="Compare configs").locator("visible=true").click()
    dialog = page.locator(".k5-compare")
    with page.expect_response(lambda answer: "b=20261124-0800-cccccc" in answer.url):
        dialog.get_by_label("Second run").select_option("20261124-0800-cccccc")
    expect(dialog.locator("tr:not(.group)")).to_have_count(3)
    rows = dialog.locator("tr:not(.group)").all_inner_texts()
    assert {row.split()[0] for row in rows} == {"learning_rate", "output_name", "resume"}
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(view).to_be_visible()


@pytest.mark.parametrize("steps", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_steps_open_and_stay_smooth(studio: Studio, server: Server, steps: int) -> None:
    """The journal is read in parts and the page gets no more than it can draw; then a poll costs the server next to
    nothing."""
    run = write_run(server.workspace / "runs" / f"20261124-0902-{steps:06}", steps, "long")
    page = show(studio, run.folder.name)
    shown = "(text) => document.querySelector('.k5-training-live .k5-readout b').textContent === text"
    page.wait_for_function(shown, arg=f"{steps:,}", timeout=60_000)
    first = server.get(f"live/{run.folder.name}/series?points=2000")
    assert 1000 <= len(first["step"]) <= 2000
    began = time.monotonic()
    for _ in range(10):
        server.get(f"live/{run.folder.name}/series?points=2000&since={first['rows']}&key={first['key']}&validations=0")
    print(f"a poll takes {(time.monotonic() - began) / 10 * 1000:.0f} ms")
    assert time.monotonic() - began < 5
    stall = page.evaluate(
        """async () => {
          const box = document.querySelector('.k5-training-live .u-over').getBoundingClientRect();
          const over = document.querySelector('.k5-training-live .u-over');
          let last = performance.now(), longest = 0;
          for (let i = 0; i < 60; i += 1) {
            const at = { clientX: box.x + (i / 60) * box.width, clientY: box.y + 40, bubbles: true };
            over.dispatchEvent(new MouseEvent('mousemove', at));
            await new Promise((done) => requestAnimationFrame(done));
            longest = Math.max(longest, performance.now() - last);
            last = performance.now();
          }
          return longest;
        }"""
    )
    print(f"longest gap between frames {stall:.0f} ms")
    assert stall < 500
