"""Writes a safetensors file tensor by tensor, so that the whole of it never lies in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from backend.config.safetensors_header import DTYPE_BITS

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats that can be written, by their names in a header."""
_ALIGNMENT = 8


class TensorStream:
    """A safetensors file that is being written: the header first, then the tensors in exactly its order.

    Use it as a context manager around `write` calls; it writes to `path` itself, so give a temporary path where the
    file must be whole or absent.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """`tensors`: name -> (number format as a header names it, shape), in the order of the file."""
        self._waiting = dict(tensors)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for name, (dtype, shape) in tensors.items():
            size = int(torch.Size(shape).numel()) * DTYPE_BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        self._header = text + b" " * (-len(text) % _ALIGNMENT)
        self._path = path

    def __enter__(self) -> TensorStream:
        self._handle = open(self._path, "wb")
        self._handle.write(struct.pack("<Q", len(self._header)) + self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()
        if kind is None and self._waiting:
            raise ValueError(f"{len(self._waiting)} tensors of the header were never written.")

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the header; it must have the format and shape that were announced.

        Raises:
            ValueError: another tensor is next, or this one is not as announced.
        """
        expected = next(iter(self._waiting), None)
        if name != expected:
            raise ValueError(f"{name} was given where {expected} is next.")
        dtype, shape = self._waiting.pop(name)
        if tensor.dtype != TORCH_DTYPES[dtype] or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}.")
        self._handle.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
