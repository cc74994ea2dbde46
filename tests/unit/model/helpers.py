"""Tiny DiTs with fully random weights, the same model in diffusers, and safetensors files of every container."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.config.checkpoint import TransformerConfig
from backend.model.attention import AttentionBackend
from backend.model.dit import Kandinsky5Transformer

SMALL_HEADS = TransformerConfig(
    in_text_dim=48,
    in_text_dim2=24,
    time_dim=32,
    model_dim=128,
    ff_dim=192,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(16, 24, 24),
)
LARGE_HEADS = replace(SMALL_HEADS, model_dim=256, axes_dims=(32, 48, 48), num_text_blocks=2)


@cache
def random_weights(config: TransformerConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights that leave nothing at a special value: norms near one, modulation and biases away from zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.expected_tensors().items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.2 * values
        else:
            weights[name] = values * (1.2 / shape[-1] ** 0.5 if len(shape) == 2 else 0.1)
    return weights


def build(config: TransformerConfig, *, rounding: bool = False, seed: int = 0) -> Kandinsky5Transformer:
    """Our model with `random_weights`."""
    model = Kandinsky5Transformer(config, AttentionBackend("sdpa"), rounding)
    model.load_state_dict(random_weights(config, seed), strict=True)
    return model.eval()


@cache
def build_diffusers(config: TransformerConfig) -> Any:
    """diffusers' model with the same weights, loaded strictly by the same names."""
    from diffusers import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(**asdict(config))
    model.load_state_dict(random_weights(config), strict=True)
    return model.eval()


def inputs(
    config: TransformerConfig, batch: int, grid: tuple[int, int, int], text: int, seed: int
) -> dict[str, Tensor]:
    """Random arguments of a forward; grid is (F, H, W) of the latent."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, *grid, config.in_channels, generator=generator),
        "text_embeds": torch.randn(batch, text, config.in_text_dim, generator=generator),
        "pooled_embeds": torch.randn(batch, config.in_text_dim2, generator=generator),
        "timesteps": torch.rand(batch, generator=generator) * 1000,
    }


def diffusers_forward(model: Any, arguments: Mapping[str, Tensor], scale: tuple[float, float, float]) -> Tensor:
    """The same forward in diffusers."""
    latents = arguments["hidden_states"]
    positions = [torch.arange(size) for size in (latents.shape[1], latents.shape[2] // 2, latents.shape[3] // 2)]
    with torch.no_grad():
        return model(
            hidden_states=latents,
            encoder_hidden_states=arguments["text_embeds"],
            timestep=arguments["timesteps"],
            pooled_projections=arguments["pooled_embeds"],
            visual_rope_pos=positions,
            text_rope_pos=torch.arange(arguments["text_embeds"].shape[1]),
            scale_factor=scale,
            return_dict=False,
        )


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def write_sharded(folder: Path, weights: Mapping[str, Tensor], config: TransformerConfig, shards: int = 3) -> None:
    """A diffusers folder: shards, index and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(weights), {}
    for index in range(shards):
        file = f"diffusion_pytorch_model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(folder, config)


def write_config(folder: Path, config: TransformerConfig, **changes: Any) -> None:
    """The config.json of a diffusers folder, with `changes` to it."""
    values = {"_class_name": "Kandinsky5Transformer3DModel", **asdict(config), **changes}
    (folder / "config.json").write_text(json.dumps(values))
