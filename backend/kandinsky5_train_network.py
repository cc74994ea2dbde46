"""Train a LoRA: `python -m backend.kandinsky5_train_network --task ... --dit ... --dataset_config ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend.config.cache import CacheLatentsOptions, CacheTextOptions
from backend.config.train import TrainOptions
from backend.entry import run_entry
from backend.errors import Problems
from backend.progress import Reporter

ENTRY = "kandinsky5_train_network"
# Both name the same things; what only one of the caching commands knows is left at its default.
_SHARED = ("task", "dataset_config", "nabla_resize", "nabla_stretch", "device")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done or stopped, 2 a mistake in the request, 1 an engine fault."""
    return run_entry(TrainOptions, ENTRY, "Train a LoRA for a Kandinsky 5 model.", argv, _work)


def _work(options: TrainOptions, reporter: Reporter, run_dir: Path | None) -> list[str]:
    # Imported here, so that --help and mistakes are answered without waiting for torch.
    from backend.config.train_checks import check_train

    problems = check_train(options, run_dir)
    if problems:
        raise Problems(problems)
    if options.cache_missing and options.show_timesteps is None:
        _cache_missing(options, reporter, run_dir)
    from backend.training.trainer import train

    return train(options, reporter, run_dir)


def _cache_missing(options: TrainOptions, reporter: Reporter, run_dir: Path | None) -> None:
    """Cache what is missing or stale; of several processes each does its share, and the trainer waits for all."""
    from backend.caching.captions import cache_captions
    from backend.caching.latents import cache_latents

    text, latents = caching_options(options)
    reporter.phase("cache", "Caching captions that are missing or stale")
    cache_captions(text, reporter, run_dir)
    reporter.phase("cache", "Caching latents that are missing or stale")
    cache_latents(latents, reporter, run_dir)


def caching_options(options: TrainOptions) -> tuple[CacheTextOptions, CacheLatentsOptions]:
    """The options of both caching commands that `--cache_missing` means."""
    shared: dict[str, Any] = {name: getattr(options, name) for name in _SHARED}
    text = CacheTextOptions(
        **shared,
        skip_existing=True,
        text_encoder_qwen=options.text_encoder_qwen,
        text_encoder_clip=options.text_encoder_clip,
    )
    return text, CacheLatentsOptions(**shared, skip_existing=True, vae=options.vae)


if __name__ == "__main__":
    sys.exit(main())
