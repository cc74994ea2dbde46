"""The form: problems beside their fields, drafts, chips, LoRA rows, search, size of the page."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.conftest import Server, Studio

MAX_MOUNTED = 250


def test_problems_stand_at_their_fields_and_the_button_counts_them(studio: Studio, server: Server) -> None:
    """All problems at once, in words, at the field; Generate starts nothing and leads to the first one."""
    studio.field("width").fill("70")
    studio.page.wait_for_selector("#k5-f-width .k5-problem-line")
    studio.field("prompt").fill("")
    studio.page.wait_for_selector("#k5-f-prompt .k5-problem-line")
    assert "The nearest is 64" in studio.page.locator("#k5-f-width .k5-problem-line").inner_text()
    assert "Write what the clip shows" in studio.page.locator("#k5-f-prompt .k5-problem-line").inner_text()
    assert "2 problems left" in studio.page.locator("#k5-generate").inner_text()
    before = len(server.get("runs")["runs"])
    studio.page.click("#k5-generate")
    studio.page.wait_for_function("document.activeElement.closest('#k5-f-prompt, #k5-f-width')")
    assert len(server.get("runs")["runs"]) == before
    studio.page.locator(".k5-problems button", has_text="Width").click()
    studio.page.wait_for_function("document.activeElement.closest('#k5-f-width')")
    studio.field("width").fill("64")
    studio.field("prompt").fill("a blue square moves up on a gray background")
    studio.page.wait_for_selector(".k5-problem-line", state="detached")
    assert "problem" not in studio.page.locator("#k5-generate").inner_text()


def test_missing_weights_lead_to_the_settings(studio: Studio) -> None:
    """A real model without files names what is missing, and where to set it."""
    studio.choose("Pro 19B, text to video, 5 s")
    studio.page.wait_for_selector(".k5-weights.missing")
    assert "DiT checkpoint, VAE" in studio.page.locator(".k5-weights").inner_text()
    assert studio.field("width").input_value() == "768"
    assert studio.field("frames").input_value() == "121"
    assert "121 frames = 5.0 s" in studio.page.locator(".k5-means").inner_text()
    studio.page.locator(".k5-problems button", has_text="DiT checkpoint").click()
    studio.page.wait_for_function("document.activeElement.closest('#k5-f-dit')")
    studio.page.locator(".k5-weights button").click()
    studio.page.wait_for_selector("#k5-s-task input:visible")


def test_size_of_an_image_task_follows_the_image(studio: Studio) -> None:
    """From an image the size stays open until somebody sets one."""
    studio.choose("Pro 19B, image to video, 5 s")
    studio.page.wait_for_selector(".k5-chip.on:has-text('as the image')")
    assert studio.field("width").input_value() == ""
    assert studio.page.locator("#k5-f-width .k5-problem-line").count() == 0
    studio.page.locator(".k5-chip", has_text="512×768").click()
    studio.page.wait_for_function("document.querySelector('#k5-f-height input').value === '768'")
    studio.page.locator("#k5-slot-sizes button[title^=Swap]").click()
    studio.page.wait_for_function("document.querySelector('#k5-f-height input').value === '512'")
    studio.page.locator(".k5-chip", has_text="as the image").click()
    studio.page.wait_for_function("document.querySelector('#k5-f-height input').value === ''")
    studio.page.wait_for_selector("#k5-f-width .k5-problem-line", state="detached")


def test_draft_survives_reload_and_another_device(studio: Studio, open_studio: Callable[..., Studio]) -> None:
    """What is typed is kept on the server while it is typed."""
    studio.field("prompt").fill("a green star shrinks on a navy background")
    studio.field("guidance").fill("5.5")
    studio.page.get_by_role("button", name="Add a LoRA").click()
    studio.page.locator(".k5-lora-row input[type=text]").fill("/nowhere/style.safetensors")
    studio.page.locator(".k5-lora-row input[type=number]").fill("0.8")
    studio.page.wait_for_selector(".k5-problems li:has-text('LoRA')")
    for other in (studio.reload(), open_studio(400, 800)):
        assert other.field("prompt").input_value() == "a green star shrinks on a navy background"
        assert other.field("guidance").input_value() == "5.5"
        assert other.page.locator(".k5-lora-row input[type=text]").input_value() == "/nowhere/style.safetensors"
        assert other.page.locator(".k5-lora-row input[type=number]").input_value() == "0.8"
    studio.page.locator(".k5-lora-row button[title=Remove]").click()
    studio.page.wait_for_selector(".k5-problems", state="hidden")


def test_examples_seed_and_reset(studio: Studio) -> None:
    """Chips fill fields; Reset asks once more and then starts from the beginning."""
    studio.page.locator("#k5-slot-examples .k5-chip", has_text="star").click()
    assert studio.field("prompt").input_value() == "a big yellow star grows on a navy background"
    studio.field("seed").fill("123")
    studio.page.wait_for_selector("#k5-slot-seed .k5-button:not(.on):has-text('New each time')")
    studio.page.get_by_role("button", name="New each time").click()
    studio.page.wait_for_function("document.querySelector('#k5-f-seed input').value === '-1'")
    studio.page.get_by_role("button", name="Reset").click()
    studio.page.locator("button[data-sure]").click()
    studio.page.wait_for_function("document.querySelector('#k5-f-prompt textarea').value.startsWith('a red circle')")


def test_advanced_options_can_be_searched(studio: Studio) -> None:
    """A word leaves the options that speak of it; each carries its help."""
    studio.page.get_by_text("Advanced: sampling").click()
    studio.page.wait_for_selector("#k5-f-blocks_to_swap:visible")
    studio.page.locator("#k5-search input").fill("tiles memory")
    studio.page.wait_for_selector("#k5-f-blocks_to_swap", state="hidden")
    assert studio.page.locator("#k5-f-vae_tiling").is_visible()
    assert "overlapping tiles" in studio.page.locator("#k5-f-vae_tiling").inner_text()
    studio.page.locator("#k5-search input").fill("zzz")
    studio.page.wait_for_selector("#k5-search p:visible")


def test_ctrl_enter_starts(studio: Studio, server: Server) -> None:
    """Ctrl+Enter presses Generate; here it meets a problem, so nothing is started."""
    studio.field("frames").fill("0")
    studio.page.wait_for_selector("#k5-f-frames .k5-problem-line")
    studio.field("prompt").press("Control+Enter")
    studio.page.wait_for_function("document.activeElement.closest('#k5-f-frames')")
    assert server.get("status")["queue"] == []


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_narrow_screen_does_not_scroll_sideways(open_studio: Callable[..., Studio], scheme: str) -> None:
    """At 400 px everything is stacked; no tab is wider than the screen."""
    studio = open_studio(400, 800, scheme)
    for name in ("generate", "runs", "settings"):
        studio.tab(name)
        studio.page.wait_for_timeout(800)
        width = studio.page.evaluate("document.documentElement.scrollWidth")
        assert width <= 400, f"{name} is {width} px wide"


def test_few_widgets_are_mounted(studio: Studio) -> None:
    """Principle 8: with every tab visited and every group open, fewer than 250 Gradio blocks are in the page."""
    studio.page.get_by_text("Advanced: sampling").click()
    for name in ("runs", "settings", "generate"):
        studio.tab(name)
        studio.page.wait_for_timeout(300)
    mounted = studio.page.evaluate("document.querySelectorAll('.gradio-container .block').length")
    assert 20 < mounted < MAX_MOUNTED


def test_progress_changes_no_gradio_component(studio: Studio) -> None:
    """Polling touches our own parts only."""
    studio.page.wait_for_timeout(4000)  # the events of filling the form
    studio.page.evaluate(
        """() => {
          window.touched = [];
          new MutationObserver((records) => {
            for (const record of records) {
              const node = record.target.nodeType === 1 ? record.target : record.target.parentElement;
              if (node && !node.closest('.k5-root')) window.touched.push(node.outerHTML.slice(0, 200));
            }
          }).observe(document.querySelector('.gradio-container'),
            {subtree: true, childList: true, characterData: true});
        }"""
    )
    studio.page.evaluate("Promise.all([0, 1, 2].map(() => K5.poke()))")
    studio.page.wait_for_timeout(4000)
    assert studio.page.evaluate("window.touched") == []
