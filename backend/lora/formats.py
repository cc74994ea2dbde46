"""LoRA files: reads kohya, PEFT / diffusers and ComfyUI names into one form, and writes all three.

Names in a file are kept as they are here; which layer of a model they mean is decided in `backend.lora.targets`, from
the model's own list of layers (underscores alone cannot tell: `self_attention_out_layer` has three readings).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backend.config.checkpoint import Header, TensorInfo, read_header
from backend.config.lora_methods import other_method, refusal
from backend.errors import UserError
from backend.files import atomic_path, fingerprint, share_like_others
from backend.lora.alphas import FIELD, adapter_config

LoraFormat = Literal["kohya", "diffusers", "comfyui"]
MAX_LISTED = 10
KOHYA_PREFIX = "lora_unet_"
COMFYUI_PREFIX = "diffusion_model."
DIFFUSERS_PREFIX = "transformer."

_KEY = re.compile(
    r"(?P<stem>.+)\.(?:"
    r"(?P<down>lora_down\.weight|lora\.down\.weight|lora_A(?:\.[^.]+)?\.weight)|"
    r"(?P<up>lora_up\.weight|lora\.up\.weight|lora_B(?:\.[^.]+)?\.weight)|"
    r"(?P<alpha>alpha))"
)
_FLOAT_FORMATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class LoraWeights:
    """The low-rank pair of one layer: down [rank, in], up [out, rank], any floating format, and alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down."""
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it stands in a file; `layers` has the layers' names as the file spells them, prefix included."""

    path: Path
    format: LoraFormat
    layers: dict[str, LoraWeights]
    metadata: dict[str, str]
    fingerprint: str

    @property
    def rank(self) -> int:
        """The rank that most layers have."""
        return Counter(weights.rank for weights in self.layers.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha that most layers have."""
        return Counter(weights.alpha for weights in self.layers.values()).most_common(1)[0][0]

    @property
    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.path.name}: {self.format} LoRA, rank {self.rank}, alpha {self.alpha:g}, {len(self.layers)} layers"
        )


def listing(items: Sequence[str]) -> str:
    """Up to ten items, one a line, and how many more there are."""
    more = f"\n  ... and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return "".join(f"\n  {item[:200]}" for item in items[:MAX_LISTED]) + more


# --- reading ------------------------------------------------------------------------------------------------------


def read_lora(path: str | Path) -> LoraFile:
    """Read a LoRA file, or a PEFT folder with one, completely into CPU memory, in the number format of the file.

    alpha comes from the layer's own `.alpha`, else (PEFT names only) from the file's `lora_adapter_metadata` or an
    `adapter_config.json` beside it, else it is the rank. An alpha of 0 means the rank too, as kohya-style trainers do.

    Raises:
        UserError: missing, damaged, not a LoRA, a method other than LoRA, half a pair, ranks that differ within a
            pair, or numbers that are not finite.
    """
    path = _lora_file(Path(path))
    header = _read_header(path)
    _refuse_other_methods(path, header.tensors)
    pairs = _collect(path, header)
    peft_ranks = {
        stem: header.tensors[parts["down"]].shape[0] for stem, parts in pairs.items() if _has_peft_names(stem, parts)
    }
    alphas = adapter_config(path, header.metadata).alphas(peft_ranks) if peft_ranks else {}
    try:
        layers = _load(path, pairs, alphas)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. Check the file, or get it again.", FIELD) from error
    _refuse_non_finite(path, layers)
    return LoraFile(path, _format_of(layers), layers, header.metadata, fingerprint(path))


def _lora_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _ADAPTER_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files)} .safetensors files. Give the path of the LoRA file itself.", FIELD)
    return files[0]


def _read_header(path: Path) -> Header:
    try:
        return read_header(path)
    except UserError as error:
        raise UserError(error.message, FIELD) from error


def _refuse_other_methods(path: Path, keys: Iterable[str]) -> None:
    found = other_method(keys)
    if found is not None:
        raise UserError(f"{path} is {refusal(*found)}", FIELD)


def _collect(path: Path, header: Header) -> dict[str, dict[str, str]]:
    """Group the keys: layer -> {"down", "up", "alpha"} -> key. Everything that does not fit is reported together."""
    pairs: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for key, info in header.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            wrong.append(f"{key}: not a part of a LoRA")
            continue
        part = next(name for name in ("down", "up", "alpha") if match[name])
        parts = pairs.setdefault(match["stem"], {})
        if part in parts:
            wrong.append(f"{key}: the same layer has {parts[part]} too")
        parts[part] = key
        if info.dtype not in _FLOAT_FORMATS:
            wrong.append(f"{key}: {info.dtype} is not a floating-point format")
    if not any("down" in parts or "up" in parts for parts in pairs.values()):
        raise UserError(
            f"{path} is not a LoRA: it has no lora_down / lora_up or lora_A / lora_B tensors; its first one is "
            f"{next(iter(header.tensors))[:100]!r}. Give a LoRA file here.",
            FIELD,
        )
    for stem, parts in pairs.items():
        wrong += _pair_problems(stem, {part: header.tensors[key] for part, key in parts.items()})
    if wrong:
        raise UserError(f"{path} cannot be used as a LoRA. Get it again, or save it anew:{listing(wrong)}", FIELD)
    return pairs


def _pair_problems(stem: str, parts: Mapping[str, TensorInfo]) -> list[str]:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        names = {"down": "lora_down / lora_A", "up": "lora_up / lora_B"}
        return [f"{stem}: its {names[part]} half is missing" for part in missing]
    down, up = parts["down"].shape, parts["up"].shape
    if len(down) != 2 or len(up) != 2:
        return [f"{stem}: down {list(down)} and up {list(up)} are not matrices"]
    problems = []
    if down[0] != up[1]:
        problems.append(f"{stem}: the ranks differ, down {list(down)} and up {list(up)}")
    if 0 in (*down, *up):
        problems.append(f"{stem}: a side is 0, down {list(down)} and up {list(up)}")
    if "alpha" in parts and parts["alpha"].elements != 1:
        problems.append(f"{stem}: alpha is not one number but has the shape {list(parts['alpha'].shape)}")
    return problems


def _has_peft_names(stem: str, parts: Mapping[str, str]) -> bool:
    return "alpha" not in parts and ".lora_A." in parts["down"] and not stem.startswith(COMFYUI_PREFIX)


def _load(path: Path, pairs: Mapping[str, Mapping[str, str]], alphas: Mapping[str, float]) -> dict[str, LoraWeights]:
    layers: dict[str, LoraWeights] = {}
    with safe_open(path, framework="pt", device="cpu") as handle:
        for stem, parts in pairs.items():
            down, up = (_computable(handle.get_tensor(parts[half])) for half in ("down", "up"))
            alpha = alphas.get(stem, 0.0)
            if "alpha" in parts:
                alpha = float(handle.get_tensor(parts["alpha"]).to(torch.float64).reshape(()))
            if not math.isfinite(alpha):
                raise UserError(f"{path}: {parts['alpha']} is {alpha}, not a finite number. Save the LoRA anew.", FIELD)
            layers[stem] = LoraWeights(down, up, alpha or float(down.shape[0]))
    return layers


def _computable(tensor: Tensor) -> Tensor:
    # 8-bit floats are a storage format: no arithmetic, not even a test for NaN. A copy in any case: what comes from the
    # file is a view of it, which would change, or crash, when the file is overwritten in place.
    return tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor.clone()


def _refuse_non_finite(path: Path, layers: Mapping[str, LoraWeights]) -> None:
    broken = [
        f"{stem}: {half}"
        for stem, weights in layers.items()
        for half, tensor in (("down", weights.down), ("up", weights.up))
        if not torch.isfinite(tensor).all()
    ]
    if broken:
        raise UserError(
            f"{path} holds NaN or infinite weights, so its training went wrong. "
            f"Use an earlier checkpoint:{listing(broken)}",
            FIELD,
        )


def _format_of(stems: Mapping[str, LoraWeights]) -> LoraFormat:
    first = next(iter(stems))
    if first.startswith(KOHYA_PREFIX):
        return "kohya"
    return "comfyui" if first.startswith(COMFYUI_PREFIX) else "diffusers"


# --- writing ------------------------------------------------------------------------------------------------------


def write_lora(
    path: str | Path,
    layers: Mapping[str, LoraWeights],
    format: LoraFormat = "kohya",
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA atomically; `layers` goes from a layer's dotted path in the model to its pair.

    kohya and ComfyUI files hold alpha beside each pair. Readers of diffusers files take alpha = rank when nobody says
    otherwise, so there alpha / rank is multiplied into `up` (in float32, then rounded to `dtype`).

    Args:
        dtype: number format of the pairs in the file; None keeps each tensor's own. alpha is float32.
        metadata: text to store; the network's rank, alpha and kind are added when they are not in it.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = lora_tensors(layers, format, dtype)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={**_network_metadata(layers), **(metadata or {})})
        share_like_others(temporary)


def lora_tensors(
    layers: Mapping[str, LoraWeights], format: LoraFormat = "kohya", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Everything that `write_lora` puts into a file of `format`, by key: contiguous copies in CPU memory."""
    if format not in get_args(LoraFormat):
        raise ValueError(f"format must be one of {get_args(LoraFormat)}, not {format!r}.")
    if not layers:
        raise ValueError("A LoRA needs at least one layer.")
    tensors: dict[str, Tensor] = {}
    for name, weights in layers.items():
        for key, tensor in _named(name, weights, format).items():
            stored = tensor.dtype if key.endswith(".alpha") else dtype or tensor.dtype
            tensors[key] = tensor.detach().to(device="cpu", dtype=stored, copy=True).contiguous()
    return tensors


def _named(name: str, weights: LoraWeights, format: LoraFormat) -> dict[str, Tensor]:
    alpha = torch.tensor(weights.alpha, dtype=torch.float32)
    if format == "kohya":
        stem = KOHYA_PREFIX + name.replace(".", "_")
        return {f"{stem}.lora_down.weight": weights.down, f"{stem}.lora_up.weight": weights.up, f"{stem}.alpha": alpha}
    if format == "comfyui":
        stem = COMFYUI_PREFIX + name
        return {f"{stem}.lora_A.weight": weights.down, f"{stem}.lora_B.weight": weights.up, f"{stem}.alpha": alpha}
    up = (weights.up.float() * (weights.alpha / weights.rank)).to(weights.up.dtype)
    return {
        f"{DIFFUSERS_PREFIX}{name}.lora_A.weight": weights.down,
        f"{DIFFUSERS_PREFIX}{name}.lora_B.weight": up,
    }


def _network_metadata(layers: Mapping[str, LoraWeights]) -> dict[str, str]:
    first = next(iter(layers.values()))
    return {
        "format": "pt",
        "ss_base_model_version": "kandinsky5",
        "ss_network_module": "networks.lora_kandinsky",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": str(first.alpha),
    }
