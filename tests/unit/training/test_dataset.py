"""Loading a training set from real cache files: what is refused and why, what is held out, what a batch holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from backend.config.train import TrainOptions
from backend.data.cache_files import write_text_cache
from backend.errors import Problems, UserError
from backend.training.dataset import load_training_set
from tests.unit.data.dataset_folder import TEXT, add_image, add_video, foreign_latent, foreign_text, make_entry
from tests.unit.training.training_folder import (
    cache_everything,
    clips,
    latent_tensors,
    stills,
    text_tensors,
    together,
    videos_are_texts,
)

__all__ = ["videos_are_texts"]

T2V, I2V = TrainOptions(task="k5-demo-t2v"), TrainOptions(task="k5-demo-i2v")
pytestmark = pytest.mark.usefixtures("videos_are_texts")


def _messages(options: TrainOptions, *entries) -> list[str]:
    with pytest.raises(Problems) as caught:
        load_training_set(options, together(*entries), 0)
    return [str(problem) for problem in caught.value.problems]


def test_items_are_what_the_caches_hold(tmp_path: Path) -> None:
    video = clips(tmp_path / "v", {"a": "80 60 9 24", "b": "60 80 9 24"}, target_frames=[5, 9], enable_bucket=True)
    found = load_training_set(T2V, together(video, stills(tmp_path / "s", 2)), 0)
    assert [(item.dataset, item.kind, item.frames) for item in found.items] == [
        (0, "video", 5), (0, "video", 9), (0, "video", 5), (0, "video", 9), (1, "image", 1), (1, "image", 1),
    ]  # fmt: skip
    assert len({item.shape for item in found.items if item.frames == 9}) == 2, "two aspect ratios, two buckets"
    for number, item in enumerate(found.items):
        batch = found.read([number], 7)
        latents, images = latent_tensors(item.name, item.shape)
        caption = item.text_path.name.removesuffix("_k5_te.safetensors")
        if item.kind == "video":
            caption = {"a": "a", "b": "b b"}[caption]
        else:
            caption = f"picture {caption}"
        text, pooled = text_tensors(caption)
        torch.testing.assert_close(batch.latents, latents[None], rtol=0, atol=0)
        torch.testing.assert_close(batch.text, text[None].float(), rtol=0, atol=0)
        torch.testing.assert_close(batch.pooled, pooled[None], rtol=0, atol=0)
        assert batch.latents_image is None, "text to video needs none"
        assert (batch.names, batch.kinds, batch.first_slot) == ((item.name,), (item.kind,), 7)
        assert batch.text_mask is None
        image = load_training_set(I2V, together(video, stills(tmp_path / "s", 2)), 0).read([number]).latents_image
        assert image is not None
        torch.testing.assert_close(image, images[None], rtol=0, atol=0)


def test_texts_of_a_batch_are_padded_on_the_right(tmp_path: Path) -> None:
    """T4, B10: captions of 1 to 4 words; every one keeps its own tokens."""
    found = load_training_set(T2V, together(clips(tmp_path, dict.fromkeys("abcd", "80 60 5 24"))), 0)
    batch = found.read([0, 3, 2])
    assert batch.text.shape == (3, 5, 24)
    assert batch.text_mask is not None
    assert batch.text_mask.tolist() == [[True] * n + [False] * (5 - n) for n in (2, 5, 4)]
    for row, caption in enumerate(("a", "d d d d", "c c c")):
        text, _ = text_tensors(caption)
        torch.testing.assert_close(batch.text[row, : len(text)], text.float(), rtol=0, atol=0)
        assert not batch.text[row, len(text) :].any()


def test_dropped_captions_bring_the_cached_empty_one(tmp_path: Path) -> None:
    with_dropout = clips(tmp_path / "a", {"a": "80 60 5 24"}, caption_dropout=0.25)
    without = clips(tmp_path / "b", {"a": "80 60 5 24"})
    (Path(without.cache_directory) / ".unconditional-video_k5_te.safetensors").unlink()
    found = load_training_set(T2V, together(with_dropout, without), 0)
    first, second = found.read([0]), found.read([1])
    text, pooled = text_tensors("")
    assert first.empty_text is not None
    assert first.empty_pooled is not None
    torch.testing.assert_close(first.empty_text, text.float(), rtol=0, atol=0)
    torch.testing.assert_close(first.empty_pooled, pooled, rtol=0, atol=0)
    assert first.caption_dropout.tolist() == [0.25]
    assert second.empty_text is None
    assert second.caption_dropout.tolist() == [0]
    (Path(with_dropout.cache_directory) / ".unconditional-video_k5_te.safetensors").unlink()
    assert _messages(T2V, with_dropout) == [
        "datasets[0]: 1 of 2 text caches is missing. Cache them, or add --cache_missing."
    ]


def test_everything_that_is_not_cached_is_listed(tmp_path: Path) -> None:
    entry = clips(tmp_path / "v", dict.fromkeys("abcd", "80 60 5 24"))
    cache = Path(entry.cache_directory)
    for name in "ab":
        (cache / f"{name}_00000-005_0064x0048_k5.safetensors").unlink()
    add_video(tmp_path / "v" / "source" / "c.mp4", "80 60 5 24 changed", caption="other words")
    pictures = stills(tmp_path / "s", 1)
    add_image(tmp_path / "s" / "source" / "new.png", caption=None)
    assert _messages(T2V, entry, pictures) == [
        "datasets[0]: 2 of 4 latent caches are missing, 1 is stale (source: had 10 bytes, now 18); "
        "1 of 4 text caches is stale (caption: changed). Cache them, or add --cache_missing.",
        "datasets[1]: 1 of 2 sources have no caption, first new.png. Write it, or exclude them.",
        "datasets[1]: 1 of 2 latent caches is missing. Cache them, or add --cache_missing.",
    ]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "video", target_frames=[9])
    add_video(tmp_path / "source" / "a.mp4", "80 60 5 24")
    (message,) = _messages(T2V, entry)
    assert "1 sources give none; the first, a.mp4, has 5 frames, and the shortest clip of this" in message
    shutil.rmtree(tmp_path / "source")
    (message,) = _messages(T2V, entry)
    assert message.startswith("datasets[0]: ")
    with pytest.raises(Problems, match="no dataset that is enabled"):
        load_training_set(T2V, together(), 0)


def test_latents_of_other_tools_train_text_to_video_only(tmp_path: Path) -> None:
    """Their latents_image are parts of the clip's latents, so image to video would learn another first frame."""
    entry = make_entry(tmp_path, "video")
    add_video(tmp_path / "source" / "a.mp4", "80 60 5 24", caption="a")
    cache_everything(entry)
    foreign_latent(Path(entry.cache_directory) / "a_00000-005_0064x0048_k5.safetensors", (2, 6, 8), 5)
    found = load_training_set(T2V, together(entry), 0)
    assert found.read([0]).latents.dtype == torch.float32
    assert [notice.field for notice in found.notices] == ["datasets[0]"]
    (message,) = _messages(I2V, entry)
    assert "written by another tool" in message
    assert "not images encoded alone" in message
    # T1: their captions of videos were encoded with the template of images.
    foreign_text(Path(entry.cache_directory) / "a_k5_te.safetensors", "a")
    assert "1 of 1 text caches is foreign" in _messages(T2V, entry)[0]


def test_stills_in_an_image_to_video_task(tmp_path: Path) -> None:
    """T20: trained as text to video, with a notice when there is nothing else, or refused."""
    pictures = stills(tmp_path / "s", 2)
    found = load_training_set(I2V, together(pictures), 0)
    assert "stills only" in found.notices[0].message
    options = I2V.model_copy(update={"i2v_stills": "refuse"})
    assert "has 2 stills" in _messages(options, pictures)[0]
    # A clip of a single frame is a still too.
    entry = clips(tmp_path / "v", {"a": "80 60 9 24"}, target_frames=[1, 5])
    assert "has 1 stills" in _messages(options, entry)[0]


def test_first_and_last_frame_need_something_between(tmp_path: Path) -> None:
    options = I2V.model_copy(update={"i2v_mode": "first_last"})
    entry = clips(tmp_path, {"a": "80 60 9 24", "b": "80 60 9 24"}, target_frames=[1, 5, 9])
    (message,) = _messages(options, entry)
    assert "2 clips are so short" in message
    assert "9 frames or more" in message
    assert len(load_training_set(I2V, together(entry), 0).items) == 6


def test_sources_are_held_out_whole_and_always_the_same(tmp_path: Path) -> None:
    names = [f"clip{number}" for number in range(10)]
    facts = dict.fromkeys(names, "80 60 9 24")
    entry = clips(tmp_path, facts, target_frames=[5, 9], validation_split=0.3, num_repeats=4)
    first, second = (load_training_set(T2V, together(entry), seed) for seed in (0, 1))
    assert first.held_out == second.held_out
    held = {item.text_path.name for item in first.held_out}
    assert len(held) == 3
    assert len(first.held_out) == 6, "both clips of each"
    assert not held & {item.text_path.name for item in first.items}
    assert len(first.items) == 14
    shown = {number for batch in first.batches(0) for number in batch}
    assert shown == set(range(14)), "held-out items are never trained"
    assert [first.read([number]).names[0] for number in first.held_out_numbers] == [i.name for i in first.held_out]
    facts = first.facts()
    assert (facts["items"], facts["held_out"], facts["samples_per_epoch"]) == (14, 6, 56)
    # One of two sources at least and at most; a single one is not held out.
    few = clips(tmp_path / "few", dict.fromkeys("ab", "80 60 5 24"), validation_split=0.9)
    assert len(load_training_set(T2V, together(few), 0).held_out) == 1
    single = clips(tmp_path / "single", {"a": "80 60 5 24"}, validation_split=0.5)
    found = load_training_set(T2V, together(single), 0)
    assert not found.held_out
    assert "single source" in found.notices[0].message


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    entry = clips(tmp_path / "v", dict.fromkeys("abc", "80 60 5 24"))

    def fingerprint() -> str:
        return load_training_set(T2V, together(entry), 0).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    assert load_training_set(T2V, together(entry), 99).fingerprint == before
    # Another caption, cached again; then the old one again.
    text = tmp_path / "v" / "source" / "b.txt"
    seen = {before}
    words = text.read_text(encoding="utf-8")
    text.write_text("new words", encoding="utf-8")
    cache_everything(entry)
    seen.add(fingerprint())
    text.write_text(words, encoding="utf-8")
    cache_everything(entry)
    assert fingerprint() == before
    # Another source under the same name, an item more, an item held out.
    add_video(tmp_path / "v" / "source" / "b.mp4", "80 60 5 24 other", caption=words)
    cache_everything(entry)
    seen.add(fingerprint())
    add_video(tmp_path / "v" / "source" / "d.mp4", "80 60 5 24", caption="d")
    cache_everything(entry)
    seen.add(fingerprint())
    entry = make_entry(tmp_path / "v", "video", validation_split=0.5)
    seen.add(fingerprint())
    assert len(seen) == 5


@pytest.mark.parametrize("damage", ["gone", "cut", "other shape", "other width"])
def test_a_cache_that_breaks_in_mid_run_names_its_file(tmp_path: Path, damage: str) -> None:
    entry = clips(tmp_path, dict.fromkeys("ab", "80 60 5 24"))
    found = load_training_set(T2V, together(entry), 0)
    latent, text = found.items[1].latent_path, found.items[1].text_path
    if damage == "gone":
        latent.unlink()
    elif damage == "cut":
        latent.write_bytes(latent.read_bytes()[:-100])
    elif damage == "other shape":
        foreign_latent(latent, (2, 8, 8), 5)
    else:
        write_text_cache(text, torch.ones(2, 8), torch.ones(12), TEXT.metadata("video", "b b"))
    named = text if damage == "other width" else latent
    with pytest.raises(UserError) as caught:
        found.read([0, 1])
    assert str(named) in caught.value.message
    assert found.read([0]).size == 1
