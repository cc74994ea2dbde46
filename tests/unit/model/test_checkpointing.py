"""Checkpointed blocks: gradients of plain ones bit for bit, nothing kept of a block but its input (T12, B17)."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.model.checkpointing import HostMemory, checkpoint_blocks
from backend.model.dit import Kandinsky5Transformer
from tests.unit.model.helpers import LARGE_HEADS, build, inputs
from tests.unit.model.trained import add_lora, gradients, same, switch_dropout, watching

BLOCKS = LARGE_HEADS.num_text_blocks + LARGE_HEADS.num_visual_blocks
ARGUMENTS: dict[str, Any] = inputs(LARGE_HEADS, 2, (2, 4, 4), 5, seed=2)
ARGUMENTS["text_mask"] = torch.arange(5)[None] < torch.tensor([5, 3])[:, None]


class Shelf(HostMemory):
    """Host memory that counts, with copies on a stand-in device of their own."""

    def __init__(self) -> None:
        self.stored: list[Tensor] = []
        self.fetched = 0

    def store(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        kept = super().store(tensor)
        self.stored.append(kept[1])
        return kept

    def fetch(self, stored: tuple[torch.device, Tensor]) -> Tensor:
        self.fetched += 1
        return super().fetch(stored)


def _model(dropout: bool = True) -> tuple[Kandinsky5Transformer, dict[str, nn.Parameter]]:
    model = build(LARGE_HEADS)
    parameters = add_lora(model)
    switch_dropout(model, dropout)
    return model, parameters


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("offload", [True, False])
def test_gradients_are_equal_bit_for_bit(dropout: bool, offload: bool) -> None:
    """The second run of a block sees the dropout of the first, also when other numbers were drawn in between."""
    model, parameters = _model(dropout)
    loss, expected = gradients(model, parameters, ARGUMENTS)
    _, other = gradients(model, parameters, ARGUMENTS, seed=12)
    assert same(other, expected) is not dropout
    checkpoint_blocks(model, Shelf() if offload else None)
    found_loss, found = gradients(model, parameters, ARGUMENTS)
    assert torch.equal(found_loss, loss)
    assert same(found, expected)


def test_layers_that_are_left_out_are_left_out_of_the_second_run_too() -> None:
    """module_dropout changes what a block computes, so a second run with other draws would not even fit."""
    model = build(LARGE_HEADS)
    parameters = add_lora(model, module_dropout=0.5)
    switch_dropout(model, True)
    _, expected = gradients(model, parameters, ARGUMENTS)
    assert 0.2 * len(parameters) < len(expected) < 0.8 * len(parameters)
    checkpoint_blocks(model)
    assert same(gradients(model, parameters, ARGUMENTS)[1], expected)


def test_the_generator_is_left_as_without_checkpointing() -> None:
    model, parameters = _model()
    gradients(model, parameters, ARGUMENTS)
    expected = torch.get_rng_state()
    checkpoint_blocks(model)
    gradients(model, parameters, ARGUMENTS)
    assert torch.equal(torch.get_rng_state(), expected)


def test_autograd_keeps_the_input_of_a_block_and_nothing_else() -> None:
    """Trap: a checkpoint around too much or too little. Bytes are counted where autograd saves, block by block."""
    model, _ = _model()
    plain, kept = [0] * BLOCKS, [0] * BLOCKS

    def counting(totals: list[int]) -> None:
        numbers = {id(b): n for n, b in enumerate([*model.text_transformer_blocks, *model.visual_transformer_blocks])}
        inner = model.run_block

        def run(block: nn.Module, hidden: Tensor, *arguments: Any) -> Tensor:
            def add(tensor: Tensor) -> None:
                totals[numbers[id(block)]] += tensor.nbytes

            with watching(add):
                return inner(block, hidden, *arguments)

        model.run_block = run

    runner = model.run_block
    counting(plain)
    model(**ARGUMENTS)
    model.run_block = runner
    checkpoint_blocks(model)
    counting(kept)
    model(**ARGUMENTS)
    text, visual = 2 * 5 * LARGE_HEADS.model_dim * 4, 2 * 8 * LARGE_HEADS.model_dim * 4
    assert kept == [text] * LARGE_HEADS.num_text_blocks + [visual] * LARGE_HEADS.num_visual_blocks
    assert all(before > 10 * after for before, after in zip(plain, kept, strict=True))


@pytest.mark.parametrize("offload", [True, False])
def test_what_is_remembered_lies_in_host_memory_and_only_there(offload: bool) -> None:
    """Trap T12, B17: a peer accepts the flag and does nothing. Here the device's copies of block inputs are freed."""
    model, parameters = _model()
    shelf, inputs_of_blocks = Shelf(), []
    checkpoint_blocks(model, shelf if offload else None)
    inner = model.run_block

    def run(block: nn.Module, hidden: Tensor, *arguments: Any) -> Tensor:
        inputs_of_blocks.append(_Watched(hidden))
        return inner(block, hidden, *arguments)

    model.run_block = run
    output = model(**ARGUMENTS)
    gc.collect()
    assert (len(shelf.stored), shelf.fetched) == (BLOCKS if offload else 0, 0)
    assert {tensor.device.type for tensor in shelf.stored} <= {"cpu"}
    visual = inputs_of_blocks[LARGE_HEADS.num_text_blocks :]
    assert [watched.is_alive() for watched in visual] == [not offload] * len(visual)
    output.mean().backward()
    assert shelf.fetched == len(shelf.stored)
    assert all(parameter.grad is not None for parameter in parameters.values())


class _Watched:
    """Whether anybody still holds the memory of a tensor: its storage is freed with its last tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())

    def is_alive(self) -> bool:
        return not self._storage.expired()


def test_without_gradients_blocks_are_simply_called() -> None:
    model, _ = _model(dropout=False)
    with torch.no_grad():
        expected = model(**ARGUMENTS)
    shelf = Shelf()
    checkpoint_blocks(model, shelf)
    with torch.no_grad():
        assert torch.equal(model(**ARGUMENTS), expected)
    assert shelf.stored == []


def test_a_bfloat16_model_keeps_its_formats_in_the_second_run() -> None:
    """The second run happens outside of the forward pass, where an autocast region may be active or have ended."""
    model, parameters = _model()
    model.cast_policy(torch.bfloat16)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    expected = gradients(model, parameters, ARGUMENTS)[1]
    checkpoint_blocks(model)
    assert same(gradients(model, parameters, ARGUMENTS)[1], expected)
