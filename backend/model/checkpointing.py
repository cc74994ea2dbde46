"""Gradient checkpointing: of a block only its input is remembered, and the block runs again in the backward pass."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from backend.model.device import copy_to_host
from backend.model.dit import Kandinsky5Transformer


class HostMemory:
    """Keeps tensors of a device in CPU memory between forward and backward; no bit of them changes."""

    def store(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        """Copy `tensor` into CPU memory; returns what `fetch` takes."""
        return tensor.device, copy_to_host(tensor)

    def fetch(self, stored: tuple[torch.device, Tensor]) -> Tensor:
        """The tensor on its device again."""
        device, host = stored
        return host.to(device, non_blocking=host.is_pinned())


def checkpoint_blocks(transformer: Kandinsky5Transformer, memory: HostMemory | None = None) -> None:
    """Let every text and visual block of `transformer` be computed again in the backward pass.

    Gradients are those without checkpointing, bit for bit: the second run sees the same state of the random generators
    (LoRA dropout) and the same autocast. Forward passes without gradients are not affected. With `memory` the block's
    input waits there; text, time and rotary tables, which all blocks share, stay where they are.
    """
    transformer.run_block = partial(_run_checkpointed, memory)


def _run_checkpointed(memory: HostMemory | None, block: nn.Module, hidden: Tensor, *shared: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return block(hidden, *shared)

    def run(tokens: Tensor) -> Tensor:
        return block(tokens, *shared)

    # Inside, checkpoint puts hooks of its own on top of these, which so see the block's input alone.
    with nullcontext() if memory is None else saved_tensors_hooks(memory.store, memory.fetch):
        return checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=True)
