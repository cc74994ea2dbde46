"""Runs, Settings, languages, themes; and the pictures of the documentation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.browser.conftest import Server, Studio


def test_runs_lists_and_opens_a_run(studio: Studio, first_run: dict[str, Any]) -> None:
    """The table shows state and duration; a run opens with its facts, clip and log; Esc closes it."""
    studio.tab("runs")
    row = studio.page.locator(".k5-table tbody tr", has_text="red circle").last
    row.wait_for()
    assert "finished" in row.inner_text()
    row.click()
    details = studio.page.locator(".k5-details.open")
    details.wait_for()
    studio.page.wait_for_function("document.querySelector('.k5-details .k5-log').textContent.length > 20")
    text = details.inner_text()
    assert first_run["id"] in text
    assert str(first_run["seed"]) in text
    studio.page.wait_for_selector(".k5-details video")
    studio.page.keyboard.press("Escape")
    studio.page.wait_for_selector(".k5-details.open", state="detached")


def test_log_shows_a_progress_bar_as_one_line(studio: Studio) -> None:
    r"""A carriage return starts the line again; \r\n and a return at the end of a chunk are no empty lines."""
    text = studio.page.evaluate(
        """() => {
          const log = K5.makeLog();
          for (const part of ['one\\r\\ntwo 1/3\\r', 'two 2/3\\rtwo 3/3', '\\nthree\\r', '\\nfour'])  log.add(part);
          return log.box.textContent;
        }"""
    )
    assert text == "one\ntwo 3/3\nthree\nfour"


def test_settings_check_a_path_at_once(studio: Studio, tmp_path: Path) -> None:
    """A path gets its header line, or a sentence that says what is wrong with it."""
    demo = Path(__file__).resolve().parents[2] / "backend" / "demo" / "weights"
    studio.tab("settings")
    # The lines come with the values of the fields; what is typed before that would be overwritten.
    studio.page.wait_for_selector(".k5-check-line:has-text('Not set')")
    studio.page.locator("#k5-s-vae").locator("input, textarea").fill(str(demo / "vae"))
    studio.page.locator("#k5-s-dit").locator("input, textarea").fill(str(demo / "vae"))
    studio.page.click("#k5-s-save")
    studio.page.wait_for_selector(".k5-check-line .k5-check.ok:has-text('VAE')")
    lines = studio.page.locator(".k5-check-line").all_inner_texts()
    assert lines[0].startswith("–"), lines
    studio.page.locator("#k5-s-vae").locator("input, textarea").fill("")
    studio.page.locator("#k5-s-dit").locator("input, textarea").fill("")
    studio.page.click("#k5-s-save")
    studio.page.wait_for_function("document.querySelectorAll('.k5-check-line .k5-check.ok').length <= 3")
    studio.page.wait_for_selector(".k5-check-line:has-text('Not set')")


def test_language_and_theme(studio: Studio, server: Server) -> None:
    """The page comes back in Russian, every label of it, and in the theme that was chosen; then as before."""
    studio.page.get_by_role("button", name="Русский").or_(studio.page.locator("button[title=Русский]")).first.click()
    studio.page.wait_for_selector("#k5-tab-runs-button:has-text('Запуски')", timeout=30_000)
    studio.ready()
    assert studio.page.locator("#k5-generate").inner_text().startswith("Создать")
    assert studio.page.locator("#k5-f-prompt").inner_text().startswith("Запрос")
    studio.page.locator("button[title^='Тема']").click()
    studio.page.wait_for_function("!document.body.classList.contains('dark')")
    studio.reload()
    assert "dark" not in studio.page.evaluate("document.body.className").split()
    for _ in range(2):
        studio.page.locator("button[title^='Тема']").click()
        studio.page.wait_for_timeout(400)
    studio.page.locator("button[title=English]").click()
    studio.page.wait_for_selector("#k5-tab-runs-button:has-text('Runs')", timeout=30_000)
    studio.ready()
    assert studio.page.evaluate("document.body.classList.contains('dark')")


def _on_any_computer(studio: Studio) -> Studio:
    """The page without the name of the processor that made the pictures."""

    def answer(route: Any) -> None:
        status = route.fetch().json()
        route.fulfill(json=status | {"device": status["device"] | {"name": "CPU"}})

    studio.page.route("**/api/status", answer)
    studio.page.wait_for_function("document.querySelector('.k5-device')?.textContent.startsWith('CPU')")
    return studio


def test_pictures(
    open_studio: Callable[..., Studio], first_run: dict[str, Any], pictures: Path, server: Server
) -> None:
    """The pictures of the documentation, made by the tests so that they show what there is."""
    (server.workspace / "drafts" / "generate.json").unlink(missing_ok=True)
    if os.environ.get("K5_SCREENSHOTS") == "1":  # a strip with more than one clip looks like use
        studio = open_studio()
        for example in ("star", "triangle", "square"):
            studio.page.locator("#k5-slot-examples .k5-chip", has_text=example).click()
            studio.page.wait_for_timeout(1000)
            server.ended(studio.generate())
    for name, width, height, scheme in (
        ("generate-dark", 1280, 1000, "dark"),
        ("generate-light", 1280, 1000, "light"),
        ("generate-400", 400, 800, "dark"),
    ):
        studio = _on_any_computer(open_studio(width, height, scheme))
        studio.page.wait_for_function("document.querySelector('.k5-screen video')?.readyState >= 2")
        studio.page.wait_for_timeout(600)
        studio.page.screenshot(path=pictures / f"{name}.png")
    studio = _on_any_computer(open_studio())
    for name in ("runs", "settings"):
        studio.tab(name)
        studio.page.wait_for_timeout(1500)
        if name == "runs":
            studio.page.locator(".k5-table tbody tr", has_text="red circle").last.click()
            studio.page.wait_for_timeout(1500)
        studio.page.screenshot(path=pictures / f"{name}.png")
        assert (pictures / f"{name}.png").stat().st_size > 10_000
