"""What a run tells the world: journal records for the page, short lines for a terminal, and requests to stop."""

from __future__ import annotations

import sys
import threading
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
_RECORD_SECONDS = 0.2
_ITEM_WINDOW_SECONDS = 30.0
_ITEM_WINDOW_RECORDS = 256
_SHOWN_ITEM = 40


class Reporter:
    """Reports phases, steps, files and warnings of one run; paths inside the run folder are written relative to it.

    `label` stands before every line on the terminal: which of several processes speaks.
    """

    def __init__(
        self, journal: EventSink, run_dir: Path | None = None, stream: TextIO | None = None, label: str = ""
    ) -> None:
        self.journal = journal
        self.run_dir = run_dir
        self.phase_name = "load"
        self.outputs: list[str] = []
        self._stream = stream if stream is not None else sys.stderr
        self._prefix = f"[{label}] " if label else ""
        self._answered: set[str] = set()

    def phase(self, name: str, message: str) -> None:
        """Enter a phase: load, scan, text, vae, denoise, decode or save."""
        self.phase_name = name
        self.journal.emit("phase", phase=name, message=message)
        self.say(message)

    def progress(self, done: int, total: int, unit: str, message: str = "") -> None:
        """Say how far the current phase is, in items of `unit`."""
        self.journal.emit("progress", phase=self.phase_name, done=done, total=total, unit=unit, message=message)

    def warning(self, problem: Problem) -> None:
        """Say something that a person should know, but that does not end the run."""
        self.journal.emit("warning", message=problem.message, field=problem.field)
        self.say(f"Note: {problem}")

    def sample(self, path: Path, kind: str, **fields: Any) -> None:
        """Announce a file that is whole under its final name."""
        shown = self._shown(path)
        self.outputs.append(shown)
        self.journal.emit("sample", path=shown, kind=kind, **fields)
        self.say(f"Written: {path}")

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

    def item_meter(self, total: int, unit: str) -> ItemMeter:
        """A meter over `total` items of the current phase, named by `unit` ("clips", "captions")."""
        return ItemMeter(self, total, unit)

    def say(self, text: str) -> None:
        """Print a line for people; the journal does not get it."""
        print(f"{self._prefix}{text}", file=self._stream, flush=True)

    def line(self, text: str, end: bool = False) -> None:
        """Show a line that replaces itself on a terminal; in a log file only the last one (`end`) is kept."""
        text = self._prefix + text
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


class ItemMeter:
    """Counts items of one phase; says how fast they are done and how long the rest will take.

    At most five records a second reach the journal, so that the caching of very many small items does not fill it; the
    first and the last item are always recorded. The rate is that of the last half minute. Several threads may use it.
    """

    def __init__(self, reporter: Reporter, total: int, unit: str) -> None:
        self._reporter = reporter
        self._total = total
        self._unit = unit
        self._done = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=_ITEM_WINDOW_RECORDS)
        self._marks.append((time.perf_counter(), 0))
        self._recorded = float("-inf")
        self._guard = threading.Lock()

    def done(self, count: int = 1, item: str = "", dataset: int | None = None) -> None:
        """Record that `count` more items are done.

        Args:
            item: name of the item at work, for people.
            dataset: number of its dataset in the configuration, from 0.
        """
        with self._guard:
            self._add(count, item, dataset)

    def _add(self, count: int, item: str, dataset: int | None) -> None:
        now = time.perf_counter()
        self._done += count
        last = self._done >= self._total
        if now - self._recorded < _RECORD_SECONDS and not last:
            return
        self._recorded = now
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and now - self._marks[0][0] > _ITEM_WINDOW_SECONDS:
            self._marks.popleft()
        fields: dict[str, Any] = {"item": item} if item else {}
        if dataset is not None:
            fields["dataset"] = dataset
        rate, remaining = self._forecast(now)
        if rate is not None:
            fields |= {"rate": round(rate, 4), "remaining_seconds": round(remaining, 1)}
        self._reporter.journal.emit(
            "progress",
            phase=self._reporter.phase_name,
            done=self._done,
            total=self._total,
            unit=self._unit,
            message=f"{self._done} of {self._total} {self._unit}",
            **fields,
        )
        self._reporter.line(self._text(item, rate, remaining), end=last)

    def _forecast(self, now: float) -> tuple[float | None, float]:
        """Items per second over the window (None: unknown) and seconds for the rest."""
        began, before = self._marks[0]
        if now <= began or self._done <= before:
            return None, 0.0
        rate = (self._done - before) / (now - began)
        return rate, max(self._total - self._done, 0) / rate

    def _text(self, item: str, rate: float | None, remaining: float) -> str:
        text = f"{self._done}/{self._total} {self._unit}"
        if rate is not None:
            text += f", {rate:.2f}/s, {remaining:.0f} s left"
        return f"{text}, {item[:_SHOWN_ITEM]}" if item else text
