"""Prompts to embeddings: from the disk cache if they are there, else by encoders that are loaded once and freed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from backend.errors import EngineError, UserError
from backend.model.device import empty_cache
from backend.text.cache import CacheKey, PromptEmbeds, is_finite, read_embeds, write_embeds
from backend.text.locate import CLIP, QWEN, EncoderFiles, EncoderKind, locate_encoder
from backend.text.templates import PromptTemplate, get_template

Progress = Callable[[str, int, int], None]

__all__ = ["PromptEmbeds", "embed_prompts"]


def embed_prompts(
    prompts: Sequence[str],
    *,
    qwen: str | Path,
    clip: str | Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    cache_dir: Path | None = None,
    template: str = "video",
    max_length: int | None = None,
    on_progress: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> list[PromptEmbeds]:
    """Encode `prompts` as Kandinsky 5 was trained: Qwen2.5-VL in the chat template, CLIP on the raw text.

    Prompts are not cleaned. `dtype` (float32 or bfloat16) holds for Qwen2.5-VL's weights, arithmetic and result; CLIP
    always runs in float32. `max_length` counts the tokens after the template's beginning, end token included (None:
    256 for "video", 512 for "image"). Equal prompts are encoded once. When every prompt is in `cache_dir`, no encoder
    is loaded. Each finished prompt is in the cache at once, so a stopped run goes on where it was.

    Args:
        prompts: any texts, the empty one included.
        qwen: folder or hub name of Qwen2.5-VL.
        clip: folder or hub name of CLIP.
        device: where the encoders run; the results are on the CPU.
        dtype: number format of Qwen2.5-VL.
        cache_dir: folder of the disk cache, created when missing; None: no cache.
        template: "video" (image-to-video too) or "image".
        max_length: largest number of tokens per prompt.
        on_progress: called with a message, the prompts done and the prompts to do.
        on_warning: called with each different sentence about prompts that were cut and about an unusual tokenizer.

    Returns:
        One PromptEmbeds per prompt, in order.

    Raises:
        UserError: an encoder is missing, damaged or of another kind; its field is the option's name.
        EngineError: phase "text"; the encoder gave values that are not numbers, or memory ran out.
    """
    chosen = get_template(template)
    limit = max_length or chosen.max_length
    _check_requests(prompts, limit, dtype)
    qwen_files, clip_files = locate_encoder(qwen, QWEN), locate_encoder(clip, CLIP)
    key = CacheKey(chosen, limit, (qwen_files.fingerprint, clip_files.fingerprint), dtype)
    distinct = list(dict.fromkeys(prompts))
    done = _read_all(distinct, cache_dir, key) if cache_dir else {}
    missing = [prompt for prompt in distinct if prompt not in done]
    if missing:
        report = on_progress or (lambda message, count, total: None)
        # CLIP first: it is small, so that the long part can store each prompt as soon as it is encoded.
        pooled = _encode_clip(missing, clip_files, device, report)
        for prompt, embeds in _encode_qwen(missing, pooled, qwen_files, key, device, report):
            done[prompt] = embeds
            if cache_dir:
                write_embeds(cache_dir, key.digest(prompt), embeds)
    if on_warning:
        for warning in dict.fromkeys(warning for prompt in distinct for warning in done[prompt].warnings):
            on_warning(warning)
    return [done[prompt] for prompt in prompts]


def _read_all(prompts: Sequence[str], folder: Path, key: CacheKey) -> dict[str, PromptEmbeds]:
    """The prompts that are whole in the cache."""
    stored = ((prompt, read_embeds(folder, key.digest(prompt), key.dtype)) for prompt in prompts)
    return {prompt: embeds for prompt, embeds in stored if embeds is not None}


def _check_requests(prompts: Sequence[str], limit: int, dtype: torch.dtype) -> None:
    if limit < 2:
        raise ValueError(f"max_length must be at least 2 (one token and the end token), not {limit}.")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"The text encoder runs in float32 or bfloat16, not {dtype}.")
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"The prompt {prompt[:60]!r} has a broken character at position {error.start + 1}. Type it again.",
                "prompt",
            ) from error


def _encode_clip(
    prompts: Sequence[str], files: EncoderFiles, device: torch.device, report: Progress
) -> dict[str, PromptEmbeds]:
    """Pooled vectors with CLIP's warnings; their text part is still empty."""
    from backend.text.encoders import CLIP_TOKENS, ClipEncoder

    results: dict[str, PromptEmbeds] = {}
    with memory_of(CLIP, device):
        report("Loading CLIP", 0, len(prompts))
        encoder = ClipEncoder(files, device=device)
        for count, prompt in enumerate(prompts, 1):
            warnings: tuple[str, ...] = ()
            if removed := encoder.removed(prompt):
                warnings = (
                    f"CLIP reads only {CLIP_TOKENS} tokens; {removed} at the end of the prompt {short(prompt)} "
                    "do not reach it. Qwen2.5-VL reads on.",
                )
            pooled = require_numbers(encoder.encode(prompt), CLIP, prompt)
            results[prompt] = PromptEmbeds(torch.empty(0), pooled, warnings)
            report("Encoding prompts with CLIP", count, len(prompts))
        del encoder
    return results


def _encode_qwen(
    prompts: Sequence[str],
    pooled: dict[str, PromptEmbeds],
    files: EncoderFiles,
    key: CacheKey,
    device: torch.device,
    report: Progress,
) -> Iterator[tuple[str, PromptEmbeds]]:
    from backend.text.encoders import QwenEncoder

    with memory_of(QWEN, device):
        report("Loading Qwen2.5-VL", 0, len(prompts))
        encoder = QwenEncoder(files, key.template, device=device, dtype=key.dtype)
        for count, prompt in enumerate(prompts, 1):
            tokens = encoder.tokenise(prompt, key.max_length)
            # One at a time: the stored result must not depend on which prompts happened to be encoded with it.
            text = require_numbers(next(encoder.encode([tokens])), QWEN, prompt)
            warnings = [*encoder.warnings, *pooled[prompt].warnings]
            if tokens.removed:
                warnings.append(_cut_warning(prompt, tokens.kept, tokens.removed, key.template))
            yield prompt, PromptEmbeds(text, pooled[prompt].pooled, tuple(warnings))
            report("Encoding prompts with Qwen2.5-VL", count, len(prompts))
        del encoder


def _cut_warning(prompt: str, kept: int, removed: int, template: PromptTemplate) -> str:
    return (
        f"The prompt {short(prompt)} has {kept + removed} tokens; only the first {kept} fit into the "
        f"{template.name} template. Shorten it, or the rest has no effect."
    )


def short(prompt: str) -> str:
    """The beginning of a prompt in quotes, for messages."""
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")


def require_numbers(tensor: torch.Tensor, kind: EncoderKind, prompt: str) -> torch.Tensor:
    """`tensor`, which `kind` made of `prompt`.

    Raises:
        EngineError: phase "text"; it holds values that are not numbers.
    """
    if not is_finite(tensor):
        raise EngineError(
            f"{kind.label} gave values that are not numbers for the prompt {short(prompt)}. Its weights are probably "
            "damaged; get them again.",
            "text",
        )
    return tensor


@contextmanager
def memory_of(kind: EncoderKind, device: torch.device) -> Iterator[None]:
    """Give back the memory of the encoder that the block has used, and name the encoder when memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"{kind.label} does not fit into the memory of {device}. Free memory there, or encode on the CPU.", "text"
        ) from error
    finally:
        gc.collect()
        empty_cache(device)
