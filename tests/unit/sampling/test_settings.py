"""The settings of a file: enough to make it again, and nothing that belongs to one run only."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from backend.config.generate import GenerateOptions
from backend.config.metadata import encode_settings
from backend.config.options import from_mapping
from backend.config.prompts import plan_clips
from backend.config.tasks import DEMO_WEIGHTS
from backend.files import fingerprint
from backend.sampling.settings import clip_settings, lora_strengths, loras_record, weights_record


@pytest.mark.parametrize(("strengths", "expected"), [([], [1.0, 1.0]), ([0.5], [0.5, 1.0]), ([0.0, -2.0], [0.0, -2.0])])
def test_missing_strengths_are_one(strengths: list[float], expected: list[float]) -> None:
    options = GenerateOptions(lora_weight=["a", "b"], lora_multiplier=strengths)
    assert lora_strengths(options) == list(zip(["a", "b"], expected, strict=True))


def test_weights_are_recorded_with_fingerprints() -> None:
    record = weights_record(GenerateOptions(task="k5-demo-t2v", text_encoder_qwen="org/hub-name"))
    assert set(record) == {"dit", "vae", "text_encoder_qwen", "text_encoder_clip"}
    assert record["vae"] == {"path": str(DEMO_WEIGHTS / "vae"), "fingerprint": fingerprint(DEMO_WEIGHTS / "vae")}
    assert record["text_encoder_qwen"] == {"path": "org/hub-name", "fingerprint": ""}


def test_the_settings_of_a_clip_make_the_same_clip_again(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "lora.safetensors").write_bytes(b"x")
    (tmp_path / "prompts.txt").write_text("first --d -1 --f 6\nsecond --s 3 --n bad\n")
    options = GenerateOptions(
        task="k5-demo-i2v", from_file=str(tmp_path / "prompts.txt"), image=str(tmp_path / "a.png"), fps=12,
        output=str(tmp_path / "out"), lora_weight=[str(tmp_path / "lora.safetensors")], lora_multiplier=[0.5],
    )  # fmt: skip
    for clip in plan_clips(options).clips:
        settings = clip_settings(clip, {}, loras_record(options), {"device": "cpu"})
        encode_settings(settings)
        assert not set(settings["options"]) & {"from_file", "latent_path", "output", "text_cache_dir"}
        assert settings["seconds"] == round(clip.frames / 12, 4)
        assert settings["loras"][0]["strength"] == 0.5
        assert settings["images"]["image"]["fingerprint"] == fingerprint(tmp_path / "a.png")
        again = from_mapping(GenerateOptions, settings["options"] | {"output": str(tmp_path / "again.mp4")})
        (second,) = plan_clips(again).clips
        for name in ("prompt", "negative_prompt", "width", "height", "frames", "fps", "steps", "guidance",
                     "scheduler_scale", "seed", "image", "image_last"):  # fmt: skip
            assert getattr(second, name) == getattr(clip, name)
