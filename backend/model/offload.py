"""Blocks whose weights wait in CPU memory and visit the device only while they are used.

Inference swaps whole blocks (`BlockSwap`); training swaps single layers (`swap_layers`), because a backward pass needs
each weight once more, long after its block's forward pass has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from backend.errors import UserError
from backend.model.device import host_copy
from backend.model.dit import Kandinsky5Transformer
from backend.model.frozen import frozen_linear
from backend.model.quantize import Fp8Linear, dequantise

Fetch = Callable[[torch.Tensor], torch.Tensor]
"""Copies a tensor of CPU memory to the device."""


class BlockSwap:
    """Keeps the last `count` visual blocks in CPU memory; each is copied to the device before its forward pass.

    The weights are frozen, so the CPU copy stays the master and nothing is ever copied back: after the pass the
    block's tensors point to the CPU again and the device's copy is freed. On CUDA the masters are pinned.

    Raises:
        UserError: more blocks than the model has.
    """

    def __init__(self, transformer: Kandinsky5Transformer, count: int, device: torch.device) -> None:
        self._transformer = transformer
        self._device = device
        self._swapped = _last_blocks(transformer, count)
        self._masters: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for block in self._swapped:
            block.register_forward_pre_hook(self._bring)
            block.register_forward_hook(self._release, always_call=True)

    def place(self) -> None:
        """Put everything but the swapped blocks on the device; these never visit it together."""
        swapped = {id(tensor) for block in self._swapped for tensor in _tensors(block)}
        for tensor in _tensors(self._transformer):
            if id(tensor) in swapped:
                tensor.data = host_copy(tensor.data, self._device)
            else:
                tensor.data = tensor.data.to(self._device)

    def _bring(self, block: nn.Module, _: object) -> None:
        self._masters[block] = [(tensor, tensor.data) for tensor in _tensors(block)]
        for tensor, master in self._masters[block]:
            tensor.data = master.to(self._device, non_blocking=True)

    def _release(self, block: nn.Module, *_: object) -> None:
        for tensor, master in self._masters.pop(block, []):
            tensor.data = master


def _tensors(block: nn.Module) -> list[torch.Tensor]:
    return [*block.parameters(), *block.buffers()]


def _last_blocks(transformer: Kandinsky5Transformer, count: int) -> list[nn.Module]:
    blocks = list(transformer.visual_transformer_blocks)
    if count > len(blocks):
        raise UserError(f"{count} blocks cannot be swapped: the model has {len(blocks)}.", "blocks_to_swap")
    return blocks[len(blocks) - count :]


class SwappedLinear(nn.Module):
    """A frozen Linear whose weight (or 8-bit codes and scales) stays in CPU memory and is fetched for each product.

    It is fetched in the forward pass and again in the backward pass, and freed after each; autograd keeps nothing of
    it. The weight is no parameter of the module, so moving the model leaves it where it is; the bias moves along.
    """

    def __init__(self, linear: nn.Linear | Fp8Linear, device: torch.device, fetch: Fetch) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._fetch = fetch
        stored = (linear.codes, linear.scale) if isinstance(linear, Fp8Linear) else (linear.weight.detach(),)
        self._masters = tuple(host_copy(tensor, device) for tensor in stored)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs [..., in_features] -> [..., out_features], on the device and in the format of the inputs."""
        return frozen_linear(inputs, partial(self._weight, inputs.dtype), self.bias)

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        fetched = [self._fetch(master) for master in self._masters]
        return dequantise(fetched[0], fetched[1], dtype) if len(fetched) == 2 else fetched[0]


def swap_layers(
    transformer: Kandinsky5Transformer, count: int, device: torch.device, fetch: Fetch | None = None
) -> None:
    """Put a `SwappedLinear` in the place of every Linear of the last `count` visual blocks; norms stay on the device.

    Args:
        device: where the blocks compute; on CUDA the weights in CPU memory are pinned.
        fetch: replaces the copy to `device`.

    Raises:
        UserError: more blocks than the model has.
    """
    bring = fetch or (lambda master: master.to(device, non_blocking=True))
    for block in _last_blocks(transformer, count):
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear | Fp8Linear):
                    setattr(module, name, SwappedLinear(child, device, bring))
