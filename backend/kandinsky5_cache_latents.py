"""Cache latents of a dataset: `python -m backend.kandinsky5_cache_latents --dataset_config ... --vae ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from backend.config.cache import CacheLatentsOptions
from backend.entry import run_entry
from backend.progress import Reporter

ENTRY = "kandinsky5_cache_latents"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done or stopped, 2 a mistake in the request, 1 an engine fault."""
    return run_entry(CacheLatentsOptions, ENTRY, "Cache the latents of a dataset for Kandinsky 5.", argv, _work)


def _work(options: CacheLatentsOptions, reporter: Reporter, run_dir: Path | None) -> list[str]:
    # Imported here, so that --help and mistakes are answered without waiting for torch.
    from backend.caching.latents import cache_latents

    return cache_latents(options, reporter, run_dir)


if __name__ == "__main__":
    sys.exit(main())
