"""Blocks that wait in CPU memory and visit the device only for their own forward pass."""

from __future__ import annotations

import torch
from torch import nn

from backend.errors import UserError
from backend.model.device import host_copy
from backend.model.dit import Kandinsky5Transformer


class BlockSwap:
    """Keeps the last `count` visual blocks in CPU memory; each is copied to the device before its forward pass.

    The weights are frozen, so the CPU copy stays the master and nothing is ever copied back: after the pass the
    block's tensors point to the CPU again and the device's copy is freed. On CUDA the masters are pinned.

    Raises:
        UserError: more blocks than the model has.
    """

    def __init__(self, transformer: Kandinsky5Transformer, count: int, device: torch.device) -> None:
        blocks = list(transformer.visual_transformer_blocks)
        if count > len(blocks):
            raise UserError(f"{count} blocks cannot be swapped: the model has {len(blocks)}.", "blocks_to_swap")
        self._transformer = transformer
        self._device = device
        self._swapped = blocks[len(blocks) - count :]
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
