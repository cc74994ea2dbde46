"""The Dataset tab with a dataset of real clips and stills, some of them faulty; and pictures of it."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Server, Studio
from tests.real_clips import caption, sample_frames, write_h264

MARKUP = "<img src=x onerror=window.broken=1>"
DECODED = {"bikes": 204, "bunny": 96, "phone": 40}  # frames of the samples that are used; each sample is read once
#: What reaches over the right edge of the page, if the page scrolls sideways.
TOO_WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? "" :
  [...document.querySelectorAll(".k5-dataset *")].filter((node) => node.getBoundingClientRect().right > innerWidth)
    .map((node) => node.className).filter((name) => !/tab|pick|icon/.test(name)).join(" ") || "the page" """
WIDE, TALL, SQUARE = (320, 176), (176, 320), (240, 240)


def _cut(name: str, first: int, count: int, size: tuple[int, int]) -> list[numpy.ndarray]:
    """Frames of a sample, cropped in the middle to the aspect of `size` (width, height) and scaled to it."""
    frames = sample_frames(name, DECODED[name])[first : first + count]
    height, width = frames[0].shape[:2]
    factor = min(width / size[0], height / size[1])
    w, h = int(size[0] * factor), int(size[1] * factor)
    left, top = (width - w) // 2, (height - h) // 2
    cropped = [frame[top : top + h, left : left + w] for frame in frames]
    return [numpy.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in cropped]


def make_clips(folder: Path) -> Path:
    """Clips and stills of different sizes, rates and faults, with captions."""
    bunny = _cut("bunny", 60, 33, WIDE)
    good = {
        "street.mp4": (_cut("bikes", 0, 34, WIDE), 24, "k5film, bicycles pass a street corner"),
        "crossing.mp4": (_cut("bikes", 90, 42, SQUARE), 30, "k5film, a crossing with people and bicycles"),
        "meadow.mp4": (_cut("bunny", 60, 33, (400, 188)), 25, "k5film, a rabbit in a meadow"),
        "rabbit_tall.mp4": (_cut("bunny", 20, 28, TALL), 24, "k5film, a rabbit looks up"),
        "portrait.mp4": (_cut("phone", 0, 40, (176, 144)), 30, "a man talks in a car"),
        "two_scenes.mp4": (_cut("bikes", 40, 14, WIDE) + bunny[:16], 24, "k5film, a street, then a meadow"),
        "night.mp4": ([numpy.zeros((176, 320, 3), numpy.uint8)] * 28, 24, "k5film, night"),
    }
    for name, (frames, rate, text) in good.items():
        caption(write_h264(folder / name, frames, rate), text)
    barred = numpy.stack(bunny)
    barred[:, :24], barred[:, -24:] = 0, 0
    caption(write_h264(folder / "cinema.mp4", list(barred), 24), "k5film, a rabbit between bars")
    write_h264(folder / "untold.mp4", _cut("bikes", 170, 30, WIDE), 24)
    caption(Path(shutil.copy(folder / "meadow.mp4", folder / "meadow_again.mp4")), "k5film, the same meadow")
    (folder / "damaged.mp4").write_bytes(bytes(range(256)) * 16)
    caption(folder / "damaged.mp4", "k5film, damaged")
    for name, sample, number, size in (
        ("rabbit.jpg", "bunny", 90, (384, 256)),
        ("corner.png", "bikes", 120, (256, 256)),
    ):
        Image.fromarray(_cut(sample, number, 1, size)[0]).save(folder / name)
        caption(folder / name, f"k5film, a still, {name[:-4]}")
    return folder


class Tab:
    """The Dataset tab of one page."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.page = studio, studio.page
        studio.tab("dataset")

    def view(self, name: str) -> Tab:
        self.page.click(f"#k5-ds-tab-{name}")
        return self

    def tile(self, name: str) -> Any:
        found = self.page.locator(".k5-ds-tile").filter(has=self.page.get_by_text(name, exact=True))
        found.scroll_into_view_if_needed()
        return found

    def choose(self, name: str) -> None:
        """Click an item and wait until its caption is there to be edited."""
        self.tile(name).click()
        expect(self.page.locator(".k5-ds-chosen-name").first).to_have_text(name)

    @property
    def editor(self) -> Any:
        return self.page.locator(".k5-ds-caption")

    def dialog(self) -> Any:
        return self.page.locator("dialog.k5-dialog[open]")


def create(page: Page, folder: Path, title: str) -> None:
    """Make a dataset of a folder, as a person does it."""
    page.get_by_role("button", name="New from folder").locator("visible=true").first.click()
    dialog = page.locator("dialog.k5-dialog[open]")
    dialog.locator(".k5-ds-chooser input").fill(str(folder))
    dialog.locator(".k5-ds-chooser input").press("Enter")
    dialog.locator(".k5-ds-found:not(.none)", has_text="video").wait_for()
    dialog.get_by_role("button", name="Create the dataset").click()
    dialog.wait_for(state="detached")
    page.locator(".k5-ds-title", has_text=title).wait_for()
    page.locator(".k5-ds-tile:not(.waiting)").first.wait_for()


@pytest.fixture(scope="module")
def clips(server: Server) -> Path:
    """The folder of the dataset."""
    return make_clips(server.workspace.parent / "holiday")


@pytest.fixture(scope="module")
def toml(server: Server, clips: Path, chromium: Browser) -> Path:
    """The file of the dataset that the page makes of the folder."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    studio = Studio(context.new_page(), server).open()
    studio.tab("dataset")
    create(studio.page, clips, "holiday")
    context.close()
    assert studio.errors == []
    return server.workspace / "datasets" / "holiday.toml"


@pytest.fixture
def tab(toml: Path, studio: Studio) -> Tab:
    """The tab with the dataset open."""
    tab = Tab(studio)
    tab.page.locator(".k5-ds-name", has_text="holiday").click()
    tab.page.locator(".k5-ds-title", has_text="holiday").wait_for()
    tab.page.locator(".k5-ds-tile:not(.waiting)").first.wait_for()
    return tab


def _tables(toml: Path) -> list[dict[str, Any]]:
    return tomllib.loads(toml.read_text("utf-8"))["datasets"]


def _brightness(page: Page, selector: str) -> float:
    return page.evaluate(
        """selector => {
          const video = document.querySelector(selector), canvas = document.createElement("canvas");
          canvas.width = canvas.height = 16;
          const context = canvas.getContext("2d");
          context.drawImage(video, 0, 0, 16, 16);
          const data = context.getImageData(0, 0, 16, 16).data;
          return data.reduce((sum, value, at) => sum + (at % 4 < 3 ? value : 0), 0) / 768;
        }""",
        selector,
    )


def test_a_folder_becomes_a_dataset(tab: Tab, toml: Path) -> None:
    """Both kinds are found, faulty files say so, thumbnails are there, and a clip plays under the pointer."""
    assert {next(key for key in table if key.endswith("directory")) for table in _tables(toml)} == {
        "video_directory",
        "image_directory",
    }
    expect(tab.page.locator(".k5-ds-total")).to_have_text("13 files")
    expect(tab.page.locator(".k5-ds-numbers")).to_contain_text("1 without a caption")
    expect(tab.tile("damaged.mp4").locator(".k5-ds-badge.warn")).to_have_text("skipped")
    street = tab.tile("street.mp4")
    assert "320×176 · 24 fps" in street.inner_text()
    tab.page.wait_for_function(
        "[...document.querySelectorAll('.k5-ds-tile img')].filter((image) => image.naturalWidth > 100).length >= 6"
    )
    street.hover()
    tab.page.wait_for_selector(".k5-ds-tile video.on")
    assert _brightness(tab.page, ".k5-ds-tile video.on") > 20
    tab.page.locator(".k5-ds-search input").hover()
    tab.page.wait_for_selector(".k5-ds-tile video", state="detached")
    tab.page.locator(".k5-ds-search input").fill("rabbit")
    expect(tab.page.locator(".k5-ds-total")).to_have_text("4 files")


def test_captions_are_saved_but_not_over_an_edit_from_outside(tab: Tab, clips: Path, server: Server) -> None:
    """What is typed is soon on disk; what somebody else wrote meanwhile stays until one decides; undo goes back."""
    file = clips / "street.txt"
    before = file.read_text("utf-8")
    tab.choose("street.mp4")
    expect(tab.editor).to_have_value(before)
    tab.editor.fill(before + " in the rain")
    expect(tab.page.locator(".k5-ds-saved")).to_have_text("Saved")
    assert file.read_text("utf-8").strip() == before + " in the rain"

    # In this order: while nothing is typed, the page just shows what the file says now.
    tab.editor.fill("mine")
    file.write_text("written by somebody else", encoding="utf-8")
    tab.editor.press("Control+Enter")
    conflict = tab.page.locator(".k5-ds-editor .k5-ds-conflict")
    expect(conflict).to_contain_text("written by somebody else")
    assert file.read_text("utf-8") == "written by somebody else"
    conflict.get_by_role("button", name="Keep mine").click()
    server.wait(lambda: file.read_text("utf-8").strip() == "mine", 10)

    tab.editor.fill("mine again")
    file.write_text("once more from outside", encoding="utf-8")
    tab.editor.press("Control+Enter")
    conflict.get_by_role("button", name="Take the file's text").click()
    expect(tab.editor).to_have_value("once more from outside")
    assert file.read_text("utf-8") == "once more from outside"
    tab.editor.fill(before)
    tab.editor.press("Control+Enter")
    expect(tab.page.locator(".k5-ds-saved")).to_have_text("Saved")
    tab.page.get_by_role("button", name="Undo the last change").or_(tab.page.get_by_role("button", name="Undo")).click()
    server.wait(lambda: file.read_text("utf-8") == "once more from outside", 10)
    tab.page.get_by_role("button", name="Redo").click()
    server.wait(lambda: file.read_text("utf-8").strip() == before, 10)


def test_many_captions_change_at_once_after_a_preview(tab: Tab, clips: Path, server: Server) -> None:
    """The preview counts and shows; nothing is written before Change; undo brings all of them back."""
    texts = {path: path.read_bytes() for path in clips.glob("*.txt")}
    tab.page.get_by_role("button", name="Change captions").click()
    dialog = tab.dialog()
    dialog.get_by_label("Find").fill("k5film")
    dialog.get_by_label("Replace with").fill("k5movie")
    dialog.get_by_text("captions would change").wait_for()
    expect(dialog.locator(".k5-ds-example ins").first).to_have_text(re.compile("^k5movie,"))
    assert {path: path.read_bytes() for path in texts} == texts
    dialog.get_by_role("button", name="Change", exact=True).click()
    changed = [path for path, content in texts.items() if b"k5film" in content]
    server.wait(lambda: all(b"k5movie" in path.read_bytes() for path in changed), 10)
    tab.page.get_by_role("button", name="Undo").click()
    server.wait(lambda: {path: path.read_bytes() for path in texts} == texts, 10)
    tab.page.get_by_role("button", name="Change captions").click()
    tab.page.keyboard.press("Escape")
    expect(tab.dialog()).to_have_count(0)


def test_keys_select_and_the_selection_is_excluded(tab: Tab, toml: Path, server: Server) -> None:
    """Arrows move, Shift extends, Exclude writes names into the TOML, Include takes them out; space plays."""
    tab.choose("night.mp4")
    grid = tab.page.locator(".k5-ds-grid")
    grid.press("ArrowRight")
    chosen = tab.page.locator(".k5-ds-chosen-name").first
    expect(chosen).to_have_text("portrait.mp4")
    grid.press("ArrowLeft")
    grid.press("Shift+ArrowRight")
    expect(tab.page.locator(".k5-ds-picked")).to_have_text("2 selected")
    tab.tile("crossing.mp4").click(modifiers=["Control"])
    expect(tab.page.locator(".k5-ds-picked")).to_have_text("3 selected")
    tab.page.locator(".k5-ds-search input").hover()
    expect(tab.page.locator(".k5-ds-tile video")).to_have_count(0)
    grid.press("Space")
    tab.page.wait_for_selector(".k5-ds-tile.current video")
    grid.press("Space")
    expect(tab.page.locator(".k5-ds-tile video")).to_have_count(0)
    exclude = tab.page.locator(".k5-ds-actions").get_by_role("button", name="Exclude")
    exclude.click()
    names = {"night.mp4", "portrait.mp4", "crossing.mp4"}
    server.wait(lambda: any(set(table.get("exclude", [])) == names for table in _tables(toml)), 10)
    tab.page.get_by_label("Show", exact=True).select_option("excluded")
    expect(tab.page.locator(".k5-ds-total")).to_have_text("3 files")
    tab.page.get_by_role("button", name="Select all").click()
    expect(tab.page.locator(".k5-ds-picked")).to_have_text("3 selected")
    tab.page.locator(".k5-ds-actions").get_by_role("button", name="Include").click()
    expect(tab.page.locator(".k5-ds-grid .k5-empty")).to_be_visible()
    assert not any(table.get("exclude") for table in _tables(toml))


def test_what_the_model_sees_has_the_shape_of_its_bucket(tab: Tab) -> None:
    """The strip and the clip are in the bucket's aspect, the crop lies inside the source, the words name the bucket."""
    tab.choose("rabbit_tall.mp4")
    tab.page.locator(".k5-ds-chosen").get_by_role("button", name="What the model sees").click()
    tab.page.wait_for_selector(".k5-ds-words")
    words = tab.page.locator(".k5-ds-words").inner_text()
    width, height, frames = map(int, re.search(r"(\d+)×(\d+), (\d+) frames", words).groups())  # type: ignore[union-attr]
    assert height > width
    tab.page.wait_for_function("document.querySelector('.k5-ds-strip').naturalWidth > 0")
    strip = tab.page.evaluate(
        "(image => [image.naturalWidth, image.naturalHeight])(document.querySelector('.k5-ds-strip'))"
    )
    assert strip[0] / strip[1] == pytest.approx(min(8, frames) * width / height, rel=0.05)
    tab.page.wait_for_function("document.querySelector('.k5-ds-trained video').readyState >= 2")
    video = tab.page.evaluate(
        "(clip => [clip.videoWidth, clip.videoHeight])(document.querySelector('.k5-ds-trained video'))"
    )
    assert video == [width, height]
    assert _brightness(tab.page, ".k5-ds-trained video") > 20
    whole, crop = tab.page.locator(".k5-ds-whole").bounding_box(), tab.page.locator(".k5-ds-crop").bounding_box()
    assert whole is not None
    assert crop is not None
    assert crop["width"] <= whole["width"] + 1
    assert crop["width"] / crop["height"] == pytest.approx(width / height, rel=0.03)

    tab.view("buckets")
    rows = tab.page.locator(".k5-ds-bucket")
    rows.first.wait_for()
    expect(tab.page.locator(".k5-ds-total-steps")).to_contain_text("steps an epoch")
    rows.filter(has_text=f"{width}×{height}").first.click()
    expect(tab.page.locator(".k5-ds-pick.on")).to_contain_text("rabbit_tall.mp4")
    expect(tab.page.locator(".k5-ds-pick")).to_have_count(1)


def test_the_check_finds_faults_that_can_be_dealt_with(tab: Tab, toml: Path, server: Server) -> None:
    """The black clip and the copy are found; one is excluded, one ignored and shown again, one leads to its caption."""
    tab.view("lint")
    tab.page.get_by_label("Trigger word").fill("k5film")
    tab.page.get_by_role("button", name="Check the dataset").click()
    tab.page.locator(".k5-ds-progress").wait_for()
    black = tab.page.locator(".k5-ds-group[data-kind=black] .k5-ds-finding")
    black.filter(has_text="night.mp4").wait_for(timeout=90_000)
    double = tab.page.locator(".k5-ds-group[data-kind=near_duplicate] .k5-ds-finding")
    expect(double).to_contain_text("meadow_again.mp4")
    expect(tab.page.locator(".k5-ds-group[data-kind=broken]")).to_contain_text("damaged.mp4")
    expect(tab.page.locator(".k5-ds-group[data-kind=missing_trigger]")).to_contain_text("portrait.mp4")
    double.get_by_role("button", name="Keep the first only").click()
    server.wait(lambda: any(table.get("exclude") == ["meadow_again.mp4"] for table in _tables(toml)), 10)
    black.get_by_role("button", name="Ignore", exact=True).click()
    expect(tab.page.locator(".k5-ds-group[data-kind=black]")).to_have_count(0)
    tab.page.get_by_label("Show 1 ignored").check()
    expect(black).to_contain_text("night.mp4")
    black.get_by_role("button", name="Do not ignore").click()
    tab.page.locator(".k5-ds-group[data-kind=no_caption]").get_by_role("button", name="Edit the caption").click()
    expect(tab.page.locator(".k5-ds-chosen-name").first).to_have_text("untold.mp4")
    tab.page.get_by_label("Show", exact=True).select_option("findings")
    expect(tab.tile("untold.mp4").locator(".k5-ds-badge.bad")).to_be_visible()


def test_settings_and_text_are_one_file(tab: Tab, toml: Path, server: Server) -> None:
    """A comment survives a change by a field; a wrong value is refused at its field; an edit from outside is kept."""
    tab.view("toml")
    text = tab.page.locator(".k5-ds-toml")
    expect(text).to_have_value(toml.read_text("utf-8"))
    text.fill("# my note\n" + toml.read_text("utf-8"))
    text.press("Control+s")
    server.wait(lambda: toml.read_text("utf-8").startswith("# my note\n"), 10)

    tab.view("setup")
    entry = tab.page.locator(".k5-ds-entry").first
    entry.get_by_label("Repeats", exact=True).fill("3")
    entry.get_by_label("Repeats", exact=True).press("Tab")
    server.wait(lambda: _tables(toml)[0].get("num_repeats") == 3, 10)
    assert toml.read_text("utf-8").startswith("# my note\n")
    entry.get_by_label("Clip lengths in frames", exact=True).fill("9, x")
    entry.get_by_label("Clip lengths in frames", exact=True).press("Tab")
    problem = entry.locator("[data-key=target_frames] .k5-ds-problem")
    expect(problem).to_contain_text("whole numbers")
    assert "x" not in str(_tables(toml)[0]["target_frames"])
    entry.get_by_label("Clip lengths in frames", exact=True).fill("9, 25")
    entry.get_by_label("Clip lengths in frames", exact=True).press("Tab")
    server.wait(lambda: _tables(toml)[0]["target_frames"] == [9, 25], 10)
    expect(problem).to_be_hidden()

    tab.view("toml")
    expect(text).to_have_value(toml.read_text("utf-8"))
    outside = toml.read_text("utf-8") + "\n# from outside\n"
    text.fill("# mine\n" + toml.read_text("utf-8"))
    toml.write_text(outside, encoding="utf-8")
    text.press("Control+s")
    conflict = tab.page.locator(".k5-ds-toml-view .k5-ds-conflict")
    expect(conflict).to_be_visible()
    assert toml.read_text("utf-8") == outside
    conflict.get_by_role("button", name="Reload").click()
    expect(text).to_have_value(outside)


def test_markup_in_names_and_captions_stays_text(studio: Studio, server: Server) -> None:
    """A file name and a caption that are markup are shown letter by letter, in every view; nothing of them runs."""
    folder = server.workspace.parent / "odd <b>names"
    caption(
        write_h264(folder / f"{MARKUP}.mp4", _cut("bikes", 0, 26, WIDE), 24),
        f"<script>window.broken=1</script>{MARKUP}",
    )
    tab = Tab(studio)
    create(tab.page, folder, "odd")
    tab.choose(f"{MARKUP}.mp4")
    expect(tab.editor).to_have_value(re.compile("^<script>"))
    for name in ("setup", "seen", "buckets", "lint", "toml"):
        tab.view(name)
        tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("window.broken") is None
    assert tab.page.locator(".k5-dataset img[src=x]").count() == 0
    tab.page.get_by_role("button", name="Remove from the list").click()
    tab.page.get_by_role("button", name="Really?").or_(tab.page.get_by_text("Really?")).first.click()
    expect(tab.page.locator(".k5-ds-name", has_text="odd")).to_have_count(0)
    assert any((server.workspace / "datasets").glob("*odd*.toml"))


def _many(route: Any) -> None:
    """Ten thousand items, answered by the test."""
    values = dict(re.findall(r"(\w+)=(\d+)", route.request.url))
    offset, limit = int(values["offset"]), int(values["limit"])
    common = {"entry": 0, "kind": "image", "width": 640, "height": 360, "clips": [], "findings": [], "reason": None}
    texts = {"caption": "", "caption_revision": "", "caption_editable": True, "excluded": False}
    made = [
        common | texts | {"key": f"{index:016x}", "name": f"clip_{index:05d}.jpg", "thumb": None, "preview": None}
        for index in range(offset, min(10_000, offset + limit))
    ]
    route.fulfill(json={"total": 10_000, "offset": offset, "items": made})


def test_ten_thousand_items_are_as_light_as_twenty(tab: Tab) -> None:
    """Only what is on screen is drawn and asked for, and the end of the list is a key away."""
    asked: list[str] = []
    tab.page.on("request", lambda request: "/items?" in request.url and asked.append(request.url))
    tab.page.route("**/items?*", _many)
    tab.page.locator(".k5-ds-search input").fill("clip")
    expect(tab.page.locator(".k5-ds-total")).to_have_text("10,000 files")
    tab.page.locator(".k5-ds-grid").press("End")
    tab.page.locator(".k5-ds-tile", has_text="clip_09999.jpg").wait_for()
    assert tab.page.locator(".k5-ds-tile").count() < 100
    assert len(asked) <= 4
    tab.page.locator(".k5-ds-grid").press("Home")
    tab.page.locator(".k5-ds-tile", has_text="clip_00000.jpg").wait_for()


def _on_any_computer(page: Page) -> None:
    """The page without the name of the processor that made the pictures."""

    def answer(route: Any) -> None:
        status = route.fetch().json()
        route.fulfill(json=status | {"device": status["device"] | {"name": "CPU"}})

    page.route("**/api/status", answer)
    page.wait_for_function("document.querySelector('.k5-device')?.textContent.startsWith('CPU')")


def _check_again(tab: Tab) -> None:
    """A check that knows what the tests before have changed."""
    tab.view("lint")
    tab.page.get_by_label("Trigger word").fill("k5film")
    tab.page.get_by_role("button", name="Check the dataset").click()
    tab.page.locator(".k5-ds-progress").wait_for()
    tab.page.locator(".k5-ds-progress").wait_for(state="hidden", timeout=90_000)


def test_pictures(toml: Path, open_studio: Callable[..., Studio], pictures: Path) -> None:
    """At 400 pixels no view is wider than the screen; with K5_SCREENSHOTS=1 the pictures of the documentation."""
    wanted = os.environ.get("K5_SCREENSHOTS") == "1"
    for name, width, height, view in (
        ("dataset", 1280, 1000, "items"),
        ("dataset-lint", 1280, 1000, "lint"),
        ("dataset-seen", 1280, 1000, "seen"),
        ("dataset-narrow", 400, 860, "items"),
    ):
        if width > 400 and not wanted:
            continue
        tab = Tab(open_studio(width, height, "light" if view == "seen" else "dark"))
        tab.page.locator(".k5-ds-name", has_text="holiday").click()
        tab.page.locator(".k5-ds-tile:not(.waiting)").first.wait_for()
        tab.choose("meadow.mp4")
        _on_any_computer(tab.page)
        if name == "dataset":
            _check_again(tab)
        if width == 400:
            for other in ("setup", "seen", "buckets", "lint", "toml", "items"):
                tab.view(other)
                tab.page.wait_for_timeout(250)
                assert tab.page.evaluate(TOO_WIDE) == "", other
        tab.view(view)
        tab.page.wait_for_timeout(2500 if wanted else 300)
        if view == "seen":
            tab.page.locator(".k5-ds-clips .k5-chip").last.click()
            tab.page.wait_for_timeout(1500)
        tab.page.evaluate("scrollTo(0, 0)")
        tab.page.screenshot(path=pictures / f"{name}.png")
        assert (pictures / f"{name}.png").stat().st_size > 10_000
