"""The HunyuanVideo VAE: clips to scaled latents and back, with explicit tiling and checked numbers of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from backend.config.checkpoint import identify
from backend.errors import EngineError, UserError
from backend.vae.locate import locate_vae
from backend.vae.tiling import SPATIAL_FACTOR, TEMPORAL_FACTOR, Tiling, latent_frames, pixel_frames

_FIELD = "vae"
_CLASS = "AutoencoderKLHunyuanVideo"
_PREFIXES = ("vae.", "first_stage_model.")  # repacked files put one before every name


class Vae:
    """A loaded VAE. `tiling` may be replaced between calls; everything else is fixed.

    Attributes:
        tiling: how clips are cut.
        scaling_factor: latents are multiplied by it after encoding and divided by it before decoding.
        latent_channels: channels of the latents.
        config_fingerprint: 16 hexadecimal digits over configuration and weights, for the metadata of caches.
    """

    def __init__(self, model: Any, *, tiling: Tiling, config_fingerprint: str) -> None:
        self._model = model
        self.tiling = tiling
        self.scaling_factor: float = model.config.scaling_factor
        self.latent_channels: int = model.config.latent_channels
        self.config_fingerprint = config_fingerprint
        # One clip after the other: memory stays that of one clip, and results do not depend on the batch.
        model.use_slicing = True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of weights and arithmetic."""
        return self._model.quant_conv.weight.dtype

    def to(self, device: torch.device) -> Vae:
        """Move the weights; returns itself."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Encode clips into scaled latents.

        The first latent of a clip is not the latent of its first frame alone: the normalisation looks at all frames.

        Args:
            pixels: [B, 3, F, H, W] in -1..1, F = 4n + 1, H and W multiples of 8.
            generator: None takes the mode of the posterior; a (CPU) generator draws a sample, float32 noise of the
                latents' shape, one draw per call.

        Returns:
            float32 latents [B, C, (F - 1) / 4 + 1, H / 8, W / 8] on the VAE's device.

        Raises:
            ValueError: the shape is none of these.
            EngineError: phase "vae"; wrong number of latent frames, or values that are not numbers.
        """
        batch, channels, frames, height, width = _five_dimensions(pixels)
        if channels != 3 or height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
            raise ValueError(f"Pixels must be [B, 3, F, H, W] with H and W multiples of 8, not {list(pixels.shape)}.")
        expected = (batch, latent_frames(frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
        self._apply_tiling(frames)
        posterior = self._model.encode(pixels.to(self.device, self.dtype)).latent_dist
        mean, log_variance = posterior.parameters.float().chunk(2, dim=1)
        latents = mean
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
            latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        return _checked(latents * self.scaling_factor, self.latent_channels, expected, "latents")

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents into clips.

        Args:
            latents: [B, C, F, H, W] as `encode` returns them.

        Returns:
            float32 pixels [B, 3, 4 (F - 1) + 1, 8 H, 8 W], about -1..1 and not clamped, on the VAE's device.

        Raises:
            ValueError: the shape is not this one.
            EngineError: phase "vae"; wrong number of frames, or values that are not numbers.
        """
        batch, channels, count, height, width = _five_dimensions(latents)
        if channels != self.latent_channels:
            raise ValueError(f"Latents must have {self.latent_channels} channels, not {channels}.")
        frames = pixel_frames(count)
        self._apply_tiling(frames)
        unscaled = (latents.to(self.device, torch.float32) / self.scaling_factor).to(self.dtype)
        pixels = self._model.decode(unscaled).sample.float()
        return _checked(pixels, 3, (batch, frames, height * SPATIAL_FACTOR, width * SPATIAL_FACTOR), "pixels")

    def _apply_tiling(self, frames: int) -> None:
        model, tiling = self._model, self.tiling
        model.use_framewise_encoding = model.use_framewise_decoding = tiling.splits_time(frames)
        model.tile_sample_min_num_frames = tiling.temporal_window
        model.tile_sample_stride_num_frames = tiling.temporal_stride
        model.use_tiling = tiling.spatial_enabled
        model.tile_sample_min_height = model.tile_sample_min_width = tiling.spatial_tile
        model.tile_sample_stride_height = model.tile_sample_stride_width = tiling.spatial_stride


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of any shape as float32 in -1..1: x / 127.5 - 1."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in -1..1 of any shape as uint8: clamped, (x + 1) * 127.5, fraction cut off as in the official code.

    Cutting off makes a picture darker by half a step on average, and a value of `to_unit_range` whose float32 form
    lies a hair below a whole number comes back one lower.
    """
    return ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).to(torch.uint8)


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype, tiling: Tiling) -> Vae:
    """Load a HunyuanVideo VAE from a .safetensors file or a folder (its `vae` subfolder too).

    The `config.json` beside the weights is used; a file without one gets the HunyuanVideo configuration.

    Raises:
        UserError: field "vae"; nothing is there, it is another kind of model, or it is damaged.
    """
    found = locate_vae(path)
    weights, config_file, config = found
    _refuse_other_models(weights, config)
    model = _empty_model(config, config_file)
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged or not a .safetensors file ({error}). Get it again.", _FIELD) from error
    state = _without_prefix(state)
    _check_state(model, state, weights)
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
    model.requires_grad_(False).eval()
    return Vae(model, tiling=tiling, config_fingerprint=found.fingerprint())


def _refuse_other_models(weights: Path, config: dict[str, Any]) -> None:
    try:
        info = identify(weights)
    except UserError as error:
        raise UserError(error.message, _FIELD) from error
    if info.kind not in ("vae", "unknown"):
        raise UserError(f"{weights} is not a VAE but: {info.summary}. Give the file of a HunyuanVideo VAE.", _FIELD)
    named = config.get("_class_name", _CLASS)
    if named != _CLASS:
        raise UserError(f"{weights} belongs to a {named}; a HunyuanVideo VAE ({_CLASS}) is needed.", _FIELD)


def _empty_model(config: dict[str, Any], config_file: Path | None) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            model: Any = AutoencoderKLHunyuanVideo(**settings)
        factors = (model.config.temporal_compression_ratio, model.config.spatial_compression_ratio)
        if factors != (TEMPORAL_FACTOR, SPATIAL_FACTOR) or not float(model.config.scaling_factor) > 0:
            raise ValueError(f"it compresses by {factors[0]} in time and {factors[1]} in space, not by 4 and 8")
    except Exception as error:  # whatever a foreign config.json makes of it, it is the file that is wrong
        raise UserError(
            f"{config_file} does not describe a HunyuanVideo VAE ({error}). Get it again.", _FIELD
        ) from error
    return model


def _without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _check_state(model: nn.Module, state: dict[str, torch.Tensor], weights: Path) -> None:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    groups = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [name for name in expected if name in state and state[name].shape != expected[name]],
        "of a number format that is not supported": [
            name for name, tensor in state.items() if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16)
        ],
    }
    complaints = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for what, names in groups.items()
        if names
    ]
    if complaints:
        raise UserError(f"The tensors in {weights} do not fit the VAE: {'; '.join(complaints)}.", _FIELD)


def _five_dimensions(tensor: torch.Tensor) -> tuple[int, int, int, int, int]:
    if tensor.ndim != 5:
        raise ValueError(f"A batch of clips has five dimensions, not {list(tensor.shape)}.")
    batch, channels, frames, height, width = tensor.shape
    return batch, channels, frames, height, width


def _checked(tensor: torch.Tensor, channels: int, expected: tuple[int, int, int, int], what: str) -> torch.Tensor:
    shape = (expected[0], channels, *expected[1:])
    if tuple(tensor.shape) != shape:
        raise EngineError(f"The VAE gave {what} of shape {list(tensor.shape)} instead of {list(shape)}.", "vae")
    if not torch.isfinite(tensor).all():
        raise EngineError(f"The VAE gave {what} that are not numbers. Use float32 or bfloat16 for it.", "vae")
    return tensor
