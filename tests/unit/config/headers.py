"""Safetensors files made by hand, whole or hostile, without torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def header_of(tensors: Mapping[str, tuple[int, ...]], dtype: str = "BF16", bits: int = 16) -> dict[str, Any]:
    """The header of tensors that lie one after another."""
    header, position = {}, 0
    for name, shape in tensors.items():
        end = position + math.prod(shape) * bits // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header


def write_raw(path: Path, header: bytes, data_bytes: int) -> Path:
    """A file with this header and a sparse data area, which takes no disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(header)) + header)
        handle.truncate(8 + len(header) + data_bytes)
    return path


def write_header_only(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str = "BF16", bits: int = 16) -> Path:
    """A sparse file that is in order."""
    header = header_of(tensors, dtype, bits)
    size = max(entry["data_offsets"][1] for entry in header.values())
    return write_raw(path, json.dumps(header).encode(), size)
