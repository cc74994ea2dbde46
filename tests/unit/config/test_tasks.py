"""The presets against the published facts of the family."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.config.tasks import TASKS, default_weights, latent_frames, valid_frames

# name -> frames, width, height, steps, guidance, scheduler scale, NABLA's P (None: full attention); as published.
PUBLISHED = {
    "k5-lite-t2v-5s-sd": (121, 768, 512, 50, 5.0, 10.0, None),
    "k5-lite-t2v-10s-sd": (241, 768, 512, 50, 5.0, 10.0, 0.9),
    "k5-lite-i2v-5s-sd": (121, 768, 512, 50, 5.0, 10.0, None),
    "k5-lite-t2v-5s-distil-sd": (121, 768, 512, 16, 1.0, 5.0, None),
    "k5-lite-t2v-5s-nocfg-sd": (121, 768, 512, 50, 1.0, 10.0, None),
    "k5-lite-t2v-5s-pretrain-sd": (121, 768, 512, 50, 5.0, 10.0, None),
    "k5-pro-t2v-5s-sd": (121, 768, 512, 50, 5.0, 10.0, None),
    "k5-pro-t2v-5s-hd": (121, 1280, 768, 50, 5.0, 10.0, 0.8),
    "k5-pro-t2v-10s-sd": (241, 768, 512, 50, 5.0, 10.0, 0.9),
    "k5-pro-t2v-10s-hd": (241, 1280, 768, 50, 5.0, 10.0, 0.7),
    "k5-pro-i2v-5s-sd": (121, 768, 512, 50, 5.0, 10.0, None),
    "k5-pro-i2v-5s-hd": (121, 1280, 768, 50, 5.0, 5.0, 0.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets(name: str) -> None:
    task = TASKS[name]
    found = (task.frames, task.width, task.height, task.steps, task.guidance, task.scheduler_scale)
    assert (*found, task.nabla.P if task.nabla else None) == PUBLISHED[name]


def test_every_preset_is_consistent() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert task.mode == ("i2v" if "-i2v-" in name or name.endswith("i2v") else "t2v")
        assert task.architecture == name.split("-")[1]
        assert task.architecture in KNOWN_ARCHITECTURES
        assert task.frames == valid_frames(task.frames)
        assert task.width % task.size_multiple == task.height % task.size_multiple == 0
        assert task.size_multiple == (128 if task.nabla else 16)
        assert task.max_text_tokens == 256
        assert task.scale_factor == ((1.0, 3.16, 3.16) if name.endswith("-hd") else (1.0, 2.0, 2.0))
        if task.nabla:
            window = (task.nabla.wT, task.nabla.wH, task.nabla.wW, task.nabla.method, task.nabla.add_sta)
            assert window == (11, 3, 3, "topcdf", True)
    assert {task.architecture for task in TASKS.values()} == {"demo", "lite", "pro"}


def test_only_demo_tasks_bring_their_weights() -> None:
    for task in TASKS.values():
        paths = default_weights(task)
        if task.is_demo:
            assert all(Path(path or "").is_dir() for path in vars(paths).values())
        else:
            assert (paths.dit, paths.vae) == (None, None)
            assert paths.text_encoder_qwen == "Qwen/Qwen2.5-VL-7B-Instruct"
            assert paths.text_encoder_clip == "openai/clip-vit-large-patch14"


def test_frame_rules() -> None:
    """Latent frames of 1, 5, 17, 49, 81, 121, 241; a length is rounded down to 4n + 1. Traps B6, B14."""
    pairs = {1: 1, 5: 2, 17: 5, 49: 13, 81: 21, 121: 31, 241: 61}
    assert {frames: latent_frames(frames) for frames in pairs} == pairs
    for frames in range(1, 500):
        valid = valid_frames(frames)
        assert valid % 4 == 1
        assert frames - 4 < valid <= frames
    assert valid_frames(0) == valid_frames(-5) == 1
