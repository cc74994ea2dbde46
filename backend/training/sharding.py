"""The frozen DiT split over several processes (FSDP): each keeps its share of every block, and all compute together.

A block's weights exist whole only while it computes, forward and again backward: they are gathered from all processes
and let go. So all processes must run the same blocks in the same order, forward and backward, and as often; what one
did alone would wait for the others for ever, or take the weights of another block for its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from backend.config.train import TrainOptions
from backend.errors import Problem
from backend.model.dit import BlockRunner, Kandinsky5Transformer

_TRUE = ("1", "true", "yes", "on")


def sharding_problems(options: TrainOptions, values: Mapping[str, str]) -> list[Problem]:
    """What contradicts a launch with FSDP: options, and settings of the launcher that would change nothing.

    Args:
        values: the environment that the launcher made.
    """
    problems = []
    for field in ("fp8_base", "fp8_scaled"):
        if getattr(options, field):
            problems.append(
                Problem(field, "does not go with FSDP, which splits plain weights only. Leave one of both.")
            )
    if options.blocks_to_swap:
        problems.append(
            Problem("blocks_to_swap", "does not go with FSDP, which keeps its shares on the device. Leave one of both.")
        )
    if options.offload_dit_during_sampling:
        problems.append(
            Problem(
                "offload_dit_during_sampling",
                "does not go with FSDP, which keeps its shares on the device. Leave one of both.",
            )
        )
    if values.get("FSDP_VERSION", "2") != "2":
        problems.append(Problem(None, "The launcher asks for the old FSDP. Launch with --fsdp_version 2."))
    if values.get("FSDP_OFFLOAD_PARAMS", "").lower() in _TRUE:
        problems.append(
            Problem(None, "Under FSDP the shares stay on the device. Set fsdp_offload_params to false in the launch.")
        )
    if values.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() in _TRUE:
        problems.append(
            Problem(
                None,
                "Set fsdp_activation_checkpointing to false in the launch and give --gradient_checkpointing instead.",
            )
        )
    return problems


def shard_blocks(transformer: Kandinsky5Transformer, mesh: DeviceMesh) -> None:
    """Split every text and visual block of the frozen `transformer` over the processes of `mesh`, each on its device.

    Parameters of a block become DTensors, rows split over the processes; bfloat16 and float32 ones travel as their
    bytes, so results are those of the whole model bit for bit. What is not in a block (embeddings, the output layer)
    stays whole. Layers that are put beside the block's own afterwards, as a LoRA, stay whole too. To be called after
    `checkpoint_blocks`, by all processes, with the same weights in each.
    """
    device = torch.device(mesh.device_type)
    blocks = [*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks]
    for name, child in transformer.named_children():
        if not name.endswith("_transformer_blocks"):
            child.to(device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The model itself owns no share; as the root it lets one block's weights travel while another computes.
    inside = {parameter for block in blocks for parameter in block.parameters()}
    fully_shard(transformer, mesh=mesh, ignored_params={p for p in transformer.parameters() if p not in inside})
    transformer.run_block = partial(_run_in_step, transformer.run_block)


def _run_in_step(run: BlockRunner, block: nn.Module, hidden: Tensor, *arguments: Any) -> Tensor:
    """Run a block so that its backward pass runs in all processes or in none.

    Without this, dropout that leaves out the LoRA of a whole block in one process would let that process go without the
    block's backward pass, for nothing before it learns.
    """
    if torch.is_grad_enabled() and not hidden.requires_grad and any(p.requires_grad for p in block.parameters()):
        hidden = hidden.detach().requires_grad_()
    return run(block, hidden, *arguments)
