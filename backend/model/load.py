"""Weights into a DiT: strict names and shapes, one tensor at a time, no more memory than the model and one tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend.config.checkpoint import CheckpointInfo, TransformerConfig, compare_with_task, identify
from backend.errors import UserError
from backend.model.attention import AttentionBackend, resolve_attention
from backend.model.device import default_dtype
from backend.model.dit import MODEL_DTYPES, Kandinsky5Transformer

_SOURCE_DTYPES = ("F16", "BF16", "F32")
_LISTED = 10


def load_transformer(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: AttentionBackend | str | None = None,
    task_config: TransformerConfig | None = None,
    rope_bf16_rounding: bool = False,
) -> Kandinsky5Transformer:
    """Load a DiT from a .safetensors file, a sharded or diffusers folder, or a prefixed repack.

    The sizes come from the header; `task_config`, when given, must agree with them. Parameters are frozen nowhere and
    the model is in eval mode. dtype: float32 or bfloat16 (with float32 islands), by default that of the device.

    Raises:
        UserError: not a DiT, not the task's model, missing, unexpected or misshapen tensors, a damaged file, an
            attention backend that is missing or does not serve this device and dtype.
    """
    device = torch.device(device)
    dtype = dtype or default_dtype(device)
    if dtype not in MODEL_DTYPES:
        raise UserError(f"The DiT computes in float32 or bfloat16, not in {str(dtype).split('.')[-1]}.", "dtype")
    if not isinstance(attention, AttentionBackend):
        attention = resolve_attention(attention, device=device, dtype=dtype)
    info = identify(path)
    config = _checked_config(info, path, task_config)
    _check_tensors(info, config, path)
    with torch.device("meta"):
        model = Kandinsky5Transformer(config, attention, rope_bf16_rounding)
    dtypes = model.policy_dtypes(dtype)
    for name, tensor in _stream(info):
        # copy=True: a tensor that only maps the file would change, or crash, with the file.
        _assign(model, name, tensor.to(device=device, dtype=dtypes[name], copy=True))
    return model.cast_policy(dtype).eval()


def _checked_config(info: CheckpointInfo, path: str | Path, task: TransformerConfig | None) -> TransformerConfig:
    if info.kind != "dit":
        raise UserError(f"{path} is not a Kandinsky 5 DiT but: {info.summary}. Give the path of the DiT.", "dit")
    if info.unsupported or info.config is None:
        raise UserError(f"{path}: {info.unsupported}", "dit")
    rows = compare_with_task(info, task) if task is not None else []
    if rows:
        table = "\n".join(f"  {row}" for row in rows)
        raise UserError(
            f"{path} does not fit the task. Choose the task of these weights, or the weights of this task:\n{table}",
            "dit",
        )
    return info.config


def _check_tensors(info: CheckpointInfo, config: TransformerConfig, path: str | Path) -> None:
    """Refuse a checkpoint whose names, shapes or formats are not exactly those of its architecture."""
    expected = config.expected_tensors()
    official = set(info.key_map)
    foreign = set(info.header.tensors) - set(info.key_map.values())
    problems = []
    for what, names in (("missing", set(expected) - official), ("unexpected", (official - set(expected)) | foreign)):
        if names:
            problems.append(f"{len(names)} {what} ({_listing(sorted(names))})")
    shapes, formats = [], []
    for name in sorted(official & set(expected)):
        tensor = info.header.tensors[info.key_map[name]]
        if tensor.shape != expected[name]:
            shapes.append(f"{name}: expected {list(expected[name])}, found {list(tensor.shape)}")
        if tensor.dtype not in _SOURCE_DTYPES:
            formats.append(f"{name} in {tensor.dtype}")
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_listing(shapes)})")
    if formats:
        problems.append(f"{len(formats)} in a number format that is not loaded ({_listing(formats)})")
    if problems:
        raise UserError(
            f"{path} has not exactly the tensors of a {info.summary}: {'; '.join(problems)}. "
            "Download the file again, or use the official one.",
            "dit",
        )


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _stream(info: CheckpointInfo) -> Iterator[tuple[str, Tensor]]:
    """Official name and tensor, one after another, file by file; a tensor is a view of the mapped file."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for official, name in info.key_map.items():
        by_file[info.header.tensors[name].file].append(official)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                for official in names:
                    yield official, handle.get_tensor(info.key_map[official])
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read to its end ({error}). Download it again.", "dit") from error


def _assign(model: Kandinsky5Transformer, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))
