"""A small LoRA with its optimizer and schedule, for tests of saving: real parts, no model around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backend.lora.formats import LoraWeights

#: In the order in which dotted paths with underscores are easily mixed up.
LAYERS = ("visual_transformer_blocks.0.self_attention.out_layer", "text_transformer_blocks.1.feed_forward.in_layer")


class SmallLora(nn.Module):
    """Two layers whose product with the input should become a target."""

    def __init__(self, width: int = 12, rank: int = 4, alpha: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.alpha = alpha
        self.downs = nn.ParameterList(torch.randn(rank, width, generator=generator) for _ in LAYERS)
        self.ups = nn.ParameterList(torch.randn(width, rank, generator=generator) * 0.1 for _ in LAYERS)

    def forward(self, values: Tensor) -> Tensor:
        for down, up in zip(self.downs, self.ups, strict=True):
            values = values + values @ down.T @ up.T
        return values

    def weights(self) -> dict[str, LoraWeights]:
        return {
            name: LoraWeights(down.detach().clone(), up.detach().clone(), self.alpha)
            for name, down, up in zip(LAYERS, self.downs, self.ups, strict=True)
        }

    def load(self, layers: Mapping[str, LoraWeights]) -> None:
        assert list(layers) == list(LAYERS) or set(layers) == set(LAYERS)
        with torch.no_grad():
            for name, down, up in zip(LAYERS, self.downs, self.ups, strict=True):
                assert layers[name].alpha == self.alpha
                down.copy_(layers[name].down)
                up.copy_(layers[name].up)


@dataclass
class Training:
    """A LoRA in training; `step(number)` draws its batch from the number and from the global generator."""

    lora: SmallLora
    optimizer: Optimizer
    schedule: Any

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(3, self.lora.downs[0].shape[1], generator=generator) + 0.01 * torch.randn(())
        loss = (self.lora(inputs) - inputs.flip(0)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    def run(self, first: int, last: int) -> list[Tensor]:
        """Steps `first` to `last`; what the weights are after each."""
        seen = []
        for number in range(first, last + 1):
            self.step(number)
            seen.append(torch.cat([parameter.detach().flatten().clone() for parameter in self.lora.parameters()]))
        return seen


def halving(optimizer: Optimizer) -> Any:
    """A schedule with something to remember: a learning rate that falls each step, down from a warm-up."""
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40),
        ],
        [3],
    )


def constant(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def training(
    make_optimizer: Callable[[Any], Optimizer] | None = None,
    make_schedule: Callable[[Optimizer], Any] = constant,
    *,
    width: int = 12,
    seed: int = 0,
) -> Training:
    """A new training; AdamW unless said otherwise."""
    lora = SmallLora(width, seed=seed)
    optimizer = (make_optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)))(lora.parameters())
    return Training(lora, optimizer, make_schedule(optimizer))
