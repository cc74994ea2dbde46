"""Runs the generate command inside the test's process and keeps everything that it said."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.events import read_events
from backend.kandinsky5_generate_video import main

TINY = ("--task", "k5-demo-t2v", "--steps", "2", "--frames", "5")


@dataclass(frozen=True)
class Run:
    """Exit code, journal and stderr of one command."""

    code: int
    events: list[dict[str, Any]]
    stderr: str
    folder: Path

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The journal's records of one type."""
        return [record for record in self.events if record["type"] == kind]

    def files(self) -> list[Path]:
        """The announced files, all of which must exist."""
        paths = [self.folder / record["path"] for record in self.of("sample")]
        assert all(path.is_file() for path in paths)
        return paths


def run_command(folder: Path, *words: str) -> Run:
    """`main` with `--run_dir folder` and the given words; embeddings are shared by all runs beside it."""
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        code = main([*words, "--run_dir", str(folder), "--text_cache_dir", str(folder.parent / "text")])
    records = [dict(record) for record in read_events(folder / "events.jsonl").records]
    return Run(code, records, stream.getvalue(), folder)
