"""Trees of tensors and plain values through files and back: nothing changes, not a type, not a bit."""

from __future__ import annotations

import math
import random
import struct
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import bitsandbytes
import prodigyopt
import pytest
import schedulefree
import torch
from torch import Tensor
from transformers.optimization import Adafactor

from backend.errors import UserError
from backend.training.state_tensors import decode, encode, read_tree, write_tree
from tests.unit.training.trained import Training, halving, training

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.complex64,
]  # fmt: skip


def _bits(value: float) -> bytes:
    return struct.pack(">d", value)


def _tensor_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def assert_same(left: Any, right: Any, place: str = "top") -> None:
    """Equal types, bits, orders of keys; also of NaN, minus zero and 0-dimensional tensors."""
    assert type(left) is type(right), place
    if isinstance(left, Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), place
        assert _tensor_bytes(left) == _tensor_bytes(right), place
    elif isinstance(left, dict):
        assert len(left) == len(right), place
        for (key, item), (other, value) in zip(left.items(), right.items(), strict=True):
            assert_same(key, other, f"key of {place}")
            assert_same(item, value, f"{place}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for index, (item, value) in enumerate(zip(left, right, strict=True)):
            assert_same(item, value, f"{place}.{index}")
    elif isinstance(left, float):
        assert _bits(left) == _bits(right), place
    else:
        assert left == right, place


def _random_tensor(chance: random.Random) -> Tensor:
    shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
    count = math.prod(shape)
    dtype = chance.choice(DTYPES)
    if dtype is torch.bool:
        return torch.tensor([chance.random() < 0.5 for _ in range(count)], dtype=dtype).reshape(shape)
    size = torch.empty(0, dtype=dtype).element_size()
    # Any bits at all, so NaN with payloads too.
    raw = torch.tensor([chance.randrange(256) for _ in range(count * size)], dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def _random_tree(chance: random.Random, depth: int = 0) -> Any:
    leaves = [
        lambda: None,
        lambda: chance.random() < 0.5,
        lambda: chance.randrange(-(10**20), 10**20),
        lambda: struct.unpack(">d", struct.pack(">Q", chance.getrandbits(64)))[0],
        lambda: chance.choice([0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 0.1]),
        lambda: "".join(chr(chance.choice([0, 10, 34, 92, 46, 126, 233, 0x1F600])) for _ in range(chance.randrange(6))),
        lambda: _random_tensor(chance),
    ]
    if depth > 3 or chance.random() < 0.4:
        return chance.choice(leaves)()
    count = chance.randrange(4)
    items = [_random_tree(chance, depth + 1) for _ in range(count)]
    keys = [
        chance.choice([index, str(index), (index, "a"), index + 0.5, None, index % 2 == 0]) for index in range(count)
    ]
    kind = chance.choice([list, tuple, dict, OrderedDict, Counter])
    if kind is Counter:
        return Counter({key: index for index, key in enumerate(keys)})
    return kind(items) if kind in (list, tuple) else kind(zip(keys, items, strict=True))


def test_any_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    chance = random.Random(4)
    for number in range(200):
        tree = _random_tree(chance)
        write_tree(tmp_path, f"t{number}", tree, "It")
        assert_same(read_tree(tmp_path, f"t{number}"), tree)


def test_the_number_0_and_the_text_0_stay_two_keys(tmp_path: Path) -> None:
    tree = {"state": {0: {"a": torch.zeros(1)}, "0": {"a": torch.ones(1)}, "0.a": torch.full((1,), 2.0)}}
    write_tree(tmp_path, "t", tree, "It")
    assert_same(read_tree(tmp_path, "t"), tree)


def test_a_tensor_that_stands_in_two_places_is_stored_once_and_is_one_again() -> None:
    shared, equal = torch.arange(4.0), torch.arange(4.0)
    plain, tensors = encode([shared, {"a": shared}, equal], "It")
    assert len(tensors) == 2
    back = decode(plain, tensors)
    assert back[0] is back[1]["a"]
    assert back[2] is not back[0]


def test_views_of_one_memory_and_other_strides_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tree = [base, base.T, base[1], base[:, ::2], base[0, 0]]
    write_tree(tmp_path, "t", tree, "It")
    assert_same(read_tree(tmp_path, "t"), tree)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), lambda: 0, b"bytes", torch.eye(2).to_sparse(), torch.zeros(1, dtype=torch.complex128)],
)
def test_what_would_need_code_to_come_back_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(UserError, match=r"optimizer X keeps .* at state\.0\.odd"):
        encode({"state": {0: {"odd": value}}}, "The optimizer X")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"tree": {"other": 1}}', '{"tree": {"tensor": "gone"}}', '{"tree": {"float": "zz"}}',
     '{"tree": {"dict": [1]}}', '{"tree": {"tuple": 3}}', '{"tree": {"a": 1, "b": 2}}'],
)  # fmt: skip
def test_damage_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=r"t\.json is damaged"):
        read_tree(tmp_path, "t")


def test_a_cut_tensor_file_is_a_sentence(tmp_path: Path) -> None:
    write_tree(tmp_path, "t", [torch.ones(100)], "It")
    path = tmp_path / "t.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is damaged"):
        read_tree(tmp_path, "t")


# --- optimizers ---------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    # 4,096 elements and more are kept in 8 bits; the width below gives both kinds.
    "AdamW8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3),
    "Adafactor": lambda parameters: Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False),
    "Prodigy": lambda parameters: prodigyopt.Prodigy(parameters, lr=1.0),
    "schedule-free": lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=1e-2, warmup_steps=4),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-5, momentum=0.9),
    "Adam with amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, amsgrad=True),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-3),
}


def _made(name: str) -> Training:
    made = training(OPTIMIZERS[name], halving, width=1100)
    if name == "schedule-free":
        made.optimizer.train()  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = _made(name)
    whole.run(1, 6)
    write_tree(tmp_path, "optimizer", whole.optimizer.state_dict(), "The optimizer")
    write_tree(tmp_path, "schedule", whole.schedule.state_dict(), "The schedule")
    generator, weights = torch.get_rng_state(), whole.lora.weights()
    if name == "AdamW8bit":
        kinds = {
            value.dtype
            for state in whole.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        }
        assert torch.uint8 in kinds
    expected = whole.run(7, 11)

    torch.manual_seed(99)
    again = _made(name)
    again.lora.load(weights)
    again.optimizer.load_state_dict(read_tree(tmp_path, "optimizer"))
    again.schedule.load_state_dict(read_tree(tmp_path, "schedule"))
    torch.set_rng_state(generator)
    for step, (left, right) in enumerate(zip(expected, again.run(7, 11), strict=True), 7):
        assert left.isfinite().all()
        assert torch.equal(left, right), step
    assert_same(again.optimizer.state_dict(), whole.optimizer.state_dict())
