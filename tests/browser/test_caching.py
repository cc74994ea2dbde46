"""The Caching tab with real clips and the demo weights: stop and go on, what is stale, what is left over; pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import CLIP_SECONDS, Server, Studio
from tests.real_clips import caption, real_clip, real_still

LONG = CLIP_SECONDS * 1000
NAME = "street-and-meadow"
STILLS = 14


class Dataset:
    """A dataset in the workspace of the server."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.clips, self.stills = folder, folder / "clips", folder / "stills"
        self.config = config

    def caches(self) -> dict[str, int]:
        """Every cache by name with its time of change in nanoseconds."""
        return {path.name: path.stat().st_mtime_ns for path in self.folder.glob("cache_*/*.safetensors")}

    def latents(self) -> dict[str, int]:
        """Those of clips and stills."""
        return {name: changed for name, changed in self.caches().items() if "_te" not in name}


def make_dataset(server: Server) -> Dataset:
    """Clips of different sizes and rates, and stills, all with captions."""
    folder = server.workspace / "material"
    clips, stills = folder / "clips", folder / "stills"
    caption(real_clip(clips / "bikes.mp4", "bikes", (160, 96), 20), "a street with bicycles")
    caption(real_clip(clips / "bunny.mp4", "bunny", (192, 108), 22, rate=30), "a rabbit in a meadow")
    caption(real_clip(clips / "face.mkv", "phone", (176, 144), 20, rate=25), "a man in a car")
    for number in range(STILLS):
        size = (96, 64) if number % 2 else (64, 96)
        caption(real_still(stills / f"still_{number:02}.png", "bikes", size, number * 3), f"a street, picture {number}")
    config = server.workspace / "datasets" / f"{NAME}.toml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(
        f"""[general]
resolution = [64, 64]
enable_bucket = true
caption_extension = ".txt"

[[datasets]]
video_directory = '{clips}'
cache_directory = '{folder / "cache_clips"}'
target_frames = [9, 17]
source_fps = "auto"

[[datasets]]
image_directory = '{stills}'
cache_directory = '{folder / "cache_stills"}'
""",
        encoding="utf-8",
    )
    return Dataset(folder, config)


def open_caching(studio: Studio) -> Page:
    """The Caching tab with our dataset, after its first check."""
    page = studio.page
    studio.tab("caching")
    page.locator(f".k5-c-select option:has-text('{NAME}')").wait_for(state="attached")
    page.select_option(".k5-c-select", label=NAME)
    page.wait_for_selector(".k5-ledger-card >> nth=1")
    return page


def check_again(page: Page) -> None:
    page.get_by_role("button", name="Check again").click()


def wait_idle(page: Page) -> None:
    """Until nothing is being cached any more."""
    page.wait_for_selector(".k5-band-idle", timeout=LONG)


@pytest.fixture(scope="module")
def cached(server: Server, chromium: Browser) -> Dataset:
    """A dataset whose latents were stopped in the middle and which was then cached by one button."""
    dataset = make_dataset(server)
    studio = Studio(chromium.new_context(viewport={"width": 1280, "height": 900}).new_page(), server).open()
    page = open_caching(studio)
    assert "To be cached: 19 captions, 20 clips" in page.inner_text(".k5-band")
    assert "time not known yet" in page.inner_text(".k5-needs")
    page.click("#k5-cache-latents")
    expect(page.locator("#k5-cache-all")).to_be_disabled()
    begun = "/^[1-9]\\d* of 20/.test(document.querySelector('.k5-band .k5-numbers')?.textContent)"
    page.wait_for_function(begun, timeout=LONG)
    page.get_by_role("button", name="Stop", exact=True).click()
    wait_idle(page)
    before = dataset.latents()
    assert 0 < len(before) < 20
    failure = page.locator(".k5-c-failure", has_text="stopped at")
    failure.get_by_role("button", name="Continue").wait_for()
    page.click("#k5-cache-all")
    page.wait_for_function("document.querySelectorAll('.k5-band-row').length === 2")
    page.wait_for_selector(".k5-band.ready", timeout=LONG)
    after = dataset.latents()
    assert len(after) == 20
    assert after | before == after, "what was cached before the stop was not made again"
    assert not list(dataset.folder.rglob("*.tmp*"))
    assert studio.errors == []
    assert studio.foreign == []
    page.context.close()
    return dataset


def test_everything_is_cached_and_runs_are_listed(cached: Dataset, studio: Studio) -> None:
    """All bars are full; the Runs tab shows the runs by kind, with log and without a clip."""
    page = open_caching(studio)
    page.wait_for_selector(".k5-band.ready")
    assert "Everything is cached" in page.inner_text(".k5-band")
    legends = page.locator(".k5-ledger-legend").all_inner_texts()
    assert [text.strip() for text in legends] == ["6 up to date", "4 up to date", "14 up to date", "15 up to date"]
    expect(page.locator("#k5-cache-stale")).to_be_disabled()
    studio.tab("runs")
    rows = page.locator(".k5-table tbody tr", has_text=NAME)
    rows.nth(2).wait_for()
    texts = [rows.nth(number).inner_text() for number in range(3)]
    assert "Latents" in texts[0]
    assert "finished" in texts[0]
    assert "Captions" in texts[1]
    assert "stopped" in texts[2]
    rows.first.click()
    page.wait_for_function("document.querySelector('.k5-details .k5-log').textContent.length > 20")
    assert page.locator(".k5-details.open").inner_text().startswith(f"Latents: {NAME}")
    assert page.locator(".k5-outputs").inner_text() == ""


def test_only_what_is_stale_is_made_again(cached: Dataset, studio: Studio) -> None:
    """A caption and a clip change on disk: the page says which and why, and one button repairs exactly those."""
    page = open_caching(studio)
    page.wait_for_selector(".k5-band.ready")
    before = cached.caches()
    caption(cached.stills / "still_03.png", "a street in the rain")
    real_clip(cached.clips / "bunny.mp4", "bunny", (192, 108), 22, rate=30, start=40)
    check_again(page)
    page.wait_for_selector(".k5-reasons li:has-text('the caption changed')")
    page.wait_for_selector(".k5-reasons li:has-text('the file changed')")
    reasons = page.locator(".k5-reasons li").all_inner_texts()
    assert any("Latents: the file changed" in text and "bunny.mp4" in text for text in reasons), reasons
    assert any("Captions: the caption changed" in text and "still_03.png" in text for text in reasons), reasons
    assert "To be cached: 1 caption, 2 clips" in page.inner_text(".k5-band")
    needs = page.inner_text(".k5-needs")
    assert needs.count("about ") >= 3, "finished runs tell how long this will take"
    page.locator("#k5-cache-stale", has_text="Only stale (3)").click()
    page.wait_for_selector(".k5-band-row")
    page.wait_for_selector(".k5-band.ready", timeout=LONG)
    after = cached.caches()
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name.split("_0")[0] for name in changed if "_te" not in name} == {"bunny"}
    assert {name for name in changed if "_te" in name} == {"still_03_k5_te.safetensors"}
    assert after.keys() == before.keys()


def test_left_over_caches_go_to_the_trash(cached: Dataset, studio: Studio) -> None:
    """A source is gone: its caches are named; after a second click they lie in the trash folder, untouched."""
    page = open_caching(studio)
    page.wait_for_selector(".k5-band.ready")
    for path in cached.stills.glob("still_05.*"):
        path.rename(cached.folder / path.name)
    check_again(page)
    page.wait_for_selector(".k5-orphans:has-text('2 caches belong to no item')")
    button = page.locator(".k5-orphans .k5-button")
    button.click()
    assert (cached.folder / "cache_stills" / "still_05_k5_te.safetensors").exists(), "it asks before it acts"
    button.click()
    page.wait_for_selector(".k5-notice:has-text('2 files')")
    trash = sorted(path.name for path in (cached.folder / "cache_stills" / ".k5_trash").glob("*/*"))
    assert trash == ["still_05_0096x0064_k5.safetensors", "still_05_k5_te.safetensors"]
    page.wait_for_selector(".k5-orphans", state="hidden")
    page.wait_for_selector(".k5-ledger-legend:has-text('13 up to date')")


def test_problems_stand_at_their_field(cached: Dataset, studio: Studio) -> None:
    """A model without weights and a number out of bounds are said before the start; the choice outlives a reload."""
    page = open_caching(studio)
    page.select_option("#k5-c-task", label="Lite 2B, text to video, 5 s")
    page.wait_for_selector(".k5-c-start .k5-problems:has-text('missing')")
    page.locator(".k5-c-start summary", has_text="Advanced").click()
    page.fill("#k5-c-qwen_max_length", "1")
    page.locator("#k5-c-qwen_max_length").blur()
    page.wait_for_selector(".k5-c-option:has(#k5-c-qwen_max_length) .k5-c-trouble:has-text('at least 2')")
    studio.reload()
    page = open_caching(studio)
    expect(page.locator("#k5-c-task")).to_have_value("k5-lite-t2v-5s-sd")
    expect(page.locator("#k5-c-qwen_max_length")).to_have_value("1")
    page.select_option("#k5-c-task", label="Demo, text to video, 64 px")
    page.locator(".k5-c-start summary", has_text="Advanced").click()
    page.fill("#k5-c-qwen_max_length", "")
    page.locator("#k5-c-qwen_max_length").blur()
    page.wait_for_selector(".k5-c-start .k5-problems:empty", state="attached")
    page.wait_for_selector(".k5-band.ready")


def test_a_table_that_cannot_be_read_says_why(cached: Dataset, studio: Studio) -> None:
    """The configuration changes outside: the page notices by itself, and takes it back as well."""
    page = open_caching(studio)
    text = cached.config.read_text("utf-8")
    cached.config.write_text(text.replace("resolution = [64, 64]", "resolution = [64, 7]"), "utf-8")
    page.wait_for_selector(".k5-band:has-text('resolution')")
    cached.config.write_text(text, "utf-8")
    page.wait_for_selector(".k5-band.ready")


def test_without_a_dataset_it_says_what_to_do(studio: Studio) -> None:
    """An empty place has a sentence and a button that leads to the Dataset tab."""
    page = studio.page
    nothing: dict[str, Any] = {"datasets": [], "chosen": None, "values": {"task": "k5-demo-t2v"}, "again": False}
    page.route("**/api/caching", lambda route: route.fulfill(json=nothing))
    studio.tab("caching")
    empty = page.locator(".k5-caching .k5-empty")
    empty.wait_for()
    assert "No dataset yet" in empty.inner_text()
    empty.get_by_role("button").click()
    expect(page.locator("#k5-tab-dataset-button")).to_have_attribute("aria-selected", "true")


def on_any_computer(studio: Studio) -> Studio:
    """The page without the name of the processor that made the pictures."""

    def answer(route: Any) -> None:
        status = route.fetch().json()
        route.fulfill(json=status | {"device": status["device"] | {"name": "CPU"}})

    studio.page.route("**/api/status", answer)
    studio.page.wait_for_function("document.querySelector('.k5-device')?.textContent.startsWith('CPU')")
    return studio


def test_pictures(cached: Dataset, open_studio: Callable[..., Studio], pictures: Path) -> None:
    """Wide and narrow, with something to do; nothing sticks out at 400 px."""
    caption(cached.clips / "bikes.mp4", "a street with many bicycles")
    os.utime(cached.clips / "bikes.mp4")
    real_still(cached.stills / "still_07.png", "bunny", (96, 64), 5)
    for name, width, height, scheme in (("caching", 1280, 900, "dark"), ("caching-narrow", 400, 900, "light")):
        page = open_caching(on_any_computer(open_studio(width, height, scheme)))
        page.wait_for_selector(".k5-reasons li:has-text('the caption changed')")
        page.wait_for_timeout(600)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=pictures / f"{name}.png")
        assert (pictures / f"{name}.png").stat().st_size > 10_000
