"""--check and --prune of the command that caches captions: what is told, what is moved, what is never touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.caching.ledger_command import REPORT_FILE, prune_caches, run_ledger
from backend.config.cache import CacheTextOptions
from backend.config.dataset import load_dataset_config
from backend.data.cache_names import TRASH_FOLDER
from backend.data.recipes import LatentRecipe
from backend.data.text_request import text_recipe
from backend.errors import Problems
from backend.events import Journal, read_events
from backend.progress import Reporter
from backend.text import encoders as encoders_module
from tests.integration.caption_folder import (
    EMPTY,
    add_sources,
    cache_text,
    make_config,
    make_dataset,
    read_all,
    write_caption,
)
from tests.unit.data.clips import write_clip
from tests.unit.data.dataset_folder import foreign_latent, foreign_text

CAPTIONS = {"a": "the first", "b": "the second"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A cached dataset of two stills."""
    config = make_dataset(tmp_path, images=CAPTIONS)
    assert cache_text(config).code == 0
    return config


def check(config: Path, capsys: pytest.CaptureFixture[str], *words: str, **options):
    capsys.readouterr()
    run = cache_text(config, "--check", *words, **options)
    return run, capsys.readouterr().out


def test_check_encodes_nothing_and_tells_every_state(small: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small.parent
    write_caption(root / "image" / "a.txt", "changed")
    add_sources(root / "image", "image", {"c": "new", "d": None})
    foreign_text(root / "cache-0" / "gone_k5_te.safetensors", "left over")
    before = read_all(root / "cache-0")
    for name in ("QwenEncoder", "ClipEncoder"):
        monkeypatch.delattr(encoders_module, name)
    run, text = check(small, capsys)
    assert run.code == 0
    assert "texts: 2 valid, 1 stale, 2 missing" in text
    assert "a_k5_te.safetensors: stale (caption: changed)" in text
    assert "gone_k5_te.safetensors" in text
    assert "Not compared, because the command does not name them: the VAE." in text
    assert run.of("finished")[0]["outputs"] == [REPORT_FILE]
    report = json.loads((run.folder / REPORT_FILE).read_text(encoding="utf-8"))
    run, text = check(small, capsys, "--report_format", "json")
    assert json.loads(text) == report
    assert report["datasets"][0]["texts"] == {"valid": 2, "stale": 1, "foreign": 0, "broken": 0, "missing": 2}
    assert report["datasets"][0]["missing_captions"] == ["d.png"]
    assert not report["ready"]
    assert read_all(root / "cache-0") == before


def test_check_compares_what_the_command_would_write(small: Path, capsys) -> None:
    for words, valid in (((), 3), (("--dtype", "bfloat16"), 0), (("--clip_max_length", "9"), 0)):
        _, text = check(small, capsys, *words)
        assert f"texts: {valid} valid" in text if valid else "texts: 3 stale" in text
    # Without encoders only the dataset is compared, and that is said.
    run, text = check(small, capsys, encoders=())
    assert run.code == 0
    assert "texts: 3 valid" in text
    assert "the VAE, Qwen2.5-VL, CLIP" in text
    _, text = check(small, capsys, "--dtype", "bfloat16", encoders=())
    assert "text number format: was float32, now bfloat16" in text


def test_check_tells_an_encoder_that_is_not_there(small: Path, capsys) -> None:
    run, _ = check(small, capsys, encoders=("--text_encoder_qwen", str(small.parent / "nowhere")))
    assert (run.code, run.of("error")[0]["problems"][0]["field"]) == (2, "text_encoder_qwen")


def test_prune_moves_left_over_texts_and_nothing_else(small: Path, capsys) -> None:
    """Which latents are left over depends on the other command's options, so they stay here."""
    cache = small.parent / "cache-0"
    foreign_text(cache / "gone_k5_te.safetensors", "left over")
    foreign_latent(cache / "gone_0080x0060_k5.safetensors", (1, 8, 8), None)
    (cache / "notes.txt").write_text("mine")
    before = read_all(cache)
    run, _ = check(small, capsys, "--prune")
    told = [record["message"] for record in run.of("phase") if record["phase"] == "prune"]
    assert len(told) == 1
    assert "would be moved" in told[0]
    assert "1 file of" in told[0]
    assert "gone_k5_te.safetensors" in told[0]
    assert read_all(cache) == before
    run = cache_text(small, "--prune", "--skip_existing")
    assert run.code == 0
    after = read_all(cache)
    assert set(before) - set(after) == {"gone_k5_te.safetensors"}
    assert [path.name for path in (cache / TRASH_FOLDER).rglob("*.safetensors")] == ["gone_k5_te.safetensors"]
    assert next((cache / TRASH_FOLDER).rglob("*.safetensors")).read_bytes() == before["gone_k5_te.safetensors"]
    assert (cache / "notes.txt").read_text() == "mine"
    told = [record["message"] for record in run.of("phase") if record["phase"] == "prune"]
    assert any("gone_k5_te.safetensors" in message and str(cache / TRASH_FOLDER) in message for message in told)
    run = cache_text(small, "--prune", "--skip_existing")
    assert any("nothing was moved" in record["message"] for record in run.of("phase"))
    assert read_all(cache) == after


def test_prune_with_a_recipe_of_latents_moves_latents_too(small: Path, tmp_path: Path) -> None:
    cache = small.parent / "cache-0"
    foreign_latent(cache / "gone_0080x0060_k5.safetensors", (1, 8, 8), None)
    options = CacheTextOptions(dataset_config=str(small), prune=True)
    config = load_dataset_config(small)
    with Journal(tmp_path / "events.jsonl") as journal:
        reporter = Reporter(journal)
        text = text_recipe(options)
        assert run_ledger(config, options, reporter, LatentRecipe(), text, None) == []
        results = prune_caches(config, options, reporter, LatentRecipe(), text, tmp_path)
    assert [result.moved for result in results] == [["gone_0080x0060_k5.safetensors"]]
    report = json.loads((tmp_path / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["datasets"][0]["orphans"] == []
    messages = [record["message"] for record in read_events(tmp_path / "events.jsonl").records if "message" in record]
    assert any("would be moved" in message for message in messages)


def test_prune_refuses_a_dataset_that_cannot_be_read_whole(tmp_path: Path) -> None:
    """A line that cannot be read hides a source, whose caches would look left over."""
    add_sources(tmp_path / "image-0", "image", {"a": None})
    listing = tmp_path / "list.jsonl"
    listing.write_text(f'{{"image_path": "{tmp_path}/image-0/a.png", "caption": "x"}}\n')
    config = make_config(tmp_path, {"kind": "image"}, name="dataset.json")
    text = config.read_text().replace(f'"image_directory": "{tmp_path}/image-0"', f'"image_jsonl_file": "{listing}"')
    config.write_text(text)
    foreign_text(tmp_path / "cache-0" / "other_k5_te.safetensors", "of the line that is broken")
    listing.write_text(listing.read_text() + "{broken\n")
    run = cache_text(config, "--prune")
    assert run.code == 2
    assert "could not be read completely" in run.of("error")[0]["message"]
    assert "other_k5_te.safetensors" in read_all(tmp_path / "cache-0")


def test_the_text_of_a_source_without_items_is_no_orphan(tmp_path: Path, capsys) -> None:
    """Captions are cached without a look at the media, so a clip that is too short has a text too."""
    config = make_dataset(tmp_path, {"long": "nine frames", "short": "two frames"}, target_frames=[5])
    for stem, frames in (("long", 9), ("short", 2)):
        (tmp_path / "video" / f"{stem}.mp4").unlink()
        write_clip(tmp_path / "video" / f"{stem}.mp4", frames)
    assert cache_text(config, "--prune").code == 0
    names = {"long_k5_te.safetensors", "short_k5_te.safetensors", EMPTY["video"]}
    assert set(read_all(tmp_path / "cache-0")) == names
    run, _ = check(config, capsys, "--report_format", "json")
    report = json.loads((run.folder / REPORT_FILE).read_text(encoding="utf-8"))["datasets"][0]
    assert (report["texts"]["valid"], report["orphans"], report["held"]) == (2, [], 0)
    assert [skipped["source"] for skipped in report["skipped"]] == ["short.mp4"]


def test_disabled_datasets_are_left_alone(tmp_path: Path, capsys) -> None:
    add_sources(tmp_path / "one", "image", CAPTIONS)
    add_sources(tmp_path / "two", "image", CAPTIONS)
    tables = [{"kind": "image", "source": "one"}, {"kind": "image", "source": "two", "enabled": False}]
    config = make_config(tmp_path, *tables)
    foreign_text(tmp_path / "cache-1" / "gone_k5_te.safetensors", "left over")
    assert cache_text(config, "--prune").code == 0
    assert set(read_all(tmp_path / "cache-1")) == {"gone_k5_te.safetensors"}
    _, text = check(config, capsys)
    assert "Dataset 1" in text
    assert "Dataset 2" not in text


def test_a_folder_that_is_gone_is_a_problem_of_its_dataset(small: Path, tmp_path: Path) -> None:
    config = load_dataset_config(small)
    (tmp_path / "image").rename(tmp_path / "elsewhere")
    with Journal(tmp_path / "events.jsonl") as journal, pytest.raises(Problems, match="does not exist"):
        run_ledger(config, CacheTextOptions(), Reporter(journal), None, None, None)
