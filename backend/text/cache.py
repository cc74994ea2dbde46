"""Embeddings of prompts on disk: one safetensors file per prompt, whole or not there, and ignored when damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from backend.files import write_atomic
from backend.text.templates import PromptTemplate

_FORMAT = "k5-prompt-1"


@dataclass(frozen=True)
class PromptEmbeds:
    """What the transformer needs of one prompt.

    Attributes:
        text: [S, D] float32 or bfloat16 on the CPU, Qwen2.5-VL's last hidden states, prompt tokens and end token.
        pooled: [D2] float32 on the CPU, CLIP's pooled vector.
        warnings: sentences for people about this prompt, such as tokens that did not fit.
    """

    text: torch.Tensor
    pooled: torch.Tensor
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheKey:
    """Everything but the prompt that the embeddings depend on."""

    template: PromptTemplate
    max_length: int
    encoders: tuple[str, str]
    dtype: torch.dtype

    def digest(self, prompt: str) -> str:
        """64 hexadecimal digits that stand for `prompt` encoded in this way."""
        parts: Sequence[object] = (
            _FORMAT,
            hashlib.sha256(prompt.encode("utf-8")).hexdigest(),
            self.template.name,
            hashlib.sha256(self.template.text.encode("utf-8")).hexdigest(),
            self.max_length,
            self.encoders,
            str(self.dtype),
        )
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def cache_file(folder: Path, digest: str) -> Path:
    """The file of one prompt."""
    return folder / f"{digest}.safetensors"


def write_embeds(folder: Path, digest: str, embeds: PromptEmbeds) -> None:
    """Store the embeddings of one prompt.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    metadata = {"format": _FORMAT, "key": digest, "warnings": json.dumps(embeds.warnings)}
    tensors = {"text_embeds": embeds.text.contiguous(), "pooled_embed": embeds.pooled.contiguous()}
    write_atomic(cache_file(folder, digest), save(tensors, metadata))


def read_embeds(folder: Path, digest: str, dtype: torch.dtype) -> PromptEmbeds | None:
    """The stored embeddings of one prompt, or None when there are none or the file is damaged in any way."""
    path = cache_file(folder, digest)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("key") != digest:
                return None
            # Copies: the file may be rewritten while they are in use.
            text, pooled = handle.get_tensor("text_embeds").clone(), handle.get_tensor("pooled_embed").clone()
            warnings = json.loads(metadata.get("warnings", ""))
    except (SafetensorError, OSError, ValueError):
        return None
    shaped = text.ndim == 2 and pooled.ndim == 1 and text.numel() and pooled.numel()
    typed = text.dtype == dtype and pooled.dtype == torch.float32
    if not (shaped and typed and is_finite(text) and is_finite(pooled) and isinstance(warnings, list)):
        return None
    return PromptEmbeds(text, pooled, tuple(str(warning) for warning in warnings))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is a number."""
    return bool(torch.isfinite(tensor).all())
