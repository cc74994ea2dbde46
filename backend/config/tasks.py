"""The task presets of Kandinsky 5: which architecture, length, size, schedule and attention belong to a task's name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Mode = Literal["t2v", "i2v"]
FAMILY_FPS = 24
DEFAULT_NEGATIVE_PROMPT = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"


@dataclass(frozen=True)
class NablaPreset:
    """Parameters of NABLA sparse attention: mass kept per query block, window in blocks over time, height, width."""

    P: float
    wT: int = 11  # noqa: N815 (the published names of these settings)
    wH: int = 3  # noqa: N815
    wW: int = 3  # noqa: N815
    method: str = "topcdf"
    add_sta: bool = True


@dataclass(frozen=True)
class TaskPreset:
    """Everything that a task's name stands for; sizes in pixels, frames in pixel frames at 24 a second."""

    name: str
    title: str
    architecture: Literal["pro", "lite", "demo"]
    mode: Mode
    checkpoint: str
    frames: int
    width: int
    height: int
    max_area: int
    steps: int
    guidance: float
    scheduler_scale: float
    scale_factor: tuple[float, float, float]
    nabla: NablaPreset | None = None
    fixed_size: bool = False

    @property
    def size_multiple(self) -> int:
        """Sides must be multiples of this: 16 for full attention, 128 for NABLA's 8 x 8 blocks of patches."""
        return 128 if self.nabla else 16

    @property
    def is_demo(self) -> bool:
        """Whether the weights are embedded in the project."""
        return self.architecture == "demo"

    @property
    def max_text_tokens(self) -> int:
        """Tokens of the person's text that the video models were trained with."""
        return 256


_SD = (1.0, 2.0, 2.0)
_HD = (1.0, 3.16, 3.16)


def _preset(
    name: str,
    title: str,
    checkpoint: str,
    *,
    nabla: float | None = None,
    steps: int = 50,
    guidance: float = 5.0,
    scheduler_scale: float = 10.0,
) -> TaskPreset:
    high = name.endswith("-hd")
    return TaskPreset(
        name=name,
        title=title,
        architecture="pro" if "-pro-" in name else "lite",
        mode="i2v" if "-i2v-" in name else "t2v",
        checkpoint=f"{checkpoint}.safetensors",
        frames=241 if "-10s" in name else 121,
        width=1280 if high else 768,
        height=768 if high else 512,
        max_area=1024 * 1024 if high else 512 * 768,
        steps=steps,
        guidance=guidance,
        scheduler_scale=scheduler_scale,
        scale_factor=_HD if high else _SD,
        nabla=NablaPreset(nabla) if nabla else None,
    )


def _demo(name: str, title: str, mode: Mode) -> TaskPreset:
    return TaskPreset(
        name=name,
        title=title,
        architecture="demo",
        mode=mode,
        checkpoint="transformer",
        frames=17,
        width=64,
        height=64,
        max_area=64 * 64,
        steps=20,
        guidance=2.0,
        scheduler_scale=3.0,
        scale_factor=_SD,
        fixed_size=True,
    )


_PRESETS = (
    _demo("k5-demo-t2v", "Demo, text to video, 64 px", "t2v"),
    _demo("k5-demo-i2v", "Demo, image to video, 64 px", "i2v"),
    _preset("k5-lite-t2v-5s-sd", "Lite 2B, text to video, 5 s", "kandinsky5lite_t2v_sft_5s"),
    _preset("k5-lite-t2v-10s-sd", "Lite 2B, text to video, 10 s", "kandinsky5lite_t2v_sft_10s", nabla=0.9),
    _preset("k5-lite-i2v-5s-sd", "Lite 2B, image to video, 5 s", "kandinsky5lite_i2v_5s"),
    _preset(
        "k5-lite-t2v-5s-distil-sd",
        "Lite 2B distilled, 16 steps, 5 s",
        "kandinsky5lite_t2v_distilled16steps_5s",
        steps=16,
        guidance=1.0,
        scheduler_scale=5.0,
    ),
    _preset(
        "k5-lite-t2v-10s-distil-sd",
        "Lite 2B distilled, 16 steps, 10 s",
        "kandinsky5lite_t2v_distilled16steps_10s",
        nabla=0.9,
        steps=16,
        guidance=1.0,
    ),
    _preset("k5-lite-t2v-5s-nocfg-sd", "Lite 2B without CFG, 5 s", "kandinsky5lite_t2v_nocfg_5s", guidance=1.0),
    # The official configuration names the sft_10s file here, by a copying mistake; the file's own name is nocfg_10s.
    _preset(
        "k5-lite-t2v-10s-nocfg-sd",
        "Lite 2B without CFG, 10 s",
        "kandinsky5lite_t2v_nocfg_10s",
        nabla=0.9,
        guidance=1.0,
    ),
    _preset("k5-lite-t2v-5s-pretrain-sd", "Lite 2B pretrain, 5 s", "kandinsky5lite_t2v_pretrain_5s"),
    _preset("k5-lite-t2v-10s-pretrain-sd", "Lite 2B pretrain, 10 s", "kandinsky5lite_t2v_pretrain_10s", nabla=0.9),
    _preset("k5-pro-t2v-5s-sd", "Pro 19B, text to video, 5 s", "kandinsky5pro_t2v_sft_5s"),
    _preset("k5-pro-t2v-5s-hd", "Pro 19B, text to video, 5 s, HD", "kandinsky5pro_t2v_sft_5s", nabla=0.8),
    _preset("k5-pro-t2v-10s-sd", "Pro 19B, text to video, 10 s", "kandinsky5pro_t2v_sft_10s", nabla=0.9),
    _preset("k5-pro-t2v-10s-hd", "Pro 19B, text to video, 10 s, HD", "kandinsky5pro_t2v_sft_10s", nabla=0.7),
    _preset("k5-pro-i2v-5s-sd", "Pro 19B, image to video, 5 s", "kandinsky5pro_i2v_sft_5s"),
    _preset(
        "k5-pro-i2v-5s-hd",
        "Pro 19B, image to video, 5 s, HD",
        "kandinsky5pro_i2v_sft_5s",
        nabla=0.8,
        scheduler_scale=5.0,
    ),
)
TASKS: dict[str, TaskPreset] = {preset.name: preset for preset in _PRESETS}


@dataclass(frozen=True)
class WeightPaths:
    """Where the four parts of a model lie; None where nobody has said it."""

    dit: str | None
    vae: str | None
    text_encoder_qwen: str | None
    text_encoder_clip: str | None


def default_weights(task: TaskPreset) -> WeightPaths:
    """The embedded weights for a demo task; for real tasks the usual hub names of the two text encoders only."""
    if task.is_demo:
        parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
        return WeightPaths(*(os.fspath(DEMO_WEIGHTS / part) for part in parts))
    return WeightPaths(None, None, "Qwen/Qwen2.5-VL-7B-Instruct", "openai/clip-vit-large-patch14")


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames` pixel frames: (n - 1) // 4 + 1."""
    return (frames - 1) // 4 + 1


def valid_frames(frames: int) -> int:
    """The largest 4n + 1 that is not above `frames` (at least 1)."""
    return (max(frames, 1) - 1) // 4 * 4 + 1
