"""What a checkpoint is, from its header alone: kind, architecture, sizes, number format. No torch, no tensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from backend.config.lora_methods import other_method, refusal
from backend.config.safetensors_header import Header, TensorInfo, read_header
from backend.errors import UserError

__all__ = [
    "KNOWN_ARCHITECTURES",
    "CheckpointInfo",
    "Header",
    "TensorInfo",
    "TransformerConfig",
    "compare_with_task",
    "identify",
    "read_header",
]

Kind = Literal["dit", "vae", "text_encoder", "clip", "lora", "unknown"]
DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.")
_VAE_PREFIXES = ("", "vae.", "first_stage_model.")
_LORA_MARKS = (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.")
_SHORT_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
_AXES_OF_HEAD = {64: (16, 24, 24), 128: (32, 48, 48)}
_DIFFUSERS_CLASS = "Kandinsky5Transformer3DModel"
# Sizes that the tensors show; the two others (axes_dims, patch_size) are only in a config.json.
_SHAPE_FIELDS = (
    "in_visual_dim",
    "out_visual_dim",
    "in_text_dim",
    "in_text_dim2",
    "time_dim",
    "model_dim",
    "ff_dim",
    "num_text_blocks",
    "num_visual_blocks",
    "visual_cond",
)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Kandinsky 5 DiT; the names are those of the diffusers config.json."""

    in_visual_dim: int = 16
    out_visual_dim: int = 16
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    time_dim: int = 1024
    model_dim: int = 4096
    ff_dim: int = 16384
    num_text_blocks: int = 4
    num_visual_blocks: int = 60
    patch_size: tuple[int, int, int] = (1, 2, 2)
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    visual_cond: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head: the rotary axes together."""
        return sum(self.axes_dims)

    @property
    def num_heads(self) -> int:
        """Attention heads of every block."""
        return self.model_dim // self.head_dim

    @property
    def in_channels(self) -> int:
        """Channels of the input: latent, and for conditioned models the condition's latent and the mask."""
        return 2 * self.in_visual_dim + 1 if self.visual_cond else self.in_visual_dim

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the official state dict with its shape (18 + 14 a text block + 24 a visual block)."""
        width, time, patch = self.model_dim, self.time_dim, math.prod(self.patch_size)
        tensors: dict[str, tuple[int, ...]] = {}
        _add_linear(tensors, "time_embeddings.in_layer", time, width)
        _add_linear(tensors, "time_embeddings.out_layer", time, time)
        for name, columns, rows in (
            ("text_embeddings", self.in_text_dim, width),
            ("pooled_text_embeddings", self.in_text_dim2, time),
        ):
            _add_linear(tensors, f"{name}.in_layer", rows, columns)
            tensors[f"{name}.norm.weight"] = tensors[f"{name}.norm.bias"] = (rows,)
        _add_linear(tensors, "visual_embeddings.in_layer", width, patch * self.in_channels)
        for index in range(self.num_text_blocks):
            self._add_block(tensors, f"text_transformer_blocks.{index}", "text", ("self_attention",))
        for index in range(self.num_visual_blocks):
            attentions = ("self_attention", "cross_attention")
            self._add_block(tensors, f"visual_transformer_blocks.{index}", "visual", attentions)
        _add_linear(tensors, "out_layer.modulation.out_layer", 2 * width, time)
        _add_linear(tensors, "out_layer.out_layer", patch * self.out_visual_dim, width)
        return tensors

    def _add_block(
        self, tensors: dict[str, tuple[int, ...]], block: str, stream: str, attentions: tuple[str, ...]
    ) -> None:
        width = self.model_dim
        rows = 3 * (len(attentions) + 1) * width
        _add_linear(tensors, f"{block}.{stream}_modulation.out_layer", rows, self.time_dim)
        for attention in attentions:
            for layer in ("to_query", "to_key", "to_value", "out_layer"):
                _add_linear(tensors, f"{block}.{attention}.{layer}", width, width)
            for norm in ("query_norm", "key_norm"):
                tensors[f"{block}.{attention}.{norm}.weight"] = (self.head_dim,)
        tensors[f"{block}.feed_forward.in_layer.weight"] = (self.ff_dim, width)
        tensors[f"{block}.feed_forward.out_layer.weight"] = (width, self.ff_dim)


def _add_linear(tensors: dict[str, tuple[int, ...]], name: str, rows: int, columns: int) -> None:
    tensors[f"{name}.weight"] = (rows, columns)
    tensors[f"{name}.bias"] = (rows,)


KNOWN_ARCHITECTURES: dict[str, TransformerConfig] = {
    "pro": TransformerConfig(),
    "lite": TransformerConfig(
        time_dim=512, model_dim=1792, ff_dim=7168, num_text_blocks=2, num_visual_blocks=32, axes_dims=(16, 24, 24)
    ),
    "image_lite": TransformerConfig(
        time_dim=512, model_dim=2560, ff_dim=10240, num_text_blocks=2, num_visual_blocks=50, visual_cond=False
    ),
    "image_lite_edit": TransformerConfig(
        time_dim=512, model_dim=2560, ff_dim=10240, num_text_blocks=2, num_visual_blocks=50
    ),
    "demo": TransformerConfig(
        in_text_dim=128,
        in_text_dim2=64,
        time_dim=64,
        model_dim=192,
        ff_dim=512,
        num_text_blocks=2,
        num_visual_blocks=5,
        axes_dims=(16, 24, 24),
    ),
}
_TITLES = {
    "pro": "Kandinsky 5 Pro DiT",
    "lite": "Kandinsky 5 Lite DiT",
    "image_lite": "Kandinsky 5 Image Lite DiT (images only)",
    "image_lite_edit": "Kandinsky 5 Image Lite DiT for editing (images only)",
    "demo": "Kandinsky 5 demo DiT",
    "custom": "Kandinsky 5 DiT of another size",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    `key_map` leads from the official name of a tensor to its name in the files (DiT only; equal without a prefix).
    `layout` names the naming scheme where there are several. `unsupported` is a sentence when the kind is recognised
    but cannot be loaded.
    """

    kind: Kind
    architecture: str | None
    config: TransformerConfig | None
    parameters: int
    dtype: str
    prefix: str
    summary: str
    header: Header
    layout: str = ""
    unsupported: str | None = None
    key_map: dict[str, str] = field(default_factory=dict)


def identify(path: str | Path) -> CheckpointInfo:
    """Say what the checkpoint at `path` (file, sharded folder or diffusers folder) is, from its header alone.

    Raises:
        UserError: `read_header`'s reasons; a DiT whose tensors contradict each other or the config.json beside them.
    """
    header = read_header(path)
    names = header.tensors
    prefix = _dit_prefix(names)
    if prefix is not None:
        return _identify_dit(header, prefix)
    kind, layout, title = _other_kind(names)
    parameters = sum(info.elements for info in names.values())
    dtype = _main_dtype(names.values())
    summary = f"{title}, {_amount(parameters)} parameters, {dtype}"
    other = other_method(names) if kind in ("lora", "unknown") else None
    if other is not None:
        kind, summary = "lora", f"{other[0]}, {_amount(parameters)} parameters, {dtype}"
    unsupported = f"{header.paths[0].name} is {refusal(*other)}" if other is not None else None
    return CheckpointInfo(kind, None, None, parameters, dtype, "", summary, header, layout, unsupported)


def compare_with_task(info: CheckpointInfo, task_config: TransformerConfig) -> list[str]:
    """Rows of a table `what: expected, found` for everything in which the checkpoint does not fit the task."""
    if info.kind != "dit":
        return [f"kind: expected a Kandinsky 5 DiT, found {info.summary}"]
    if info.config is None:
        return [info.unsupported or f"sizes: expected a Kandinsky 5 DiT, found {info.summary}"]
    rows = []
    for item in fields(TransformerConfig):
        expected, found = getattr(task_config, item.name), getattr(info.config, item.name)
        if expected != found:
            rows.append(f"{item.name}: expected {expected}, found {found}")
    if rows:
        expected_name = _architecture_of(task_config)
        rows.insert(0, f"model: expected {_TITLES[expected_name]}, found {_TITLES[info.architecture or 'custom']}")
    return rows


def _dit_prefix(names: Mapping[str, TensorInfo]) -> str | None:
    """The prefix before the DiT's official names, "" without one, None when this is no DiT."""
    ending = "visual_embeddings.in_layer.weight"
    for name in names:
        if not name.endswith(ending):
            continue
        prefix = rest = name[: -len(ending)]
        while rest:
            known = next((item for item in DIT_PREFIXES if rest.startswith(item)), None)
            if known is None:
                break
            rest = rest[len(known) :]
        if not rest and f"{prefix}time_embeddings.in_layer.weight" in names:
            return prefix
    return None


def _identify_dit(header: Header, prefix: str) -> CheckpointInfo:
    key_map = {name[len(prefix) :]: name for name in header.tensors if name.startswith(prefix)}
    tensors = {official: header.tensors[name] for official, name in key_map.items()}
    parameters = sum(info.elements for name, info in tensors.items() if not name.endswith("scale_weight"))
    dtype = _main_dtype(tensors.values())
    title, architecture, config = _TITLES["custom"], "custom", None
    unsupported = _quantised_reason(tensors)
    if unsupported is None:
        config, unsupported = _dit_config(tensors, _config_beside(header.paths[0]), header.paths[0])
    if config is not None:
        architecture = _architecture_of(config)
        title = _TITLES[architecture]
    channels = f", {config.in_channels} input channels" if config else ""
    repack = ", fp8 repack" if unsupported and "fp8" in unsupported else ""
    summary = f"{title}, {_amount(parameters)} parameters, {dtype}{channels}{repack}"
    layout = "diffusers" if header.paths[0].name.startswith("diffusion_pytorch_model") else "official"
    return CheckpointInfo(
        "dit", architecture, config, parameters, dtype, prefix, summary, header, layout, unsupported, key_map
    )


def _quantised_reason(tensors: Mapping[str, TensorInfo]) -> str | None:
    scaled = any(name.endswith("scale_weight") or name == "scaled_fp8" for name in tensors)
    if scaled or any(info.dtype.startswith("F8_") for info in tensors.values()):
        return (
            "This DiT is an fp8 repack (weights with *.scale_weight or in an fp8 format), which this version does not "
            "load yet. Use the bf16 checkpoint of the same model."
        )
    return None


def _dit_config(
    tensors: Mapping[str, TensorInfo], beside: dict[str, Any] | None, file: Path
) -> tuple[TransformerConfig | None, str | None]:
    """Sizes from shapes and, for what shapes do not show, from config.json; (None, reason) when that is not enough."""
    patch = _triple(beside, "patch_size", file) or (1, 2, 2)
    width, columns = _matrix(tensors, "visual_embeddings.in_layer.weight", file)
    out_rows = _matrix(tensors, "out_layer.out_layer.weight", file)[0]
    volume = math.prod(patch)
    if columns % volume or out_rows % volume:
        return (
            None,
            f"The DiT in {file} has a patch embedding of {columns} columns, which no patch of {patch} explains.",
        )
    channels, out_channels = columns // volume, out_rows // volume
    if channels not in (out_channels, 2 * out_channels + 1):
        return (
            None,
            f"The DiT in {file} has {channels} input channels for {out_channels} output channels; unknown layout.",
        )
    blocks = {stream: _block_count(tensors, stream, file) for stream in ("text", "visual")}
    head = _vector(tensors, "visual_transformer_blocks.0.self_attention.query_norm.weight", file)
    axes = _triple(beside, "axes_dims", file) or _AXES_OF_HEAD.get(head)
    if axes is None:
        return (
            None,
            f"The DiT in {file} has heads of {head}, whose rotary axes only a config.json beside it could tell.",
        )
    config = TransformerConfig(
        in_visual_dim=out_channels,
        out_visual_dim=out_channels,
        in_text_dim=_matrix(tensors, "text_embeddings.in_layer.weight", file)[1],
        in_text_dim2=_matrix(tensors, "pooled_text_embeddings.in_layer.weight", file)[1],
        time_dim=_matrix(tensors, "time_embeddings.in_layer.weight", file)[0],
        model_dim=width,
        ff_dim=_matrix(tensors, "visual_transformer_blocks.0.feed_forward.in_layer.weight", file)[0],
        num_text_blocks=blocks["text"],
        num_visual_blocks=blocks["visual"],
        patch_size=patch,
        axes_dims=axes,
        visual_cond=channels != out_channels,
    )
    _check_agreement(config, head, beside, file)
    return config, None


def _check_agreement(config: TransformerConfig, head: int, beside: dict[str, Any] | None, file: Path) -> None:
    problems = []
    if config.head_dim != head or any(axis % 2 or axis <= 0 for axis in config.axes_dims):
        problems.append(f"axes_dims {list(config.axes_dims)} do not make heads of {head}")
    if head <= 0 or config.model_dim % head or config.model_dim % 2:
        problems.append(f"a width of {config.model_dim} does not divide into heads of {head}")
    for name in _SHAPE_FIELDS:
        if beside is not None and name in beside and beside[name] != getattr(config, name):
            problems.append(f"{name} is {beside[name]} in config.json and {getattr(config, name)} in the weights")
    if problems:
        raise UserError(f"{file} contradicts its configuration: {'; '.join(problems)}. Download the folder again.")


def _config_beside(file: Path) -> dict[str, Any] | None:
    """The config.json of a diffusers folder; only files with diffusers' own name belong to the config beside them."""
    config = file.parent / "config.json"
    if not file.name.startswith("diffusion_pytorch_model") or not config.is_file():
        return None
    try:
        if config.stat().st_size > 1_000_000:
            raise ValueError("too long")
        parsed = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config} is not a readable configuration ({error}). Download it again.") from error
    if not isinstance(parsed, dict) or parsed.get("_class_name") != _DIFFUSERS_CLASS:
        raise UserError(
            f"{config} does not belong to a Kandinsky 5 DiT, but the weights beside it do. Download it again."
        )
    return parsed


def _triple(beside: dict[str, Any] | None, name: str, file: Path) -> tuple[int, int, int] | None:
    value = (beside or {}).get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(type(item) is int and item > 0 for item in value):
        raise UserError(
            f"The config.json beside {file} has a {name} that is not three whole numbers. Download it again."
        )
    return (value[0], value[1], value[2])


def _shape(tensors: Mapping[str, TensorInfo], name: str, rank: int, file: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"{file} is an incomplete Kandinsky 5 DiT: {name} is missing. Download it again.")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(f"{file} has a {name} of shape {list(shape)}, which no Kandinsky 5 DiT has. Download it again.")
    return shape


def _matrix(tensors: Mapping[str, TensorInfo], name: str, file: Path) -> tuple[int, int]:
    rows, columns = _shape(tensors, name, 2, file)
    return rows, columns


def _vector(tensors: Mapping[str, TensorInfo], name: str, file: Path) -> int:
    return _shape(tensors, name, 1, file)[0]


def _block_count(tensors: Mapping[str, TensorInfo], stream: str, file: Path) -> int:
    pattern = re.compile(rf"{stream}_transformer_blocks\.(\d{{1,6}})\.")
    found = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    if not found or max(found) + 1 != len(found):
        raise UserError(
            f"{file} is an incomplete Kandinsky 5 DiT: some {stream} blocks are missing. Download it again."
        )
    return len(found)


def _architecture_of(config: TransformerConfig) -> str:
    return next((name for name, known in KNOWN_ARCHITECTURES.items() if known == config), "custom")


def _other_kind(names: Mapping[str, TensorInfo]) -> tuple[Kind, str, str]:
    """Kind, naming scheme and title of a checkpoint that is no DiT."""
    if any(mark in name for name in names for mark in _LORA_MARKS):
        return "lora", *_lora_layout(names)
    for prefix in _VAE_PREFIXES:
        if f"{prefix}decoder.conv_in.conv.weight" in names:
            diffusers = any(name.startswith(f"{prefix}decoder.up_blocks.") for name in names)
            layout = "diffusers" if diffusers else "original"
            return "vae", layout, f"HunyuanVideo VAE with {layout} names"
        if f"{prefix}decoder.conv_in.weight" in names:
            return "vae", "image", "image VAE (not the HunyuanVideo one that Kandinsky 5 video needs)"
    if any(name.endswith("layers.0.self_attn.q_proj.weight") and "encoder" not in name for name in names):
        vision = any(name.startswith(("visual.", "model.visual.")) for name in names)
        return "text_encoder", "vision" if vision else "text", "Qwen text encoder"
    if any(name.endswith("embeddings.position_embedding.weight") for name in names):
        return "clip", "transformers", "CLIP text encoder"
    return "unknown", "", "unknown checkpoint"


def _lora_layout(names: Mapping[str, TensorInfo]) -> tuple[str, str]:
    first = next(name for name in names if any(mark in name for mark in _LORA_MARKS))
    if first.startswith("lora_unet_"):
        return "kohya", "LoRA with kohya names"
    if first.startswith("diffusion_model."):
        return "comfyui", "LoRA with ComfyUI names"
    return "peft", "LoRA with PEFT names"


def _main_dtype(tensors: Any) -> str:
    amounts: Counter[str] = Counter()
    for info in tensors:
        amounts[info.dtype] += info.elements
    if not amounts:
        return "unknown"
    name = amounts.most_common(1)[0][0]
    return _SHORT_DTYPES.get(name, name.lower())


def _amount(parameters: int) -> str:
    if parameters >= 1_000_000_000:
        return f"{parameters / 1e9:.2f} B"
    return f"{parameters / 1e6:.2f} M"
