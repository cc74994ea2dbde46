"""Where the engine computes: devices, number formats, memory. The only module that names kinds of accelerators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from backend.errors import UserError

_FLOAT_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str | None = None) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", "mps"); None or "auto" takes the best that this machine has.

    Raises:
        UserError: no such kind of device, or this machine or this build of torch lacks it.
    """
    if name is None or name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d{1,4}))?", name)
    if match is None:
        raise UserError(f"{name!r} is not a device. Use cpu, cuda, cuda:0 (and so on) or mps.", "device")
    kind, index = match[1], int(match[2] or 0)
    count = _device_count(kind)
    if count == 0:
        raise UserError(
            f"This machine offers no {kind} device to this build of torch ({torch.__version__}). "
            "Use cpu, or install a build of torch for your accelerator and its driver.",
            "device",
        )
    if index >= count:
        raise UserError(f"{name} does not exist: this machine has {kind}:0 to {kind}:{count - 1}.", "device")
    return torch.device(name)


def device_of_process(name: str | None, local_rank: int, *, cpu_only: bool = False) -> torch.device:
    """The device of one of several processes on this machine: its own GPU, unless `name` says exactly which.

    Args:
        name: as for `resolve_device`.
        local_rank: the number of the process on this machine, from 0.
        cpu_only: whoever started the processes wants no GPU; a `name` is stronger.

    Raises:
        UserError: as `resolve_device`, or there are more processes than GPUs.
    """
    if name is None and cpu_only:
        return torch.device("cpu")
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        return resolve_device(f"cuda:{local_rank}")
    return device


def _device_count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 1 if kind == "cpu" or torch.backends.mps.is_available() else 0


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it natively, else float32 (CPU, MPS, older cards)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The model's number format by name ("float32", "bfloat16"); None takes the device's default.

    Raises:
        UserError: another name.
    """
    if name is None:
        return default_dtype(device)
    if name not in _FLOAT_NAMES:
        raise UserError(f"{name!r} is not a number format of the model. Use float32 or bfloat16.", "dtype")
    return _FLOAT_NAMES[name]


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on `device` now (on a CPU: available RAM)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    return psutil.virtual_memory().available


def used_memory(device: torch.device) -> int:
    """Bytes that this process has had in use on `device` at most (on a CPU: that are resident now)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def empty_cache(device: torch.device) -> None:
    """Give cached but unused blocks of `device` back to the system; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def host_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` in CPU memory; pinned when `device` can then copy it without waiting."""
    host = tensor.to(torch.device("cpu"))
    return host.pin_memory() if device.type == "cuda" and not host.is_pinned() else host


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor`, strides too, in CPU memory; from CUDA into pinned memory and without waiting for the device.

    Such a copy may be given back to the device (its stream keeps the order), but not read before it is synchronised.
    """
    waits = tensor.device.type != "cuda"
    host = torch.empty_like(tensor, device="cpu", pin_memory=not waits)
    return host.copy_(tensor, non_blocking=not waits)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give torch's global random generators (CPU and `device`) back the state that they had before the block."""
    host_state, device_state = torch.get_rng_state(), None
    if device.type == "cuda":
        device_state = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        device_state = torch.mps.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(host_state)
        if device_state is not None and device.type == "cuda":
            torch.cuda.set_rng_state(device_state, device)
        elif device_state is not None:
            torch.mps.set_rng_state(device_state)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """The CUDA compute capability of `device`, None for every other kind."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
