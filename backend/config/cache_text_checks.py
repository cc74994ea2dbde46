"""Everything that can be wrong with a request to cache captions, found before any encoder is loaded, without torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from backend.config.cache import CacheTextOptions
from backend.config.cache_checks import check_dataset_options, check_left_over
from backend.config.checks import check_weight
from backend.config.tasks import TASKS, default_weights
from backend.errors import Problem

# Option -> what its weights must be, and what to give.
_ENCODERS = {
    "text_encoder_qwen": ("text_encoder", "the folder of Qwen2.5-VL, or its hub name Qwen/Qwen2.5-VL-7B-Instruct"),
    "text_encoder_clip": ("clip", "the folder of CLIP, or its hub name openai/clip-vit-large-patch14"),
}


def check_cache_text(options: CacheTextOptions, run_dir: str | Path | None = None) -> list[Problem]:
    """Every problem of `options` and of the dataset that they name; an empty list means that caching can start.

    With `check` nothing is encoded and nothing is written, so encoders may be missing and folders read-only.
    """
    problems = [*check_dataset_options(options), *check_left_over(options)]
    defaults = default_weights(TASKS[options.task]) if options.task is not None else None
    for field, (kind, missing) in _ENCODERS.items():
        path = getattr(options, field) or getattr(defaults, field, None)
        if path is not None or not options.check:
            problems += check_weight(field, path, kind, missing)
    if options.quantized_qwen and not options.check and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            Problem(
                "quantized_qwen",
                "needs the library bitsandbytes, which is not installed. Install it (pip install bitsandbytes), or "
                "leave the switch out.",
            )
        )
    return list(dict.fromkeys(problems))
