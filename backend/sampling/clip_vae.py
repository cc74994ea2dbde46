"""The VAE of a run: loaded once, kept in CPU memory, on the device only while it encodes or decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from backend.config.prompts import ClipRequest
from backend.model.device import empty_cache
from backend.progress import Reporter
from backend.sampling.condition import GivenFrames, fit_image, load_image
from backend.vae.hunyuan import Vae, load_vae
from backend.vae.tiling import SPATIAL_FACTOR, Tiling, choose_tiling, pixel_frames


class ClipVae:
    """Given images to latents, latents to pixels, however many clips there are."""

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype, tiling: str, reporter: Reporter) -> None:
        """`tiling` is the option --vae_tiling: "auto", "on" or "off"."""
        self._path = path
        self._device = device
        self._dtype = dtype
        self._tiling = tiling
        self._reporter = reporter

    @cached_property
    def loaded(self) -> Vae:
        """The VAE, loaded at its first use and kept in CPU memory between uses.

        Raises:
            UserError: it is missing, damaged, or another kind of model.
        """
        self._reporter.phase("vae", "Loading the VAE")
        return load_vae(self._path, device=torch.device("cpu"), dtype=self._dtype, tiling=Tiling())

    @contextmanager
    def on_device(self, width: int, height: int, frames: int) -> Iterator[Vae]:
        """The VAE on the device, cut as the option and the size of the clip (pixels) ask for."""
        vae = self.loaded
        vae.tiling = self._tiling_for(width, height, frames)
        try:
            yield vae.to(self._device)
        finally:
            vae.to(torch.device("cpu"))
            empty_cache(self._device)

    def _tiling_for(self, width: int, height: int, frames: int) -> Tiling:
        """auto follows the size, on cuts frames above 256 px, off decodes whole frames."""
        chosen = choose_tiling(width, height, frames)
        if self._tiling == "off":
            return Tiling(temporal_enabled=chosen.temporal_enabled, spatial_enabled=False)
        if self._tiling == "on":
            return Tiling(spatial_enabled=True, spatial_tile=256, spatial_stride=192)
        return chosen

    def encode_given(self, request: ClipRequest, generator: torch.Generator) -> GivenFrames:
        """The given frames of a clip that starts from an image, on the CPU; `generator` has drawn its noise already.

        Raises:
            UserError: an image cannot be decoded.
        """
        assert request.image is not None
        with self.on_device(request.width, request.height, 1) as vae:
            first = self._encode(vae, request.image, "image", request, generator)
            last = request.image_last
            return GivenFrames(first, self._encode(vae, last, "image_last", request, generator) if last else None)

    def _encode(self, vae: Vae, path: str, name: str, request: ClipRequest, generator: torch.Generator) -> torch.Tensor:
        pixels = fit_image(load_image(path, name), request.width, request.height)
        latents = vae.encode(pixels.to(self._device, self._dtype), generator=generator)
        return latents.permute(0, 2, 3, 4, 1).float().cpu()

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, Tiling]:
        """Pixels [3, 4 (F - 1) + 1, 8 H, 8 W] of latents [16, F, H, W], and how the clip was cut for it."""
        _, frames, height, width = latents.shape
        sizes = width * SPATIAL_FACTOR, height * SPATIAL_FACTOR, pixel_frames(frames)
        with self.on_device(*sizes) as vae:
            return vae.decode(latents[None])[0], vae.tiling
