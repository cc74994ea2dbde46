"""Swapped blocks: masters stay where they are, the result is the same bit for bit, whatever happens in between.

`cpu:0` stands for the device: torch copies when it moves a tensor of `cpu` there, as it does for a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from backend.errors import UserError
from backend.model.dit import Kandinsky5Transformer
from backend.model.offload import BlockSwap
from backend.model.quantize import quantise_blocks
from tests.unit.model.helpers import LARGE_HEADS, SMALL_HEADS, build, inputs

DEVICE = torch.device("cpu", 0)
ARGUMENTS = inputs(LARGE_HEADS, 1, (2, 4, 4), 5, seed=2)


def _predict(model: Kandinsky5Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(**ARGUMENTS)


def _pointers(block: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*block.parameters(), *block.buffers())]


def test_the_stand_in_copies_as_a_device_does() -> None:
    tensor = torch.ones(3)
    assert tensor.to(DEVICE).data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("quantised", [False, True])
def test_the_result_is_the_unswapped_one_and_masters_come_back(count: int, quantised: bool) -> None:
    model = build(LARGE_HEADS)
    if quantised:
        quantise_blocks(model)
    expected = _predict(model)
    swap = BlockSwap(model, count, DEVICE)
    swap.place()
    blocks = list(model.visual_transformer_blocks)
    before = [_pointers(block) for block in blocks]
    for _ in range(2):
        assert torch.equal(_predict(model), expected)
        assert [_pointers(block) for block in blocks] == before
    assert swap._masters == {}


def test_a_swapped_block_visits_the_device_only_for_its_own_pass() -> None:
    model = build(LARGE_HEADS)
    swap = BlockSwap(model, 1, DEVICE)
    swap.place()
    first, last = model.visual_transformer_blocks
    at_rest, seen = {id(block): _pointers(block) for block in (first, last)}, []

    def watch(block: nn.Module, *_: Any) -> None:
        seen.append([_pointers(other) == at_rest[id(other)] for other in (first, last)])

    for block in (first, last):
        block.register_forward_pre_hook(watch)
    _predict(model)
    assert seen == [[True, True], [True, False]]


def test_placing_copies_everything_but_the_swapped_blocks() -> None:
    """The whole model never lies on the device at once: that is what swapping is for."""
    model = build(LARGE_HEADS)
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    BlockSwap(model, 1, DEVICE).place()
    moved = {name for name, tensor in model.named_parameters() if tensor.data_ptr() != before[name]}
    assert moved == {name for name in before if not name.startswith("visual_transformer_blocks.1.")}


def test_an_exception_inside_a_block_puts_the_masters_back() -> None:
    """Trap: a peer leaves blocks on the wrong device after an error."""
    model = build(LARGE_HEADS)
    expected = _predict(model)
    swap = BlockSwap(model, 2, DEVICE)
    swap.place()
    block = model.visual_transformer_blocks[1]
    before = _pointers(block)

    def broken(*_: Any) -> None:
        raise RuntimeError("the device fell over")

    handle = block.feed_forward.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="fell over"):
        _predict(model)
    handle.remove()
    assert _pointers(block) == before
    assert swap._masters == {}
    assert torch.equal(_predict(model), expected)


def test_parking_and_placing_again() -> None:
    model = build(LARGE_HEADS)
    expected = _predict(model)
    swap = BlockSwap(model, 2, DEVICE)
    for _ in range(3):
        swap.place()
        assert torch.equal(_predict(model), expected)
        model.to(torch.device("cpu"))
    assert torch.equal(_predict(model), expected)


def test_more_blocks_than_there_are() -> None:
    model = build(SMALL_HEADS)
    with pytest.raises(UserError, match="3 blocks cannot be swapped: the model has 2") as caught:
        BlockSwap(model, 3, DEVICE)
    assert caught.value.field == "blocks_to_swap"
