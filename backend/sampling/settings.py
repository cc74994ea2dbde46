"""The settings in every file: all options of the clip, what was settled, fingerprints of weights and LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.config.checks import is_hub_name, weight_paths
from backend.config.generate import GenerateOptions
from backend.config.metadata import SETTINGS_VERSION
from backend.config.prompts import ClipRequest
from backend.config.version import PROGRAM
from backend.files import fingerprint

_PER_RUN_ONLY = {"from_file", "latent_path", "output", "text_cache_dir"}


def weights_record(options: GenerateOptions) -> dict[str, dict[str, str]]:
    """Path and fingerprint of each part of the model; a hub name stands for itself."""
    paths = weight_paths(options)
    named = {
        "dit": paths.dit,
        "vae": paths.vae,
        "text_encoder_qwen": paths.text_encoder_qwen,
        "text_encoder_clip": paths.text_encoder_clip,
    }
    return {
        name: {"path": path, "fingerprint": "" if is_hub_name(path) else fingerprint(path)}
        for name, path in named.items()
        if path is not None and (is_hub_name(path) or Path(path).exists())
    }


def loras_record(options: GenerateOptions) -> list[dict[str, Any]]:
    """Path, fingerprint and strength of each LoRA."""
    return [
        {"path": path, "fingerprint": fingerprint(path), "strength": strength}
        for path, strength in lora_strengths(options)
    ]


def lora_strengths(options: GenerateOptions) -> list[tuple[str, float]]:
    """Each LoRA with its strength; missing strengths are 1."""
    strengths = [*options.lora_multiplier, *([1.0] * len(options.lora_weight))]
    return list(zip(options.lora_weight, strengths, strict=False))


def clip_settings(
    clip: ClipRequest,
    weights: dict[str, dict[str, str]],
    loras: list[dict[str, Any]],
    computed: dict[str, Any],
) -> dict[str, Any]:
    """Everything that is needed to make `clip` again, as `backend.config.metadata` stores it.

    `computed` names what the engine settled itself: device, dtype, attention.
    """
    options = {key: value for key, value in clip.options.model_dump().items() if value is not None}
    options = {key: value for key, value in options.items() if key not in _PER_RUN_ONLY}
    options |= {
        "prompt": clip.prompt,
        "negative_prompt": clip.negative_prompt,
        "width": clip.width,
        "height": clip.height,
        "frames": clip.frames,
        "steps": clip.steps,
        "guidance": clip.guidance,
        "scheduler_scale": clip.scheduler_scale,
        "seed": clip.seed,
    }
    images = {
        name: {"path": path, "fingerprint": fingerprint(path)}
        for name, path in (("image", clip.image), ("image_last", clip.image_last))
        if path is not None
    }
    return {
        "version": SETTINGS_VERSION,
        "program": PROGRAM,
        "options": options,
        "seed": clip.seed,
        "width": clip.width,
        "height": clip.height,
        "frames": clip.frames,
        "fps": clip.fps,
        "seconds": round(clip.frames / clip.fps, 4),
        "weights": weights,
        "loras": loras,
        "images": images,
        "computed": computed,
    }
