"""The text side of a run: every prompt of its clips embedded once, and checked against the model's sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from backend.config.checkpoint import TransformerConfig
from backend.config.prompts import ClipRequest
from backend.config.tasks import WeightPaths
from backend.errors import UserError
from backend.progress import Reporter
from backend.text.cache import PromptEmbeds
from backend.text.embed import embed_prompts


def embed_clips(
    clips: Sequence[ClipRequest],
    paths: WeightPaths,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    cache_dir: str | None,
    reporter: Reporter,
) -> dict[str, PromptEmbeds]:
    """Embeddings (on the CPU) of every prompt of `clips`, negative prompts only where guidance uses them.

    Args:
        device: where the encoders run; they are freed afterwards.
        cache_dir: the option --text_cache_dir; None takes the user's cache folder.

    Raises:
        UserError: an encoder is missing, damaged or of another kind.
        EngineError: phase "text".
    """
    texts = [clip.prompt for clip in clips]
    texts += [clip.negative_prompt for clip in clips if abs(clip.guidance - 1.0) > 1e-6]
    texts = list(dict.fromkeys(texts))
    embedded = embed_prompts(
        texts,
        qwen=paths.text_encoder_qwen or "",
        clip=paths.text_encoder_clip or "",
        device=device,
        dtype=dtype,
        cache_dir=Path(cache_dir) if cache_dir is not None else Path.home() / ".cache" / "k5-studio" / "text",
        template="video",
        max_length=max_tokens,
        on_progress=lambda message, done, total: reporter.progress(done, total, "prompts", message),
        on_warning=lambda text: reporter.warning(UserError(text, "prompt").problems[0]),
    )
    return dict(zip(texts, embedded, strict=True))


def check_text_sizes(config: TransformerConfig, embeds: Mapping[str, PromptEmbeds]) -> None:
    """Refuse encoders of another family than the DiT's.

    Raises:
        UserError: one of them gives vectors of another size than the model was trained with.
    """
    sample = next(iter(embeds.values()))
    pairs = (
        ("text_encoder_qwen", sample.text.shape[-1], config.in_text_dim),
        ("text_encoder_clip", sample.pooled.shape[-1], config.in_text_dim2),
    )
    for name, found, expected in pairs:
        if found != expected:
            raise UserError(
                f"gives {found} numbers a token, but this DiT was trained with {expected}. Choose its own encoder.",
                name,
            )
