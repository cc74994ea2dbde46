"""One clip on its way from a request to latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from backend.config.prompts import ClipRequest
from backend.config.tasks import latent_frames
from backend.errors import EngineError
from backend.sampling.condition import GivenFrames, normalise_first_frames
from backend.sampling.denoise import StepCallback, TextCondition, VelocityModel, denoise
from backend.sampling.schedule import draw_noise, seeded_generator, sigma_grid
from backend.text.cache import PromptEmbeds


@dataclass
class Clip:
    """A clip: its number from 1, its request, its given frames (on the CPU), and at last its latents.

    latents: float32 [16, F, H, W] on the CPU. notes: what the settings of its files should say besides the request.
    """

    number: int
    request: ClipRequest
    given: GivenFrames | None = None
    latents: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def draw_noise(self) -> tuple[torch.Tensor, torch.Generator]:
        """The noise of its seed and the generator behind it; drawn when needed, as that of many clips is gigabytes."""
        generator = seeded_generator(self.request.seed)
        size = latent_frames(self.request.frames), self.request.height // 8, self.request.width // 8
        return draw_noise(generator, *size), generator


def denoise_clip(
    model: VelocityModel,
    clip: Clip,
    embeds: Mapping[str, PromptEmbeds],
    device: torch.device,
    dtype: torch.dtype,
    input_channels: int,
    before_step: StepCallback,
) -> torch.Tensor:
    """Run the denoising loop for `clip`; returns latents [1, F, H, W, 16] on the device, as `denoise` gives them.

    Args:
        embeds: embeddings by prompt; that of the negative prompt may be missing where guidance is 1.
        dtype: number format of the text on the device.
    """
    request = clip.request

    def condition(prompt: str) -> TextCondition:
        found = embeds[prompt]
        return TextCondition(found.text[None].to(device, dtype), found.pooled[None].to(device, dtype))

    given = clip.given and GivenFrames(
        clip.given.first.to(device), clip.given.last.to(device) if clip.given.last is not None else None
    )
    return denoise(
        model,
        clip.draw_noise()[0].to(device),
        condition(request.prompt),
        condition(request.negative_prompt) if request.negative_prompt in embeds else None,
        sigma_grid(request.steps, request.scheduler_scale).to(device),
        request.guidance,
        given,
        before_step,
        input_channels,
    )


def finished_latents(clip: Clip, latents: torch.Tensor) -> torch.Tensor:
    """What is decoded: [16, F, H, W] float32 on the CPU from what `denoise_clip` gave, given frames matched.

    Raises:
        EngineError: phase "denoise"; values that are not numbers.
    """
    if clip.given is not None:
        latents = normalise_first_frames(latents)
    if not bool(torch.isfinite(latents).all()):
        raise EngineError("The model gave values that are not numbers. Use --dtype float32 or bfloat16.", "denoise")
    return latents[0].permute(3, 0, 1, 2).float().cpu().contiguous()
