"""A whole training in the browser: start, watch, reload, stop and save, resume, finish, generate with the result."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import CLIP_SECONDS, Server, Studio, training_material

NAME = "flow-clips"
STEPS = 120
LONG = CLIP_SECONDS * 1000


@pytest.fixture(scope="module")
def dataset(server: Server) -> Path:
    """Two clips that are not cached; two steps make an epoch."""
    return training_material(server, NAME)


def fill_form(studio: Studio) -> Page:
    """The form for a short training with samples."""
    (studio.server.workspace / "drafts" / "training.json").unlink(missing_ok=True)
    studio.reload()
    page = studio.page
    studio.tab("training")
    page.locator(f"#k5-t-dataset option:has-text('{NAME}')").wait_for(state="attached")
    page.select_option("#k5-t-dataset", label=NAME)
    page.wait_for_selector("#k5-t-box-dataset_config .k5-t-line:has-text('2 items')")
    page.check("#k5-t-cache_missing")
    type_into(page, "#k5-t-output_name", "flow")
    type_into(page, "#k5-t-network_dim", "4")
    type_into(page, "#k5-t-learning_rate", "0.002")
    type_into(page, "#k5-t-box-max_train_epochs input", str(STEPS))
    type_into(page, "#k5-t-prompts", "a street with bicycles --d 1 --s 3\na rabbit --d 2 --s 3")
    type_into(page, "#k5-t-box-sample_every_n_epochs input", "10")
    expect(page.locator("#k5-train-start")).not_to_contain_text("left")
    page.evaluate("document.addEventListener('k5-training-run', (event) => (window.startedRun = event.detail.run))")
    return page


def type_into(page: Page, field: str, text: str) -> None:
    page.fill(field, text)
    page.locator(field).blur()


def start(page: Page) -> str:
    """Press Start; the id of the run."""
    page.evaluate("window.startedRun = null")
    page.click("#k5-train-start")
    page.wait_for_function("window.startedRun", timeout=LONG)
    return page.evaluate("window.startedRun")


def records(server: Server, run: str, kind: str) -> list[dict[str, Any]]:
    """The run's records of one type, in their order."""
    lines = (server.workspace / "runs" / run / "events.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def test_start_watch_reload_stop_resume_finish_generate(
    dataset: Path, studio: Studio, server: Server, pictures: Path
) -> None:
    page = fill_form(studio)
    first = start(page)
    view = page.locator(".k5-training-live .k5-training-view")
    number = "Number(document.querySelector('.k5-training-live .k5-readout b').textContent.replace(/\\D/g, ''))"
    page.wait_for_function(f"{number} >= 2", timeout=LONG)
    expect(view.locator(".k5-samples video").first).to_be_visible(timeout=LONG)
    studio.reload()
    studio.tab("training")
    expect(page.locator(".k5-which select")).to_have_value(first)
    seen = page.evaluate(number)
    page.wait_for_function(f"{number} > {max(seen, 2)}", timeout=LONG)
    view.get_by_role("button", name="Stop and save").click()
    stopped = server.ended(first)
    assert stopped["state"] == "stopped", stopped
    last = records(server, first, "step")[-1]["step"]
    assert 2 <= last < STEPS

    page.evaluate("document.addEventListener('k5-training-run', (event) => (window.startedRun = event.detail.run))")
    view.get_by_role("button", name="Resume", exact=True).click()
    expect(page.locator("#k5-t-box-resume .k5-t-resume")).to_be_visible()
    expect(page.locator("#k5-train-start")).not_to_contain_text("left")
    second = start(page)
    assert server.ended(second)["state"] == "finished"
    options = tomllib.loads((server.workspace / "runs" / second / "options.toml").read_text("utf-8"))
    assert Path(options["resume"]).parent.parent == server.workspace / "runs" / first
    steps = [record["step"] for record in records(server, second, "step")]
    assert steps == list(range(last + 1, STEPS + 1))

    studio.tab("training")
    page.select_option(".k5-which select", value=second)
    view.get_by_label("Include earlier attempts").check()
    expect(view.locator(".k5-samples video").first).to_be_visible()
    page.wait_for_timeout(1000)
    page.screenshot(path=pictures / "training-live.png")
    view.locator(".k5-samples").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    page.screenshot(path=pictures / "training-samples.png")
    page.get_by_role("button", name="Generate with this").first.click()
    lora = os.fspath(server.workspace / "runs" / second / "checkpoints" / "flow.safetensors")
    expect(page.locator("#k5-loras .k5-lora-row input[type=text]")).to_have_value(lora)
    clip = studio.generate()
    made = server.ended(clip)
    assert made["state"] == "finished", made
    used = tomllib.loads((server.workspace / "runs" / clip / "options.toml").read_text("utf-8"))
    assert used["lora_weight"] == [lora]
