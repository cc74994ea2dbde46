"""Generate video with Kandinsky 5: `python -m backend.kandinsky5_generate_video --task k5-demo-t2v --prompt ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from backend.config.checks import check_generate
from backend.config.generate import GenerateOptions
from backend.entry import run_entry
from backend.errors import Problems
from backend.progress import Reporter

ENTRY = "kandinsky5_generate_video"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done or stopped, 2 a mistake in the request, 1 an engine fault."""
    return run_entry(GenerateOptions, ENTRY, "Generate video with Kandinsky 5.", argv, _generate)


def _generate(options: GenerateOptions, reporter: Reporter, run_dir: Path | None) -> list[str]:
    if problems := check_generate(options, run_dir):
        raise Problems(problems)
    # Imported here, so that --help and mistakes are answered without waiting for torch.
    from backend.sampling.generate import generate

    return generate(options, reporter, run_dir)


if __name__ == "__main__":
    sys.exit(main())
