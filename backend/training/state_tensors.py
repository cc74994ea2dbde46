"""State dictionaries of optimizers and schedules as safetensors and JSON, and back exactly; no pickle.

A tree is built of None, bool, int, float, str, list, tuple, dict (keys: str, int, float, bool, None or tuples of
these), OrderedDict, Counter and tensors. JSON holds it with marks: a list is a list, everything else that is not a
plain value is an object with one key (tuple, dict, ordered, counter, float, tensor). Dictionaries are lists of pairs,
so that the number 0 and the text "0" stay two keys and the order is kept. Floats that JSON lacks (NaN with its bits,
infinity) are 16 hexadecimal digits. A tensor is named by its place; one that stands in several places is stored once
and is one tensor again after reading.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.errors import UserError
from backend.files import atomic_path, write_atomic

_FIELD = "resume"
_DICTIONARIES: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_MAX_NAME = 200
# What the file format can hold, by what reads it back.
_STORED = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool, torch.complex64,
}  # fmt: skip


def encode(tree: Any, what: str) -> tuple[Any, dict[str, Tensor]]:
    """A tree as plain JSON values and its tensors (on the CPU, contiguous, detached, copies).

    Raises:
        UserError: a value of another type; `what` ("the optimizer prodigyopt.Prodigy") says whose it is.
    """
    encoder = _Encoder(what)
    return encoder.plain(tree, ""), encoder.tensors


class _Encoder:
    def __init__(self, what: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._what = what
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # ids are unique among living objects only

    def plain(self, value: Any, place: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if kind is list:
            return [self.plain(item, _below(place, index)) for index, item in enumerate(value)]
        if kind is tuple:
            return {"tuple": [self.plain(item, _below(place, index)) for index, item in enumerate(value)]}
        if kind in _DICTIONARIES:
            pairs = [[self._key(key, place), self.plain(item, _below(place, key))] for key, item in value.items()]
            return {_DICTIONARIES[kind]: pairs}
        if isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in _STORED:
            return {"tensor": self._tensor(value, place)}
        shown = f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(value, Tensor):
            shown = f"a tensor of {value.dtype}, {value.layout}"
        raise UserError(
            f"{self._what} keeps {shown} at {place or 'the top'}, which cannot be saved without running code when it "
            "is loaded. Train without saving states, or choose another one."
        )

    def _key(self, key: Any, place: str) -> Any:
        if isinstance(key, Tensor) or type(key) in (list, *_DICTIONARIES):
            raise UserError(
                f"{self._what} keeps something under the key {key!r:.60} at {place}, which cannot be saved."
            )
        return self.plain(key, f"the keys of {place}")

    def _tensor(self, tensor: Tensor, place: str) -> str:
        known = self._names.get(id(tensor))
        if known is not None:
            return known
        name = base = place[:_MAX_NAME] or "tensor"
        number = 1
        while name in self.tensors:
            number += 1
            name = f"{base}~{number}"
        self.tensors[name] = tensor.detach().to(device="cpu", copy=True).contiguous()
        self._names[id(tensor)] = name
        self._alive.append(tensor)
        return name


def _below(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def decode(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `encode` was given.

    Raises:
        ValueError: not made by `encode`, or a tensor is missing.
    """
    if plain is None or isinstance(plain, bool | int | float | str):
        return plain
    if isinstance(plain, list):
        return [decode(item, tensors) for item in plain]
    if not isinstance(plain, dict) or len(plain) != 1:
        raise ValueError(f"unknown value {plain!r:.60}")
    mark, content = next(iter(plain.items()))
    if mark == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if mark == "tuple":
        return tuple(decode(item, tensors) for item in content)
    if mark == "tensor":
        if content not in tensors:
            raise ValueError(f"the tensor {content!r:.100} is missing")
        return tensors[content]
    kind = next((kind for kind, name in _DICTIONARIES.items() if name == mark), None)
    if kind is None:
        raise ValueError(f"unknown mark {mark!r:.60}")
    return kind({decode(key, tensors): decode(item, tensors) for key, item in content})


# --- files --------------------------------------------------------------------------------------------------------


def write_tree(folder: Path, stem: str, tree: Any, what: str) -> None:
    """Write `<stem>.json` and, if the tree has tensors, `<stem>.safetensors`; each is on the disk when this returns.

    Raises:
        UserError: a value that cannot be stored, or a folder that cannot be written.
    """
    plain, tensors = encode(tree, what)
    if tensors:
        with atomic_path(folder / f"{stem}.safetensors") as temporary:
            save_file(tensors, temporary)
    write_atomic(folder / f"{stem}.json", json.dumps({"tree": plain}, separators=(",", ":"), allow_nan=False) + "\n")


def read_tree(folder: Path, stem: str) -> Any:
    """Read what `write_tree` wrote; tensors are on the CPU and belong to the caller.

    Raises:
        UserError: missing or damaged files.
    """
    path = folder / f"{stem}.json"
    try:
        plain = json.loads(path.read_text("utf-8"))["tree"]
        return decode(plain, dict(_tensors_of(folder / f"{stem}.safetensors")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Take another state.", _FIELD) from None
    except (ValueError, KeyError, TypeError, struct.error, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {error}. Take another state.", _FIELD) from None


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    if not path.exists():
        return
    with safe_open(path, framework="pt", device="cpu") as handle:
        for name in handle.keys():  # noqa: SIM118 (it is no dictionary)
            # A copy: what comes from the file is a view of it, which would change with the file.
            yield name, handle.get_tensor(name).clone()
