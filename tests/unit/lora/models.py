"""Models with the module names of the Kandinsky 5 DiT, and random LoRAs for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from backend.config.checkpoint import TransformerConfig
from backend.lora.formats import LoraWeights
from backend.lora.targets import linear_targets

TINY = TransformerConfig(
    in_text_dim=12,
    in_text_dim2=10,
    time_dim=8,
    model_dim=16,
    ff_dim=24,
    num_text_blocks=2,
    num_visual_blocks=2,
    axes_dims=(4, 2, 2),
)


def skeleton(config: TransformerConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Every Linear of the DiT with its official path and shape, and nothing else; it has no forward."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    tensors = config.expected_tensors()
    for name, shape in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2:
            continue
        layer = nn.Linear(shape[1], shape[0], bias=f"{path}.bias" in tensors, dtype=dtype)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        parent = root
        *folders, attribute = path.split(".")
        for folder in folders:
            if not hasattr(parent, folder):
                parent.add_module(folder, nn.Module())
            parent = getattr(parent, folder)
        parent.add_module(attribute, layer)
    return root.requires_grad_(False)


def block_layers(model: nn.Module) -> list[str]:
    """The layers that a usual LoRA has: attention and feed-forward of both block lists."""
    return [name for name in linear_targets(model) if "_blocks." in name and "modulation" not in name]


def random_lora(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    rank: int = 3,
    alpha: float = 1.5,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, LoraWeights]:
    """A random pair for each of the named layers (default: attention and feed-forward of all blocks)."""
    generator = torch.Generator().manual_seed(seed)
    targets = linear_targets(model)
    layers = {}
    for name in names if names is not None else block_layers(model):
        out_features, in_features = targets[name].shape
        down = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        up = torch.randn(out_features, rank, generator=generator) * 0.1
        layers[name] = LoraWeights(down.to(dtype), up.to(dtype), alpha)
    return layers


def merged(layer: nn.Linear, pairs: Iterable[tuple[LoraWeights, float]], x: torch.Tensor) -> torch.Tensor:
    """x @ (W + sum of strength * alpha / rank * up @ down)^T + b in float64: the closed form of a LoRA layer."""
    weight = layer.weight.double()
    for weights, strength in pairs:
        weight = weight + strength * weights.alpha / weights.rank * (weights.up.double() @ weights.down.double())
    return nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
