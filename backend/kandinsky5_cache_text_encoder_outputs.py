"""Cache captions: `python -m backend.kandinsky5_cache_text_encoder_outputs --dataset_config ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from backend.config.cache import CacheTextOptions
from backend.entry import run_entry
from backend.progress import Reporter

ENTRY = "kandinsky5_cache_text_encoder_outputs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done or stopped, 2 a mistake in the request, 1 an engine fault."""
    return run_entry(CacheTextOptions, ENTRY, "Cache the encoded captions of a dataset for Kandinsky 5.", argv, _work)


def _work(options: CacheTextOptions, reporter: Reporter, run_dir: Path | None) -> list[str]:
    # Imported here, so that --help and mistakes are answered without waiting for torch.
    from backend.caching.captions import cache_captions

    return cache_captions(options, reporter, run_dir)


if __name__ == "__main__":
    sys.exit(main())
