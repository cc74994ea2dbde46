"""Tiny DiTs that learn: low-rank layers with dropout beside frozen weights, a loss, and what autograd keeps for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backend.lora.modules import LoraBranch
from backend.lora.trainable import TrainableLora
from backend.model.dit import Kandinsky5Transformer


def add_lora(
    model: Kandinsky5Transformer, rank: int = 4, module_dropout: float | None = None
) -> dict[str, nn.Parameter]:
    """Freeze `model` and attach a LoRA with dropouts, off at first; both halves are away from zero.

    Returns its parameters by their names in the model.
    """
    lora = TrainableLora.attach(model, rank, None, seed=5, dropout=0.2, rank_dropout=0.2, module_dropout=module_dropout)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in lora.named_parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def switch_dropout(model: nn.Module, on: bool) -> None:
    """Put the branches into training mode or out of it."""
    for module in model.modules():
        if isinstance(module, LoraBranch):
            module.train(on)


def gradients(
    model: Kandinsky5Transformer, parameters: dict[str, nn.Parameter], arguments: dict, seed: int = 11
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one forward pass and the gradient of every parameter, with dropout that follows from `seed`."""
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = None
    output = model(**arguments)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    loss = (output.square() * weights).mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether all gradients are equal bit for bit, and not all zero."""
    assert found.keys() == expected.keys()
    assert all(bool(gradient.any()) for gradient in expected.values())
    return all(torch.equal(found[name], expected[name]) for name in expected)


@contextmanager
def watching(seen: Callable[[Tensor], None]) -> Iterator[None]:
    """Show `seen` every tensor that autograd saves in the block."""

    def pack(tensor: Tensor) -> Tensor:
        seen(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
