"""The sigma grid and the noise that a clip starts from."""

from __future__ import annotations

import torch


def sigma_grid(steps: int, scheduler_scale: float) -> torch.Tensor:
    """Sigmas of the official sampler, from 1 down to 0.

    Formula: u = linspace(1, 0, steps + 1), sigma = s u / (1 + (s - 1) u) with s = `scheduler_scale`
    (official Kandinsky 5 `generation_utils`).

    Returns:
        float32 tensor of `steps + 1` values on the CPU; the model's time is 1000 sigma.
    """
    uniform = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    sigmas = scheduler_scale * uniform / (1.0 + (scheduler_scale - 1.0) * uniform)
    return sigmas.to(torch.float32)


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator, so that one seed gives the same clip on every device.

    `seed` is 0 to 2**63 - 1.
    """
    return torch.Generator(device="cpu").manual_seed(seed)


def draw_noise(generator: torch.Generator, latent_frames: int, height: int, width: int) -> torch.Tensor:
    """Standard normal noise of shape [1, F, H, W, 16] (latent pixels), float32 on the CPU, as diffusers draws it."""
    return torch.randn((1, latent_frames, height, width, 16), generator=generator, dtype=torch.float32)
