"""A LoRA under the names of other software, with every bit of its weights and alphas kept where the format allows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from backend.errors import UserError
from backend.lora.alphas import METADATA_KEY
from backend.lora.formats import (
    DIFFUSERS_PREFIX,
    LoraFile,
    LoraFormat,
    LoraWeights,
    listing,
    lora_tensors,
    write_lora,
)
from backend.lora.metadata import file_hashes

MODEL_HASH = "sshs_model_hash"
"""Metadata: SHA-256 of everything after the header."""
BAKED_KEY = "k5_baked_alpha"
"""Metadata of a diffusers file whose `up` holds alpha / rank already: layer -> the alpha that it had, as JSON."""

PRECISIONS: Mapping[str, torch.dtype] = {
    "float": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Number formats by the names of --save_precision."""


def write_converted(
    path: str | Path,
    layers: Mapping[str, LoraWeights],
    target: LoraFormat,
    metadata: Mapping[str, str],
    precision: str | None = None,
) -> None:
    """Write `layers` (dotted names) in the names of `target`, in `precision` (None: as they are).

    kohya and ComfyUI files hold alpha themselves. A diffusers file has no place for it: alpha / rank is multiplied into
    `up` when that can be undone bit for bit (powers of two, mostly), else the pairs stay and alpha goes into
    `lora_adapter_metadata`, which diffusers and this project read. Hashes in the metadata become those of the new file.

    Raises:
        UserError: the number format cannot hold a weight, or the file cannot be written.
    """
    dtype = PRECISIONS[precision] if precision else None
    stored = {name: _rounded(pair, dtype) for name, pair in layers.items()}
    _refuse_overflow(stored, layers, path)
    first = next(iter(stored.values()))
    network = {"ss_network_dim": str(first.rank), "ss_network_alpha": str(first.alpha)}
    clean = network | {key: value for key, value in metadata.items() if key not in (METADATA_KEY, BAKED_KEY)}
    if target == "diffusers":
        stored, extra = _for_diffusers(stored)
        clean |= extra
    if MODEL_HASH in clean:
        clean |= file_hashes(lora_tensors(stored, target), clean)
    write_lora(path, stored, target, clean)


def original_layers(file: LoraFile, layers: Mapping[str, LoraWeights]) -> dict[str, LoraWeights]:
    """`layers` of `file` with the alphas that they had before `write_converted` multiplied them in; bit for bit.

    Raises:
        UserError: the note of the original alphas in the file is damaged.
    """
    if file.format != "diffusers" or BAKED_KEY not in file.metadata:
        return dict(layers)
    try:
        noted = json.loads(file.metadata[BAKED_KEY])
        alphas = {name: float(noted[name]) for name in layers}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file.path}: {BAKED_KEY} in its metadata is damaged ({error}). Convert the original again.", "lora_weight"
        ) from error
    if not all(math.isfinite(alpha) and alpha > 0 for alpha in alphas.values()):
        raise UserError(
            f"{file.path}: {BAKED_KEY} holds an impossible alpha. Convert the original again.", "lora_weight"
        )
    return {
        name: LoraWeights(pair.down, _scaled(pair.up, pair.rank / alphas[name]), alphas[name])
        for name, pair in layers.items()
    }


def _rounded(pair: LoraWeights, dtype: torch.dtype | None) -> LoraWeights:
    return pair if dtype is None else LoraWeights(pair.down.to(dtype), pair.up.to(dtype), pair.alpha)


def _refuse_overflow(stored: Mapping[str, LoraWeights], given: Mapping[str, LoraWeights], path: str | Path) -> None:
    broken = []
    for name, pair in stored.items():
        if not (torch.isfinite(pair.down).all() and torch.isfinite(pair.up).all()):
            largest = max(float(given[name].down.abs().max()), float(given[name].up.abs().max()))
            broken.append(f"{name}: up to {largest:g}")
    if broken:
        raise UserError(
            f"{path} is not written: the number format cannot hold these weights. Use bf16 or fp32:{listing(broken)}",
            "save_precision",
        )


def _scaled(up: Tensor, factor: float) -> Tensor:
    return (up.double() * factor).to(up.dtype)


def _for_diffusers(layers: Mapping[str, LoraWeights]) -> tuple[dict[str, LoraWeights], dict[str, str]]:
    """The pairs to store with alpha = rank, and the metadata that tells what their alphas are or were."""
    plain = {name: LoraWeights(pair.down, pair.up, float(pair.rank)) for name, pair in layers.items()}
    if all(pair.alpha == pair.rank for pair in layers.values()):
        return plain, {}
    baked = {}
    for name, pair in layers.items():
        scale = pair.alpha / pair.rank
        up = _scaled(pair.up, scale)
        if not torch.equal(_scaled(up, 1 / scale), pair.up):
            return plain, {METADATA_KEY: json.dumps(_adapter_metadata(layers), sort_keys=True)}
        baked[name] = LoraWeights(pair.down, up, float(pair.rank))
    return baked, {BAKED_KEY: json.dumps({name: pair.alpha for name, pair in layers.items()}, sort_keys=True)}


def _adapter_metadata(layers: Mapping[str, LoraWeights]) -> dict[str, object]:
    """The table that diffusers stores and reads: the common rank and alpha, and the layers that differ."""
    rank = Counter(pair.rank for pair in layers.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in layers.values()).most_common(1)[0][0]
    table = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: pair.rank for name, pair in layers.items() if pair.rank != rank},
        "alpha_pattern": {name: pair.alpha for name, pair in layers.items() if pair.alpha != alpha},
        "target_modules": sorted(layers),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }
    return {f"{DIFFUSERS_PREFIX}{key}": value for key, value in table.items()}
