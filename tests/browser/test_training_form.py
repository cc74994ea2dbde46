"""The training form in a browser: wrong and right values, import, a start with the demo model, a reload; pictures."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from backend.jobs.queue import JobQueue
from backend.jobs.store import RunStore
from tests.browser.conftest import CLIP_SECONDS, Server, Studio, training_material

NAME = "three-clips"
LONG = CLIP_SECONDS * 1000
COMMAND = r"""accelerate launch --mixed_precision bf16 src/musubi_tuner/kandinsky5_train_network.py \
  --task k5-lite-t2v-5s-sd --learning_rate 5e-5 --network_dim 24 --network_alpha 24 \
  --weighting_scheme logit_normal --sage_attn --blocks_to_swap 8 --frobnicate 3
"""


@pytest.fixture(scope="module")
def dataset(server: Server) -> Path:
    """Two clips that are not cached; six steps make an epoch."""
    return training_material(server, NAME, repeats=3)


def open_form(studio: Studio) -> Page:
    """The Training tab with our dataset, after the first look at its caches."""
    page = studio.page
    studio.tab("training")
    page.locator(f"#k5-t-dataset option:has-text('{NAME}')").wait_for(state="attached")
    page.select_option("#k5-t-dataset", label=NAME)
    page.wait_for_selector("#k5-t-box-dataset_config .k5-t-line:has-text('2 items')")
    return page


def trainings(server: Server) -> set[str]:
    """The trainings that there are."""
    return {run["id"] for run in server.get("runs")["runs"] if run["kind"] == "train"}


def type_into(page: Page, field: str, text: str) -> None:
    page.fill(field, text)
    page.locator(field).blur()


def test_filling_starting_and_coming_back(dataset: Path, studio: Studio, server: Server) -> None:
    """Wrong values are said at their fields and keep it from starting; then two runs start and one measures."""
    page = open_form(studio)
    start = page.locator("#k5-train-start")
    earlier = trainings(server)
    expect(start).to_contain_text("1 problem left")
    page.check("#k5-t-cache_missing")
    expect(start).not_to_contain_text("left")
    type_into(page, "#k5-t-network_dim", "9999")
    type_into(page, "#k5-t-learning_rate", "fast")
    expect(page.locator("#k5-t-network_dim-trouble")).to_have_text("must be at most 4096, not 9999.")
    expect(page.locator("#k5-t-learning_rate-trouble")).to_contain_text("must be a number")
    expect(start).to_contain_text("2 problems left")
    start.click()
    expect(page.locator("#k5-t-learning_rate")).to_be_focused()
    assert trainings(server) == earlier
    type_into(page, "#k5-t-network_dim", "4")
    type_into(page, "#k5-t-learning_rate", "0,002")
    type_into(page, "#k5-t-output_name", "first")
    length = page.locator("#k5-t-box-max_train_epochs")
    length.locator("input").fill("4")
    length.locator("input").blur()
    expect(page.locator(".k5-t-sum-text")).to_have_text("2 items × 3 = 6 steps an epoch · 1 epoch, 4 steps")
    expect(page.locator(".k5-t-facts")).to_contain_text("unknown until the first steps")
    studio.reload()
    page = open_form(studio)
    expect(page.locator("#k5-t-network_dim")).to_have_value("4")
    expect(page.locator("#k5-t-learning_rate")).to_have_value("0.002")
    page.evaluate("document.addEventListener('k5-training-run', (event) => (window.startedRun = event.detail.run))")
    page.click("#k5-train-start")
    page.wait_for_function("window.startedRun")
    first = page.evaluate("window.startedRun")
    type_into(page, "#k5-t-output_name", "second")
    page.click("#k5-train-queue")
    waiting = server.wait(lambda: [run for run in server.get("runs")["runs"] if run["title"] == "second"], 30)[0]
    assert (waiting["state"], waiting["kind"]) == ("queued", "train")
    JobQueue(RunStore(server.workspace)).remove(waiting["id"])
    ended = server.ended(first)
    assert ended["state"] == "finished", ended
    options = tomllib.loads((server.workspace / "runs" / first / "options.toml").read_text("utf-8"))
    wanted = {"network_dim": 4, "learning_rate": 0.002, "max_train_steps": 4, "cache_missing": True}
    assert options | wanted == options
    assert (server.workspace / "runs" / first / "checkpoints" / "first.safetensors").is_file()
    page.wait_for_selector(".k5-t-facts:has-text('s a step as before')", timeout=LONG)


def test_import_search_and_undo(dataset: Path, studio: Studio) -> None:
    """A pasted command fills the form and says what it could not take; search finds an option; undo brings all back."""
    page = open_form(studio)
    type_into(page, "#k5-t-network_dim", "12")
    page.get_by_role("button", name="Import").click()
    page.fill("#k5-t-import-text", "no command at all")
    page.click("#k5-t-import-go")
    expect(page.locator(".k5-dialog .k5-t-trouble")).to_contain_text("no training command")
    page.fill("#k5-t-import-text", COMMAND)
    page.click("#k5-t-import-go")
    notes = page.locator(".k5-t-notes")
    expect(notes.locator("li.unknown")).to_contain_text("--frobnicate")
    expect(notes.locator("li.left_out")).to_contain_text("--sage_attn")
    page.keyboard.press("Escape")
    expect(page.locator("#k5-t-network_dim")).to_have_value("24")
    expect(page.locator("#k5-t-task")).to_have_value("k5-lite-t2v-5s-sd")
    expect(page.locator(".k5-t-actions .k5-problems")).to_contain_text("DiT checkpoint")
    page.fill("#k5-t-search", "swap")
    visible = page.locator(".k5-t-group .k5-t-option:visible")
    expect(visible).to_have_count(1)
    expect(page.locator("#k5-t-blocks_to_swap")).to_have_value("8")
    visible.get_by_role("button", name="Back to the default").click()
    expect(page.locator("#k5-t-blocks_to_swap")).to_have_value("")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#k5-t-network_dim")).to_have_value("12")
    expect(page.locator("#k5-t-task")).to_have_value("k5-demo-t2v")


def test_pictures(dataset: Path, open_studio: Callable[..., Studio], pictures: Path) -> None:
    """Wide and narrow: nothing sticks out, and Start is on the screen wherever the form stands."""
    for name, width, scheme in (("training-form", 1280, "dark"), ("training-form-narrow", 400, "light")):
        page = open_form(open_studio(width, 900, scheme))
        page.evaluate("document.querySelector('.k5-t-basics').scrollIntoView({block: 'center'})")
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        expect(page.locator("#k5-train-start")).to_be_in_viewport()
        page.screenshot(path=pictures / f"{name}.png")
        assert (pictures / f"{name}.png").stat().st_size > 10_000
