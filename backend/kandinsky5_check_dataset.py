"""Look a dataset over before training: `python -m backend.kandinsky5_check_dataset --dataset_config ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from backend.config.cache import CheckDatasetOptions
from backend.entry import run_entry
from backend.progress import Reporter

ENTRY = "kandinsky5_check_dataset"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done or stopped, 2 a mistake in the request, 1 an engine fault."""
    return run_entry(CheckDatasetOptions, ENTRY, "Look for what is wrong with a dataset.", argv, _work)


def _work(options: CheckDatasetOptions, reporter: Reporter, run_dir: Path | None) -> list[str]:
    # Imported here, so that --help and mistakes are answered without waiting for torch.
    from backend.caching.findings import report_findings

    return report_findings(options, reporter, run_dir)


if __name__ == "__main__":
    sys.exit(main())
