"""What a person does in the Generate tab, with the real app, engine and demo model."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.browser.conftest import Server, Studio

PROMPT = "a red circle moves left on a black background"


def test_first_visit_makes_a_clip_that_shows_the_prompt(first_run: dict[str, Any]) -> None:
    """The demo model and a prompt that it knows are there at once; pressing Generate is all."""
    assert first_run["seen"]["task"] == "Demo, text to video, 64 px"
    assert first_run["seen"]["prompt"] == PROMPT
    assert first_run["state"] == "finished", first_run
    assert [output["kind"] for output in first_run["outputs"]] == ["video"]
    assert first_run["errors"] == []
    assert first_run["foreign"] == []


def test_reload_and_second_tab_see_the_running_job(first_run: dict[str, Any]) -> None:
    """State lives on the server: reload and another tab show the same run and the same form."""
    assert PROMPT in first_run["seen"]["after_reload"]
    assert PROMPT in first_run["seen"]["second_tab"]
    assert first_run["seen"]["second_prompt"] == PROMPT


def test_result_plays(studio: Studio, first_run: dict[str, Any]) -> None:
    """The clip runs in the browser, has the right length and is neither black nor still."""
    page = studio.page
    page.wait_for_selector(".k5-screen video")
    page.wait_for_function("document.querySelector('.k5-screen video').readyState >= 2")
    page.wait_for_function("document.querySelector('.k5-screen video').currentTime > 0.1")
    facts = page.evaluate(
        """async () => {
          const video = document.querySelector('.k5-screen video');
          video.pause();
          const canvas = Object.assign(document.createElement('canvas'), {width: 64, height: 64});
          const context = canvas.getContext('2d', {willReadFrequently: true});
          const frame = (time) => new Promise((done) => {
            video.addEventListener('seeked', () => {
              context.drawImage(video, 0, 0, 64, 64);
              done([...context.getImageData(0, 0, 64, 64).data]);
            }, {once: true});
            video.currentTime = time;
          });
          const first = await frame(0.02), last = await frame(0.65);
          const change = first.reduce((sum, value, i) => sum + Math.abs(value - last[i]), 0) / first.length;
          const brightest = Math.max(...first.filter((value, i) => i % 4 !== 3));
          return {width: video.videoWidth, duration: video.duration, brightest, change};
        }"""
    )
    output = first_run["outputs"][0]
    assert facts["width"] == output["width"] == 64
    assert facts["duration"] == pytest.approx(output["frames"] / output["fps"], abs=0.05)
    assert facts["brightest"] > 100
    assert facts["change"] > 2


def test_space_pauses_and_the_bar_goes_to_a_frame(studio: Studio, first_run: dict[str, Any]) -> None:
    """Space pauses the current clip, also while nothing of the player has the focus."""
    page = studio.page
    page.wait_for_function("document.querySelector('.k5-screen video')?.currentTime > 0")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.k5-screen video').paused")
    page.locator(".k5-player-bar input").fill("16")
    page.wait_for_function("document.querySelector('.k5-frame').textContent.includes('17')")


def test_use_these_settings_restores_the_form(studio: Studio, first_run: dict[str, Any]) -> None:
    """Everything that made the clip comes back from the file itself, the drawn seed too."""
    studio.field("prompt").fill("something else entirely")
    studio.field("steps").fill("7")
    studio.page.wait_for_selector(".k5-screen video")
    studio.page.locator(".k5-tile").last.click()
    studio.page.get_by_role("button", name="Use these settings").click()
    studio.page.wait_for_function(f"document.querySelector('#k5-f-prompt textarea').value === {PROMPT!r}")
    studio.page.wait_for_function(f"document.querySelector('#k5-f-seed input').value === '{first_run['seed']}'")
    assert studio.field("steps").input_value() == "20"
    studio.reload()
    assert studio.field("seed").input_value() == str(first_run["seed"])


def test_settings_from_a_dropped_file(studio: Studio, first_run: dict[str, Any], server: Server) -> None:
    """A clip that lies on disk fills the form; a file without settings says so and changes nothing."""
    clip = next((server.workspace / "runs" / first_run["id"] / "outputs").glob("*.mp4"))
    studio.page.locator(".k5-drop input[type=file]").set_input_files(clip)
    studio.page.wait_for_function(f"document.querySelector('#k5-f-seed input').value === '{first_run['seed']}'")
    studio.page.locator(".k5-drop input[type=file]").set_input_files(
        {"name": "plain.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\n"}
    )
    studio.page.wait_for_selector(".k5-notice.bad")
    assert studio.field("prompt").input_value() == PROMPT


def test_image_to_video_from_an_uploaded_image(studio: Studio, server: Server, tmp_path: Path) -> None:
    """Choosing the image task opens the image field and asks for an image; with one the clip begins with it."""
    picture = Image.new("RGB", (64, 64), (10, 10, 10))
    ImageDraw.Draw(picture).ellipse((32, 18, 60, 46), fill=(220, 40, 40))
    picture.save(tmp_path / "start.png")
    studio.choose("Demo, image to video, 64 px")
    studio.page.wait_for_selector("#k5-f-image .k5-problem-line")
    assert "Give its first frame" in studio.page.locator("#k5-f-image .k5-problem-line").inner_text()
    studio.page.locator("#k5-f-image input[type=file]").set_input_files(tmp_path / "start.png")
    studio.page.wait_for_selector("#k5-f-image .k5-problem-line", state="detached")
    studio.page.wait_for_selector(".k5-problems", state="hidden")
    run = server.ended(studio.generate())
    assert run["state"] == "finished", run
    assert run["task"] == "k5-demo-i2v"
    studio.page.wait_for_selector(f".k5-tile >> nth={len(server.get('clips')['clips']) - 1}")
    studio.page.get_by_role("button", name="Use these settings").click()
    studio.page.wait_for_selector("#k5-f-image img")


def test_last_frame_becomes_the_start_image(studio: Studio, first_run: dict[str, Any]) -> None:
    """The browser takes the frame out of the clip; the model becomes its image sibling, nothing else is lost."""
    studio.page.wait_for_function("document.querySelector('.k5-screen video')?.readyState >= 2")
    studio.page.get_by_role("button", name="Last frame as start").click()
    studio.page.wait_for_selector("#k5-f-image img")
    assert studio.field("task").input_value() == "Demo, image to video, 64 px"
    assert studio.field("prompt").input_value() == PROMPT
    studio.page.wait_for_selector(".k5-problems", state="hidden")


def test_stop_ends_a_run_and_the_queue_can_be_emptied(studio: Studio, server: Server) -> None:
    """Stop works between steps; a waiting run is taken out; the page goes back to rest by itself."""
    studio.field("steps").fill("1000")
    studio.page.get_by_role("button", name="One clip more").click()
    run_id = studio.generate()
    studio.page.wait_for_selector(".k5-live.on")
    studio.page.locator(".k5-waiting button").first.click()
    studio.page.wait_for_selector(".k5-waiting li", state="detached")
    working = server.wait(lambda: server.get("status")["running"])["id"]
    server.wait(lambda: (server.run(working)["step"] or 0) >= 1 and server.run(working)["phase"] == "denoise")
    studio.page.locator(".k5-live").get_by_role("button", name="Stop").click()
    assert server.ended(working)["state"] == "stopped"
    studio.page.wait_for_selector(".k5-live:not(.on)")
    assert run_id


def test_typed_markup_stays_text(studio: Studio, server: Server) -> None:
    """A prompt, a title and a log line with markup are shown as text everywhere."""
    nasty = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>'
    studio.field("prompt").fill(nasty)
    studio.field("width").fill("72")
    studio.page.wait_for_selector("#k5-f-width .k5-problem-line")
    studio.field("width").fill("64")
    studio.page.wait_for_selector("#k5-f-width .k5-problem-line", state="detached")
    studio.field("steps").fill("1")
    run_id = studio.generate()
    studio.page.wait_for_selector(".k5-live.on")
    studio.page.wait_for_function("document.querySelector('.k5-job-text').textContent.includes('<img')")
    studio.tab("runs")
    studio.page.locator(".k5-table tbody tr").first.click()
    studio.page.wait_for_selector(".k5-details.open dd")
    assert nasty in studio.page.locator(".k5-details").inner_text()
    server.ended(run_id)
    studio.tab("generate")
    studio.page.wait_for_function("document.querySelector('.k5-caption-text').textContent.includes('<img')")
    assert studio.page.evaluate("window.broken") is None
    assert studio.page.locator(".k5-root img[src=x]").count() == 0


def test_crash_is_said_in_words(studio: Studio, server: Server, first_run: dict[str, Any]) -> None:
    """An engine that was killed: the page says so, offers its log and its settings, and keeps the other clips."""
    run_id = studio.generate()

    def engine() -> int | None:
        records = server.get(f"runs/{run_id}/events?since=0")["records"]
        return next((record["pid"] for record in records if record["type"] == "started"), None)

    os.kill(server.wait(engine), signal.SIGKILL)
    assert server.ended(run_id)["state"] == "crashed"
    failure = studio.page.locator(".k5-failure")
    failure.wait_for()
    assert "crashed" in failure.inner_text()
    assert studio.page.locator(".k5-tile").count() >= 1
    studio.field("prompt").fill("something else")
    failure.get_by_role("button", name="Use these settings").click()
    studio.page.wait_for_function(f"document.querySelector('#k5-f-prompt textarea').value === {PROMPT!r}")
    failure.get_by_role("button", name="Close").click()
    failure.wait_for(state="detached")


def test_kill_and_clone_from_the_runs_tab(studio: Studio, server: Server, first_run: dict[str, Any]) -> None:
    """Kill asks once more and ends the process; the settings of any run can be taken back to the form."""
    run_id = studio.generate()
    server.wait(lambda: server.run(run_id)["state"] == "running")
    studio.tab("runs")
    studio.page.locator(".k5-table tbody tr").first.click()
    kill = studio.page.locator(".k5-details").get_by_role("button", name="Kill")
    kill.click()
    studio.page.locator(".k5-details button[data-sure]").click()
    assert server.ended(run_id)["state"] in ("stopped", "crashed", "interrupted", "failed")
    studio.page.wait_for_selector(".k5-details .k5-state:not(.running):not(.stopping)")
    studio.page.locator(".k5-details").get_by_role("button", name="Settings to Generate").click()
    studio.page.wait_for_function(f"document.querySelector('#k5-f-prompt textarea').value === {PROMPT!r}")
    assert studio.page.locator("#k5-tab-generate").is_visible()


def test_copy_as_command(open_studio: Callable[..., Studio], server: Server) -> None:
    """The command line that makes the same clip is shown and copied."""
    (server.workspace / "drafts" / "generate.json").unlink(missing_ok=True)
    studio = open_studio(permissions=["clipboard-read", "clipboard-write"])
    studio.page.get_by_role("button", name="Copy as command").click()
    studio.page.wait_for_selector(".k5-command:visible")
    command = studio.page.locator(".k5-command").input_value()
    assert re.match(r"python -m backend\.kandinsky5_generate_video --task=k5-demo-t2v ", command)
    studio.page.wait_for_function("navigator.clipboard.readText().then((text) => text.startsWith('python -m'))")
