"""Safetensors headers without torch: names, shapes and formats of a checkpoint, checked before anything trusts them."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import UserError

MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_DIMENSIONS = 16
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_SUFFIX = ".safetensors.index.json"
# Bits of one element of each number format of the safetensors specification.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
_PREFERRED_NAMES = ("diffusion_pytorch_model", "model")
_PICKLE_REASON = (
    "only .safetensors files are loaded, because opening a pickle file (.pt, .ckpt, .bin) can run code that is hidden "
    "in it. Download the .safetensors version, or convert the file on a machine where you trust it."
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: its number format (safetensors name), shape, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What the headers of a checkpoint say: files, tensors by name, text metadata, bytes of all files together."""

    paths: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)
    total_bytes: int = 0


def read_header(path: str | Path) -> Header:
    """Read and check the header of a checkpoint: a .safetensors file, a sharded folder or a diffusers folder.

    No tensor data is read. A folder may be the model's own folder or the pipeline's with a `transformer/` subfolder.

    Raises:
        UserError: nothing is there, it is not safetensors, or the header contradicts itself or the file's length.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise UserError(f"{path} does not exist. Check the path of the weights.")
        if path.name.endswith(INDEX_SUFFIX):
            return _read_sharded(path)
        return _read_files([path])
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error


def _read_folder(folder: Path) -> Header:
    for candidate in (folder, folder / "transformer"):
        if not candidate.is_dir():
            continue
        indexes = sorted(item for item in candidate.iterdir() if item.name.endswith(INDEX_SUFFIX))
        files = sorted(item for item in candidate.iterdir() if item.suffix == ".safetensors" and item.is_file())
        for name in _PREFERRED_NAMES:
            if candidate / f"{name}{INDEX_SUFFIX}" in indexes:
                return _read_sharded(candidate / f"{name}{INDEX_SUFFIX}")
            if candidate / f"{name}.safetensors" in files:
                return _read_files([candidate / f"{name}.safetensors"])
        if len(indexes) == 1:
            return _read_sharded(indexes[0])
        if len(files) == 1 and not indexes:
            return _read_files(files)
        if indexes or files:
            names = ", ".join(item.name for item in (indexes or files)[:5])
            raise UserError(f"{candidate} holds several checkpoints ({names}). Give the path of one of them.")
    raise UserError(
        f"{folder} holds no .safetensors weights, neither directly nor in transformer/. "
        "Give a .safetensors file or the folder that holds one."
    )


def _read_sharded(index: Path) -> Header:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{index} is larger than an index of shards can be; the download is damaged. Get it again.")
    parsed = _parse_json(index.read_bytes(), index)
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map that lists the shards; the file is damaged. Download it again.")
    shards: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise UserError(f"{index} names a shard outside its own folder ({name!r}); such an index is not followed.")
        shards[name] = index.parent / name
    missing = [name for name, file in sorted(shards.items()) if not file.is_file()]
    if missing:
        shown = ", ".join(missing[:5])
        raise UserError(f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {shown}. Download them again.")
    header = _read_files([file for _, file in sorted(shards.items())])
    for name, shard in weight_map.items():
        if name not in header.tensors or header.tensors[name].file.name != shard:
            raise UserError(f"{index} says that {shard} holds {name}, but it does not. Download the folder again.")
    extra = sorted(set(header.tensors) - set(weight_map))
    if extra:
        raise UserError(f"The shards in {index.parent} hold {extra[0]}, which the index does not list. Download again.")
    return header


def _read_files(files: list[Path]) -> Header:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    total = 0
    for file in files:
        found, text, size = _read_one(file)
        twice = set(found) & set(tensors)
        if twice:
            raise UserError(f"{file} repeats {min(twice)}, which another shard holds too. Download the folder again.")
        tensors.update(found)
        metadata.update(text)
        total += size
    return Header(tuple(files), tensors, metadata, total)


def _read_one(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    if not file.is_file():
        raise UserError(f"{file} is not a regular file. Give a .safetensors file or a folder that holds one.")
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(9)
        _refuse_other_formats(file, start, size)
        length = struct.unpack("<Q", start[:8])[0]
        handle.seek(8)
        if length > MAX_HEADER_BYTES:
            raise UserError(
                f"{file} claims a header of {length} bytes; it is not a safetensors file, or it is damaged."
            )
        if 8 + length > size:
            raise UserError(f"{file} ends inside its header ({size} bytes); the download is incomplete. Get it again.")
        raw = handle.read(length)
    parsed = _parse_json(raw, file)
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "its metadata is not text")
    if not parsed:
        raise UserError(f"{file} holds no tensors. Check that it is the right file.")
    tensors = _check_tensors(parsed, file, size - 8 - length)
    return tensors, metadata, size


def _refuse_other_formats(file: Path, start: bytes, size: int) -> None:
    if size == 0:
        raise UserError(f"{file} is empty. Download it again.")
    if start[8:] == b"{":
        # The length before the JSON may begin with any bytes, those of other formats too.
        return
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or file.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(f"{file} is a pickle checkpoint: {_PICKLE_REASON}")
    if start[:4] == b"GGUF":
        raise UserError(f"{file} is a GGUF file, which this project does not read. Use the .safetensors version.")
    if start.startswith(b"version "):
        raise UserError(
            f"{file} is a Git LFS pointer, not the weights. Run `git lfs pull`, or download the file itself."
        )
    if size < 10:
        raise UserError(f"{file} is too short ({size} bytes) to be a safetensors file. Download it again.")


def _parse_json(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except _RepeatedKeyError as error:
        raise _damaged(file, f"its header lists {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "its header is not valid JSON") from error
    if not isinstance(parsed, dict):
        raise _damaged(file, "its header is not a table of tensors")
    return parsed


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file} is damaged: {what}. Download it again.")


class _RepeatedKeyError(Exception):
    """A JSON object has one key twice."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKeyError(repr(key[:100]))
        found[key] = value
    return found


def _whole_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_tensors(parsed: dict[str, Any], file: Path, data_bytes: int) -> dict[str, TensorInfo]:
    """Check every entry, and that the entries together cover the data area without holes or overlaps."""
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in parsed.items():
        shown = name[:100]
        if not isinstance(entry, dict):
            raise _damaged(file, f"the entry of {shown} is not a table")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise UserError(
                f"{file}: {shown} has the unknown number format {str(dtype)[:40]}. Use another version of it."
            )
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_whole_number(side) for side in shape):
            raise _damaged(file, f"{shown} has an impossible shape")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole_number(edge) for edge in offsets):
            raise _damaged(file, f"{shown} has impossible offsets")
        begin, end = offsets
        if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
            raise _damaged(file, f"{shown} does not have the size of its shape")
        spans.append((begin, end, shown))
        tensors[name] = TensorInfo(dtype, tuple(shape), file)
    position = 0
    for begin, end, shown in sorted(spans):
        if begin != position:
            raise _damaged(file, f"{shown} overlaps another tensor or leaves a gap")
        position = end
    if position != data_bytes:
        reason = "the download is incomplete" if position > data_bytes else "the file has bytes after its last tensor"
        raise UserError(
            f"{file} has {data_bytes} bytes of tensors where its header lists {position}: {reason}. Download it again."
        )
    return tensors
