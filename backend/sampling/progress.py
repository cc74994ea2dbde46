"""What a run tells the world: journal records for the page, short lines for a terminal, and requests to stop."""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, Literal, TextIO

from backend.errors import Problem
from backend.events import EventSink

StopRequest = Literal["stop", "stop_and_save"]
_REQUESTS: tuple[StopRequest, ...] = ("stop", "stop_and_save")
_RATE_WINDOW = 20


class Reporter:
    """Reports phases, steps, files and warnings of one run; paths inside the run folder are written relative to it."""

    def __init__(self, journal: EventSink, run_dir: Path | None = None, stream: TextIO | None = None) -> None:
        self.journal = journal
        self.run_dir = run_dir
        self.phase_name = "load"
        self.outputs: list[str] = []
        self._stream = stream if stream is not None else sys.stderr
        self._answered: set[str] = set()

    def phase(self, name: str, message: str) -> None:
        """Enter a phase: load, text, vae, denoise, decode or save."""
        self.phase_name = name
        self.journal.emit("phase", phase=name, message=message)
        print(message, file=self._stream, flush=True)

    def progress(self, done: int, total: int, unit: str, message: str = "") -> None:
        """Say how far the current phase is, in items of `unit`."""
        self.journal.emit("progress", phase=self.phase_name, done=done, total=total, unit=unit, message=message)

    def warning(self, problem: Problem) -> None:
        """Say something that a person should know, but that does not end the run."""
        self.journal.emit("warning", message=problem.message, field=problem.field)
        print(f"Note: {problem}", file=self._stream, flush=True)

    def sample(self, path: Path, kind: str, **fields: Any) -> None:
        """Announce a file that is whole under its final name."""
        shown = self._shown(path)
        self.outputs.append(shown)
        self.journal.emit("sample", path=shown, kind=kind, **fields)
        print(f"Written: {path}", file=self._stream, flush=True)

    def _shown(self, path: Path) -> str:
        absolute = path.absolute()
        if self.run_dir is not None and absolute.is_relative_to(self.run_dir.absolute()):
            return absolute.relative_to(self.run_dir.absolute()).as_posix()
        return str(absolute)

    def requested(self) -> StopRequest | None:
        """The request that the app has left in the run folder, if any; each is answered once in the journal."""
        if self.run_dir is None:
            return None
        for name in _REQUESTS:
            if (self.run_dir / "requests" / name).exists():
                if name not in self._answered:
                    self._answered.add(name)
                    self.journal.emit("request_done", request=name)
                return name
        return None

    def step_meter(self, items: int, total_steps: int) -> StepMeter:
        """A meter over all denoising steps of the run."""
        return StepMeter(self, items, total_steps)

    def line(self, text: str, end: bool = False) -> None:
        """Show a line that replaces itself on a terminal; in a log file only the last one (`end`) is kept."""
        if self._stream.isatty():
            print(f"\r{text:<78}", end="\n" if end else "", file=self._stream, flush=True)
        elif end:
            print(text, file=self._stream, flush=True)


class StepMeter:
    """Counts denoising steps over all clips and forecasts the rest from the median of the last twenty."""

    def __init__(self, reporter: Reporter, items: int, total_steps: int) -> None:
        self._reporter = reporter
        self._items = items
        self._total = total_steps
        self._done = 0
        self._times: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._last = time.perf_counter()

    def begin_clip(self) -> None:
        """Start the clock; what happened since the last step (decoding, saving) is no step."""
        self._last = time.perf_counter()

    def step(self, item: int, step: int, steps: int) -> None:
        """Record that `step` of `steps` of clip `item` (both from 1) is done."""
        now = time.perf_counter()
        self._times.append(now - self._last)
        self._last = now
        self._done += 1
        rate = median(self._times)
        remaining = rate * max(self._total - self._done, 0)
        self._reporter.journal.emit(
            "step",
            step=step,
            total=steps,
            item=item,
            items=self._items,
            seconds_per_step=round(rate, 4),
            remaining_seconds=round(remaining, 2),
        )
        clip = f"clip {item}/{self._items}, " if self._items > 1 else ""
        text = f"{clip}step {step}/{steps}, {rate:.2f} s/step, {remaining:.0f} s left"
        self._reporter.line(text, end=step == steps)
