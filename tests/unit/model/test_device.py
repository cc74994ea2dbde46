"""Devices, formats and memory by name."""

from __future__ import annotations

import pytest
import torch

from backend.errors import UserError
from backend.model import device as module
from backend.model.device import (
    copy_to_host,
    default_dtype,
    empty_cache,
    free_memory,
    random_state_kept,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")


def test_cpu_is_a_first_class_device() -> None:
    """By name, with float32 and some memory."""
    assert resolve_device("cpu") == CPU
    assert default_dtype(CPU) == torch.float32
    assert free_memory(CPU) > 0
    empty_cache(CPU)


def test_default_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator before the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device() == resolve_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device().type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device().type == "cuda"


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence each, with the field."""
    monkeypatch.setattr(module, "_device_count", lambda kind: {"cpu": 1, "mps": 0, "cuda": 2}[kind])
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    for name, words in (
        ("gpu", "is not a device"),
        ("cuda:x", "is not a device"),
        ("", "is not a device"),
        ("mps", "offers no mps device"),
        ("cuda:2", "cuda:0 to cuda:1"),
        ("cpu:1", "does not exist"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            resolve_device(name)
        assert caught.value.field == "device"


def test_number_formats_by_name() -> None:
    """Two formats, or the device's own."""
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert resolve_dtype(None, CPU) == torch.float32
    with pytest.raises(UserError, match="float32 or bfloat16"):
        resolve_dtype("float16", CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_for_the_host_has_the_same_bits_and_strides_in_memory_of_its_own(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, 4).to(dtype).transpose(0, 2)
    copied = copy_to_host(tensor)
    assert torch.equal(copied, tensor)
    assert (copied.stride(), copied.dtype) == (tensor.stride(), dtype)
    tensor.zero_()
    assert bool(copied.any())


def test_random_numbers_go_on_as_if_the_block_had_drawn_none() -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    with pytest.raises(KeyError), random_state_kept(CPU):
        torch.manual_seed(7)
        torch.randn(100)
        raise KeyError
    assert torch.equal(torch.randn(3), expected)


def test_the_generator_of_an_accelerator_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"now": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states["now"].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update(now=state))
    with random_state_kept(torch.device("cuda:0")):
        states["now"] = torch.tensor([2])
    assert states["now"].tolist() == [1]
