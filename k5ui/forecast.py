"""What the page says before a start: length, tokens, disk, memory, how long the same took before. Nothing invented."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from backend.config.checkpoint import identify
from backend.config.checks import is_hub_name, weight_paths
from backend.config.generate import GenerateOptions
from backend.config.prompts import ClipRequest, Plan, plan_clips
from backend.config.tasks import TASKS, latent_frames, valid_frames
from backend.errors import Problems, UserError

_PATCH = 16  # a token is 2 x 2 latent cells, a latent cell 8 x 8 pixels
_LATENT_CHANNELS = 16
#: H.264 at the quality that we write gives about this many bytes a pixel of ordinary footage.
_VIDEO_BYTES_PER_PIXEL = 0.1
_IMAGE_BYTES_PER_PIXEL = 2.0
#: Rows of width model_dim that one attention layer holds at once: hidden state, query, key, value.
_LIVE_ROWS = 4


@dataclass(frozen=True)
class PastRun:
    """A finished run: what it made (see `workload`) and its duration in seconds."""

    workload: tuple[Any, ...]
    seconds: float


def workload(values: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What decides how long a run takes, from its options; None if that cannot be said (prompt files, latents)."""
    task = TASKS.get(str(values.get("task", "")))
    if task is None or values.get("from_file") or values.get("latent_path"):
        return None
    frames = valid_frames(values.get("frames") or task.frames)
    guidance = values.get("guidance") if values.get("guidance") is not None else task.guidance
    size = (values.get("width") or task.width, values.get("height") or task.height)
    steps = values.get("steps") or task.steps
    memory = (
        bool(values.get("fp8_base")),
        values.get("blocks_to_swap") or 0,
        values.get("device"),
        values.get("dtype"),
    )
    return (task.name, frames, *size, steps, guidance == 1.0, *memory, len(values.get("lora_weight") or []))


def forecast(options: GenerateOptions, past: Iterable[PastRun], gpu: bool) -> dict[str, Any]:
    """The facts about a request, as far as they follow from it; a key is None where that is unknown.

    Keys: clips; seconds (of one clip), frames, latent_frames, width, height, fps, tokens (of one denoising pass),
    steps, passes (network calls of one clip); notices (sentences); disk_bytes (rough); memory_bytes (a lower bound:
    largest model part and one layer's activations); weights (part -> one line); expected_seconds (low and high of equal
    runs before), expected_runs (how many those are). `gpu` tells which number format is the default.
    """
    try:
        plan: Plan | None = plan_clips(options, "unused")
    except Problems:
        plan = None
    clip = plan.clips[0] if plan and plan.clips else None
    weights, sizes = _weights(options, gpu)
    times = sorted(run.seconds for run in past if run.workload == workload(options.model_dump()))
    facts: dict[str, Any] = {
        "clips": len(plan.clips) if plan else None,
        "notices": [str(notice) for notice in plan.notices] if plan else [],
        "weights": weights,
        "disk_bytes": sum(disk_bytes(item) for item in plan.clips) if plan else None,
        "memory_bytes": _memory(options, clip, sizes, gpu),
        "expected_seconds": [times[0], times[-1]] if times else None,
        "expected_runs": len(times),
    }
    return facts | _clip_facts(clip)


def _clip_facts(clip: ClipRequest | None) -> dict[str, Any]:
    names = ("frames", "width", "height", "fps", "steps")
    if clip is None:
        return dict.fromkeys((*names, "seconds", "latent_frames", "tokens", "passes"))
    return {name: getattr(clip, name) for name in names} | {
        "seconds": clip.frames / clip.fps,
        "latent_frames": latent_frames(clip.frames),
        "tokens": tokens(clip.frames, clip.width, clip.height),
        "passes": clip.steps * (1 if clip.guidance == 1.0 else 2),
    }


def tokens(frames: int, width: int, height: int) -> int:
    """Visual tokens of one pass: latent frames x (height / 16) x (width / 16)."""
    return latent_frames(frames) * (height // _PATCH) * (width // _PATCH)


def disk_bytes(clip: ClipRequest) -> int:
    """Roughly what a clip takes on disk, in bytes."""
    pixels, kind = clip.width * clip.height * clip.frames, clip.options.output_type
    latents = latent_frames(clip.frames) * _LATENT_CHANNELS * (clip.height // 8) * (clip.width // 8) * 4
    pictures = pixels * (_IMAGE_BYTES_PER_PIXEL if kind == "images" or clip.frames == 1 else _VIDEO_BYTES_PER_PIXEL)
    return int((0 if kind == "latent" else pictures) + (latents if kind in ("latent", "both") else 0))


def _weights(options: GenerateOptions, gpu: bool) -> tuple[dict[str, str | None], dict[str, tuple[int, int]]]:
    """One line for each part, and (bytes once loaded, model width or 0) of the parts whose header can be read."""
    wide = options.dtype == "float32" or (options.dtype is None and not gpu)
    lines: dict[str, str | None] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for part, path in vars(weight_paths(options)).items():
        lines[part] = None
        if path is None or (part.startswith("text_encoder") and is_hub_name(path)):
            continue
        try:
            info = identify(path)
        except UserError:
            continue
        lines[part] = info.summary
        width = 1 if part == "dit" and options.fp8_base else 4 if wide else 2
        sizes[part] = (info.parameters * width, info.config.model_dim if info.config else 0)
    return lines, sizes


def _memory(
    options: GenerateOptions, clip: ClipRequest | None, sizes: Mapping[str, tuple[int, int]], gpu: bool
) -> int | None:
    """Parts are loaded one after the other, so the largest decides; on a GPU blocks in CPU memory do not count."""
    if "dit" not in sizes or clip is None:
        return None
    model, model_dim = sizes["dit"]
    if gpu and options.blocks_to_swap:
        others = max((size for part, (size, _) in sizes.items() if part != "dit"), default=0)
        return others or None
    width = 4 if options.dtype == "float32" or (options.dtype is None and not gpu) else 2
    activations = _LIVE_ROWS * tokens(clip.frames, clip.width, clip.height) * model_dim * width
    return max([model + activations, *(size for part, (size, _) in sizes.items() if part != "dit")])
