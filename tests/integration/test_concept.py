"""Learning is shown, not assumed: a LoRA for what the base cannot draw, through the product's own commands."""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from backend.config.tasks import TASKS, default_weights
from backend.demo.clips import balanced_specs, caption, draw, to_uint8
from backend.demo.concept import (
    concept_caption,
    draw_concept,
    frame_share,
    prove,
    score,
    unseen_specs,
    write_dataset,
)
from backend.events import read_events
from backend.kandinsky5_cache_latents import main as cache_latents
from backend.kandinsky5_cache_text_encoder_outputs import main as cache_text
from backend.kandinsky5_generate_video import main as generate
from backend.kandinsky5_train_network import main as train

WEIGHTS = default_weights(TASKS["k5-demo-t2v"])
# The command of docs/training.md.
RECIPE = [
    *("--network_dim", "16", "--learning_rate", "2e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20"),
    *("--discrete_flow_shift", "3", "--seed", "1"),
]
STEPS = 300


def test_the_measure_sees_the_frame_where_it_is_and_only_there() -> None:
    """On drawn clips the score is 1; without what was asked for, or with what was not, it is 0."""
    rng = random.Random(3)
    specs = balanced_specs(4, rng)
    framed = [to_uint8(draw_concept(spec, rng)) for spec in specs]
    plain = [to_uint8(draw(spec, rng)) for spec in specs]
    assert min(map(frame_share, framed)) == 1.0
    assert max(map(frame_share, plain)) < 0.1
    for clips, wanted in ((framed, True), (plain, False)):
        assert score(clips, specs, wanted).right == 1.0
        assert score(clips, specs, not wanted).right == 0.0
    assert score(framed, specs[1:] + specs[:1], True).words < 0.5


def test_the_dataset_is_one_that_a_person_could_have_made(tmp_path: Path) -> None:
    config = write_dataset(tmp_path, count=6, validation_split=0.3)
    captions = [path.read_text() for path in sorted(tmp_path.glob("concept/*.txt"))]
    assert len(captions) == 6
    assert all("zorblat" in text for text in captions)
    assert not any("zorblat" in path.read_text() for path in tmp_path.glob("ordinary/*.txt"))
    assert config.read_text().count("[[datasets]]") == 2
    known = captions + [path.read_text() for path in tmp_path.glob("ordinary/*.txt")]
    for spec in unseen_specs(tmp_path, 50, seed=1):
        texts = {make(spec, style) for make in (caption, concept_caption) for style in range(4)}
        assert not texts & set(known)


def _run(command: Callable[[list[str]], int], folder: Path, *words: str) -> list[dict[str, Any]]:
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        code = command([*words, "--run_dir", str(folder)])
    assert code == 0, stream.getvalue()[-3000:]
    return [dict(record) for record in read_events(folder / "events.jsonl").records]


def _cache(config: Path) -> None:
    encoders = ("--text_encoder_qwen", str(WEIGHTS.text_encoder_qwen))
    encoders += ("--text_encoder_clip", str(WEIGHTS.text_encoder_clip))
    _run(cache_text, config.parent / "run-text", "--dataset_config", str(config), *encoders)
    _run(cache_latents, config.parent / "run-latents", "--dataset_config", str(config), "--vae", str(WEIGHTS.vae))


def _validation(events: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in events if record["type"] == "validation"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_lora_learns_a_concept_that_the_base_cannot_draw(tmp_path: Path) -> None:
    """At least 80 % on unseen prompts within 15 minutes, 90 % kept elsewhere, strength 0 = base bit for bit."""
    began, cpu = time.monotonic(), time.process_time()
    config = write_dataset(tmp_path)
    _cache(config)
    words = ("--task", "k5-demo-t2v", "--dataset_config", str(config), "--max_train_steps", str(STEPS), *RECIPE)
    events = _run(train, tmp_path / "run", *words)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    steps = [record for record in events if record["type"] == "step"]
    assert len(steps) == STEPS
    validation = _validation(events)
    assert validation[-1] < 0.5 * validation[0]
    lora = tmp_path / "run" / "checkpoints" / "k5_lora.safetensors"
    proof = prove(tmp_path, lora)
    print(f"\n{proof.text()}\nkept {proof.kept:.2f}, {seconds:.0f} s, {cpu:.0f} s CPU, validation {validation}")
    assert proof.base_concept.framed == 0.0
    assert proof.lora_concept.right >= 0.8
    assert proof.kept >= 0.9
    assert proof.lora_other.framed <= 0.1
    assert proof.zero_is_base
    assert seconds < 15 * 60
    # The same by the command that people generate with, measured in the file that it writes.
    shares = []
    for strength in ("1", "0"):
        spec = unseen_specs(tmp_path, 1, seed=9)[0]
        clip = tmp_path / f"clip-{strength}.mp4"
        words = ("--task", "k5-demo-t2v", "--prompt", concept_caption(spec), "--output", str(clip), "--seed", "4")
        _run(generate, tmp_path / f"made-{strength}", *words, "--lora_weight", str(lora), "--lora_multiplier", strength)
        with av.open(str(clip)) as container:
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert len(frames) == 17
        shares.append(frame_share(torch.stack(frames)))
    assert shares[0] > 0.9
    assert shares[1] < 0.1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_image_to_video_training_lowers_the_validation_loss_of_the_frames_that_are_not_given(tmp_path: Path) -> None:
    config = write_dataset(tmp_path, count=24, validation_split=0.25)
    _cache(config)
    words = ("--task", "k5-demo-i2v", "--dataset_config", str(config), "--max_train_steps", "60", *RECIPE)
    validation = _validation(_run(train, tmp_path / "run", *words))
    print(f"\nvalidation of frame 1 onwards: {validation}")
    assert validation[-1] < 0.9 * validation[0]
