"""Weights from safetensors files into a module that was built without memory, one tensor at a time and strictly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from backend.errors import UserError
from backend.text.four_bit import is_four_bit, quantise_weight

_FLOATS = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: the file, its name there, its shape and its number format."""

    file: Path
    name: str
    shape: tuple[int, ...]
    format: str


def list_tensors(files: Iterable[Path], rename: Callable[[str], str | None], field: str) -> dict[str, StoredTensor]:
    """Read the names, shapes and number formats of `files`, keyed by `rename(name)`; None leaves a tensor out.

    Raises:
        UserError: a file is damaged or unreadable, or holds two tensors for one name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    target = rename(name)
                    if target is None:
                        continue
                    if target in tensors:
                        raise UserError(f"{file} holds {target} twice ({tensors[target].name} and {name}).", field)
                    view = handle.get_slice(name)
                    tensors[target] = StoredTensor(file, name, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or not a .safetensors file ({error}). Get it again.", field) from error
    return tensors


def check_tensors(module: nn.Module, tensors: dict[str, StoredTensor], what: str, field: str) -> None:
    """Compare `tensors` with what `module` needs: every name on both sides, equal shapes, ordinary float formats.

    Raises:
        UserError: they differ; up to ten names of each sort are listed.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    formats = sorted({tensor.format for tensor in tensors.values()} - _FLOATS)
    complaints = [
        f"{label}: {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
        for label, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("wrong shapes", shapes),
            ("number formats that are not supported", formats),
        )
        if names
    ]
    if complaints:
        raise UserError(f"The weights do not fit {what}; {'; '.join(complaints)}.", field)


def fill_module(
    module: nn.Module, tensors: dict[str, StoredTensor], *, device: torch.device, dtype: torch.dtype, field: str
) -> None:
    """Replace the parameters of `module` (built on the meta device) by `tensors` in `dtype` on `device`, frozen.

    Weights of four-bit Linears are quantised on `device`. At most one tensor exists twice at a time. Call
    `check_tensors` first.
    """
    by_file: dict[Path, list[str]] = {}
    for target, stored in tensors.items():
        by_file.setdefault(stored.file, []).append(target)
    for file, targets in by_file.items():
        try:
            with safe_open(file, framework="pt") as handle:
                for target in targets:
                    value = handle.get_tensor(tensors[target].name)
                    owner, _, leaf = target.rpartition(".")
                    layer = module.get_submodule(owner)
                    if leaf == "weight" and is_four_bit(layer):
                        setattr(layer, leaf, quantise_weight(value, device))
                    else:
                        value = value.to(device=device, dtype=dtype)
                        setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} could not be read to its end ({error}). Get it again.", field) from error
