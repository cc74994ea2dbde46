"""The options of video generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from backend.config.options import Options, option
from backend.config.tasks import TASKS

if TYPE_CHECKING:
    TaskName = str
else:  # Checkers cannot read choices that come from a table.
    TaskName = Literal[tuple(TASKS)]
OutputType = Literal["video", "images", "latent", "both"]
ImageFormat = Literal["png", "webp"]
Attention = Literal["auto", "sdpa", "flash_attn", "flash3", "sage_attn", "xformers"]
ATTENTION_SWITCHES = {name: name for name in ("sdpa", "flash_attn", "flash3", "sage_attn", "xformers")}


class GenerateOptions(Options):
    """What `python -m backend.kandinsky5_generate_video` reads."""

    task: TaskName = option(
        "k5-pro-t2v-5s-sd", "Which model and length; the k5-demo tasks need no downloads.", group="model"
    )
    dit: str | None = option(
        None, "DiT checkpoint: a .safetensors file or a diffusers folder.", group="model", path="weights"
    )
    vae: str | None = option(None, "HunyuanVideo VAE: a .safetensors file or a folder.", group="model", path="weights")
    text_encoder_qwen: str | None = option(
        None, "Qwen2.5-VL text encoder: a folder or a hub name.", group="model", path="weights"
    )
    text_encoder_clip: str | None = option(
        None, "CLIP text encoder: a folder or a hub name.", group="model", path="weights"
    )
    prompt: str | None = option(None, "What the clip shows.", group="prompt", max_length=20_000)
    negative_prompt: str | None = option(
        None,
        "What the clip should not show; without it the models' own default is used.",
        group="prompt",
        max_length=20_000,
    )
    from_file: str | None = option(
        None,
        "Prompt file (.txt with one prompt a line, .toml, .json): one clip for each prompt.",
        group="prompt",
        path="file",
    )
    image: str | None = option(None, "First frame (image-to-video tasks).", group="prompt", path="file", aliases=("i",))
    image_last: str | None = option(
        None, "Last frame as well (experimental: the models were not trained for it).", group="prompt", path="file"
    )
    width: int | None = option(None, "Width; default: the task's.", group="clip", unit="px", ge=16, le=4096)
    height: int | None = option(None, "Height; default: the task's.", group="clip", unit="px", ge=16, le=4096)
    frames: int | None = option(
        None, "Length in pixel frames, 4n + 1; default: the task's.", group="clip", unit="frames", ge=1, le=1001
    )
    fps: int = option(24, "Frame rate of the written file; the models know 24.", group="clip", unit="1/s", ge=1, le=120)
    seed: int = option(42, "Start of the noise; -1 draws one and records it.", group="clip", ge=-1, le=2**63 - 1)
    steps: int | None = option(None, "Denoising steps; default: the task's.", group="sampling", ge=1, le=1000)
    guidance: float | None = option(
        None, "Classifier-free guidance scale; 1 skips the negative pass; default: the task's.",
        group="sampling", ge=0.0, le=100.0,
    )  # fmt: skip
    scheduler_scale: float | None = option(
        None, "Shift of the sigma grid towards noise; default: the task's.", group="sampling", gt=0.0, le=100.0
    )
    output: str | None = option(
        None,
        "File to write: .mp4, .png for one frame; with --from_file a folder.",
        group="output",
        path="new_file",
    )
    output_type: OutputType = option(
        "video", "Clip, single images, latents for later decoding, or both.", group="output"
    )
    image_format: ImageFormat = option("png", "Format of single images.", group="output", level="advanced")
    latent_path: str | None = option(
        None, "Decode this .latent.safetensors file and denoise nothing.", group="output", path="file", level="advanced"
    )
    lora_weight: list[str] = option([], "LoRA files (kohya, diffusers or ComfyUI names).", group="lora", path="file")
    lora_multiplier: list[float] = option([], "Strength of each LoRA, in the same order; default 1.", group="lora")
    device: str | None = option(
        None, "Where to compute (cpu, cuda:0, mps); default: the best that is there.", group="compute", level="advanced"
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "Number format; default bfloat16 on a GPU, float32 on CPU.", group="compute", level="advanced"
    )
    attention: Attention = option(
        "auto",
        "Attention implementation.",
        group="compute",
        level="advanced",
        switches=ATTENTION_SWITCHES,
    )
    fp8_base: bool = option(
        False, "Keep the block weights in 8-bit floating point: half the memory.", group="memory", level="advanced"
    )
    blocks_to_swap: int = option(
        0, "Blocks kept in CPU memory and copied to the GPU when used.", group="memory", unit="blocks",
        level="advanced", ge=0, le=256,
    )  # fmt: skip
    offload_dit_during_sampling: bool = option(
        False,
        "Write each clip of a prompt file as soon as it is denoised, the DiT waiting in CPU memory; "
        "without it all are denoised first, then decoded.",
        group="memory",
        level="advanced",
    )
    vae_tiling: Literal["auto", "on", "off"] = option(
        "auto", "Decode in overlapping tiles to save memory.", group="memory", level="advanced"
    )
    text_cache_dir: str | None = option(
        None,
        "Folder that keeps text embeddings, so that a repeated prompt loads no encoder.",
        group="compute",
        level="advanced",
        path="folder",
    )
    rope_bf16_rounding: bool = option(
        False,
        "Round the result of rotary embeddings to bfloat16, as the official code does.",
        group="compute",
        level="advanced",
    )
