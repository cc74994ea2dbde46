"""diffusers' Kandinsky 5 pipelines on tiny random weights, set to the official text template and sigma grid."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend.config.tasks import DEMO_WEIGHTS
from backend.text.templates import VIDEO

HEAD_AXES = {64: (16, 24, 24), 128: (32, 48, 48)}


@dataclass(frozen=True)
class Oracle:
    """The two pipelines over shared parts, and the folders from which our engine loads the same weights."""

    t2v: Any
    i2v: Any
    dit: Path
    vae: Path


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every tensor weight, zero-initialised modulation and norms included: otherwise blocks are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.06 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def build_oracle(folder: Path, head_dim: int, seed: int) -> Oracle:
    """Random DiT (head size 64 or 128) and VAE with the demo's text encoders, saved in `folder`."""
    from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel

    transformer = randomise(
        Kandinsky5Transformer3DModel(
            in_visual_dim=16,
            out_visual_dim=16,
            in_text_dim=128,
            in_text_dim2=64,
            time_dim=32,
            model_dim=128,
            ff_dim=192,
            num_text_blocks=1,
            num_visual_blocks=2,
            patch_size=(1, 2, 2),
            axes_dims=HEAD_AXES[head_dim],
            visual_cond=True,
            attention_type="regular",
        ),
        seed,
    )
    vae = randomise(
        AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=16
        ),
        seed + 1,
    )
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    return Oracle(*_pipelines(transformer, vae), folder / "transformer", folder / "vae")


def _pipelines(transformer: torch.nn.Module, vae: torch.nn.Module) -> list[Any]:
    """Both pipelines with the official text template, the SD rotary scale, and without the I2V normalisation."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5I2VPipeline, Kandinsky5T2VPipeline
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, Qwen2_5_VLForConditionalGeneration

    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": Qwen2_5_VLForConditionalGeneration.from_pretrained(
            DEMO_WEIGHTS / "text_encoder", dtype=torch.float32
        ),
        "tokenizer": _TextOnlyProcessor(AutoTokenizer.from_pretrained(DEMO_WEIGHTS / "tokenizer")),
        "text_encoder_2": CLIPTextModel.from_pretrained(DEMO_WEIGHTS / "text_encoder_2", dtype=torch.float32),
        "tokenizer_2": CLIPTokenizer.from_pretrained(DEMO_WEIGHTS / "tokenizer_2"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
    }
    pipelines = []
    for cls in (Kandinsky5T2VPipeline, Kandinsky5I2VPipeline):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = cls(**parts)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.prompt_template = VIDEO.text
        pipeline.prompt_template_encode_start_idx = VIDEO.crop
        pipeline._get_scale_factor = lambda height, width: (1.0, 2.0, 2.0)
        pipelines.append(pipeline)
    # Its own normalisation takes statistics over four frames at once and gives NaN for short clips.
    pipelines[1].normalize_first_frame = lambda latents: latents
    return pipelines


def official_sigmas(pipeline: Any, steps: int, scheduler_scale: float) -> None:
    """Make the pipeline's scheduler use the official grid; its own ends at 0.091 instead of 0.170 (N = 50)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=scheduler_scale)
    original = scheduler.set_timesteps
    uniform = torch.linspace(1.0, 0.0, steps + 1)[:-1].tolist()
    scheduler.set_timesteps = lambda count, device=None: original(sigmas=uniform, device=device)
    pipeline.scheduler = scheduler


class _TextOnlyProcessor:
    """Stands in for Qwen's processor, which cannot be built without torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: None = None, videos: None = None, **arguments: Any) -> Any:
        return self.tokenizer(text, **arguments)

    def decode(self, *arguments: Any, **named: Any) -> str:
        return self.tokenizer.decode(*arguments, **named)
