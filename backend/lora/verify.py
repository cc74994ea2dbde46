"""Tries a LoRA on a model: does every entry find its layer, and by how much does the output change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backend.config.checkpoint import identify
from backend.errors import UserError
from backend.lora.alphas import FIELD
from backend.lora.network import attach_loras, check_strength
from backend.model.device import default_dtype, free_memory, resolve_device
from backend.model.dit import Kandinsky5Transformer
from backend.model.load import load_transformer

_FRAMES, _SIDE, _TOKENS, _TIME = 2, 8, 12, 700.0
_HEADROOM = 1.2


@dataclass(frozen=True)
class Difference:
    """How a LoRA changes one call of a model: norm of the change over the norm of the base's output, and where."""

    relative: float
    device: str
    dtype: str
    zero_is_base: bool


def measure_difference(
    dit: str | Path, lora: str | Path, strength: float = 1.0, seed: int = 42, device: str | None = None
) -> Difference:
    """Run the DiT at `dit` on a seeded random input (2 x 8 x 8 latents, 12 tokens, time 700), without and with a LoRA.

    Raises:
        UserError: the weights or the LoRA cannot be used or do not fit, the memory is too small, the output is not
            finite.
    """
    check_strength(strength)
    place = resolve_device(device)
    dtype = default_dtype(place)
    _require_memory(dit, place, dtype)
    model = load_transformer(dit, device=place, dtype=dtype)
    inputs = _inputs(model, seed)
    base = _predict(model, inputs)
    loras = attach_loras(model, [(lora, strength)])
    changed = _predict(model, inputs)
    loras.set_strength(0, 0.0)
    zero_is_base = torch.equal(_predict(model, inputs), base)
    if not torch.isfinite(changed).all():
        raise UserError(f"{lora}: with it the model gives NaN or infinite values. Lower its strength.", FIELD)
    relative = float((changed.double() - base.double()).norm() / base.double().norm())
    return Difference(relative, str(place), str(dtype).removeprefix("torch."), zero_is_base)


def _require_memory(dit: str | Path, device: torch.device, dtype: torch.dtype) -> None:
    needed = identify(dit).parameters * dtype.itemsize * _HEADROOM
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"{dit} needs about {needed / 1e9:.1f} GB on {device}, and {free / 1e9:.1f} GB are free. "
            "Add --header_only to compare names and shapes only.",
            "dit",
        )


def _inputs(model: Kandinsky5Transformer, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    shapes = (
        (1, _FRAMES, _SIDE, _SIDE, config.in_channels),
        (1, _TOKENS, config.in_text_dim),
        (1, config.in_text_dim2),
    )
    latents, text, pooled = (torch.randn(shape, generator=generator).to(model.device) for shape in shapes)
    return (
        latents.to(model.dtype),
        text.to(model.dtype),
        pooled.to(model.dtype),
        torch.tensor([_TIME], device=model.device),
    )


def _predict(model: Kandinsky5Transformer, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(*inputs)
