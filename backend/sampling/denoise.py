"""The denoising loop: Euler steps in float32 along the official sigma grid, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from backend.sampling.condition import GivenFrames

StepCallback = Callable[[int], bool]
"""Called before step i; True asks the loop to end there and to keep the clean clip that the last step predicted."""


class VelocityModel(Protocol):
    """What the loop needs of the transformer: velocity = noise - clean, in the layout of the latents."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        pooled_embeds: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class TextCondition:
    """Embeddings of one prompt on the device of the model: text [1, S, D], pooled [1, P]."""

    text: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()
def denoise(
    model: VelocityModel,
    noise: torch.Tensor,
    positive: TextCondition,
    negative: TextCondition | None,
    sigmas: torch.Tensor,
    guidance_scale: float,
    given: GivenFrames | None = None,
    before_step: StepCallback | None = None,
    input_channels: int = 33,
) -> torch.Tensor:
    """Denoise one clip.

    Each step feeds [x | zeros | mask] (x with the given frames in place; the 16 condition channels stay zero, as in the
    official inference) and steps x <- x + (sigma' - sigma) v in float32; after the last one the given frames are put
    back.
    Guidance is v = v_n + g (v_p - v_n); the second pass runs only when g differs from 1.

    Args:
        noise: [1, F, H, W, 16] float32.
        sigmas: float32 [steps + 1], falling to 0.
        negative: needed when `guidance_scale` is not 1.
        input_channels: 33 for models with condition channels, 16 without.

    Returns:
        latents [1, F, H, W, 16] float32, scaled as the VAE's encoder scales them.
    """
    guided = abs(guidance_scale - 1.0) > 1e-6
    if guided and negative is None:
        raise ValueError("Guidance needs the embeddings of a negative prompt.")
    latents = noise.to(torch.float32)
    mask = given.mask(latents) if given else latents.new_zeros((*latents.shape[:-1], 1))
    zeros = torch.zeros_like(latents)
    steps = len(sigmas) - 1
    predicted = latents
    for index in range(steps):
        if before_step is not None and before_step(index):
            latents = predicted
            break
        sigma, sigma_next = float(sigmas[index]), float(sigmas[index + 1])
        if given:
            latents = given.replace(latents)
        model_input = torch.cat([latents, zeros, mask], dim=-1) if input_channels > latents.shape[-1] else latents
        timesteps = torch.full((latents.shape[0],), 1000.0 * sigma, device=latents.device, dtype=torch.float32)
        velocity = model(model_input, positive.text, positive.pooled, timesteps).float()
        if guided:
            assert negative is not None
            without = model(model_input, negative.text, negative.pooled, timesteps).float()
            velocity = without + guidance_scale * (velocity - without)
        predicted = latents - sigma * velocity
        latents = latents + (sigma_next - sigma) * velocity
    return given.replace(latents) if given else latents
