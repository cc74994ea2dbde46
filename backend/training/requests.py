"""What a training run is asked for while it works: files in its run folder, and the signals that mean 'end now'."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, cast

from backend.progress import Reporter

RequestName = Literal["stop", "stop_and_save", "stop_after_epoch", "save", "sample"]
STOPS: tuple[RequestName, ...] = ("stop", "stop_and_save", "stop_after_epoch")
REPEATABLE: tuple[RequestName, ...] = ("save", "sample")
FOLDER = "requests"
DONE = "done"
_HandlerOfSignal = Callable[[int, FrameType | None], Any] | int | None


class Requests:
    """The requests of one run; inside a `with` block, SIGTERM and the first Ctrl-C count as stop_and_save.

    A second Ctrl-C ends at once (KeyboardInterrupt). The handlers before are put back at the end of the block. Handlers
    can be set by the main thread only; in another thread the block changes no signals.

    `save` and `sample` are moved to requests/done when they are answered, so that they can be asked again; one that is
    asked a second time meanwhile stays. A stop stays where it is, as the page knows by it that the run is stopping;
    what was answered is written down in requests/done, so that the same stop does not end a later run in this folder.

    Of several processes, the first one has the run folder; the others pass None and get its answers from it. Signals
    reach each process by itself.
    """

    def __init__(self, run_dir: Path | None, reporter: Reporter) -> None:
        self._folder = run_dir / FOLDER if run_dir is not None else None
        self._reporter = reporter
        self._signalled = False
        self._told = False
        self._seen: dict[str, str] = {}
        self._answered: set[str] = set()  # stops, by name; and all others by name and id
        self._handlers: dict[int, _HandlerOfSignal] = {}

    def __enter__(self) -> Requests:
        self._forget_old_stops()
        if threading.current_thread() is threading.main_thread():
            for number in _signals():
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            # None stands for a handler that was not set from Python and that cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers.clear()

    def _forget_old_stops(self) -> None:
        """Take away stops that ended an earlier run in this folder; else the page would show this one as stopping."""
        for name in self._names():
            number = self._id(name)
            if number is not None and name in STOPS and f"{name}-{number}" in self._done():
                self._move(name, number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Printing is left to `poll`: a handler that interrupts a print may not print.
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def poll(self) -> set[RequestName]:
        """What is asked for and not answered yet; costs a look into one folder."""
        found: set[RequestName] = set()
        if self._signalled:
            self._say_once()
            found.add("stop_and_save")
        names = self._names()
        done = self._done() if names else set()
        for name in names:
            number = self._id(name)
            if number is not None and f"{name}-{number}" not in done:
                self._seen[name] = number
                found.add(name)
        return {name for name in found if name not in self._answered}

    def _say_once(self) -> None:
        if not self._told:
            self._told = True
            self._reporter.say("Saving, then ending. Press Ctrl-C again to end at once, without saving.")

    def answered(self, name: RequestName, **fields: Any) -> None:
        """Record in the journal that `name` was done (`fields`: step and so on); it is not asked any more then.

        A request that nobody made, or that was answered before, is left alone.
        """
        number = self._seen.pop(name, None)
        by_signal = name == "stop_and_save" and self._signalled
        if name in self._answered or (number is None and not by_signal):
            return
        if name in STOPS:
            self._answered.add(name)
        self._reporter.journal.emit("request_done", request=name, **fields)
        if number is not None:
            self._answered.add(f"{name}-{number}")
            self._put_away(name, number)

    def _names(self) -> list[RequestName]:
        try:
            names = os.listdir(self._folder) if self._folder is not None else []
        except OSError:
            return []  # Nobody has asked for anything.
        return [cast(RequestName, name) for name in names if name in STOPS or name in REPEATABLE]

    def _id(self, name: str) -> str | None:
        """What tells this request from an earlier one of the same name; None if it is gone."""
        assert self._folder is not None
        path = self._folder / name
        try:
            content = path.read_bytes()
            written = path.stat().st_mtime_ns
        except OSError:
            return None
        try:
            value = json.loads(content)
            number = value.get("id") if isinstance(value, dict) else None
        except ValueError:
            number = None  # Made by hand (`touch requests/save`): then its time must do.
        return number if isinstance(number, str) and number.isalnum() else f"t{written}"

    def _done(self) -> set[str]:
        """`name-id` of what was answered, by this process or by an earlier one in this folder."""
        assert self._folder is not None
        try:
            return self._answered | set(os.listdir(self._folder / DONE))
        except OSError:
            return self._answered  # Nothing was answered yet.

    def _put_away(self, name: RequestName, number: str) -> None:
        assert self._folder is not None
        if name in REPEATABLE:
            if self._id(name) == number:
                self._move(name, number)
            return
        try:
            (self._folder / DONE).mkdir(exist_ok=True)
            (self._folder / DONE / f"{name}-{number}").touch()
        except OSError as error:
            self._say_failed(name, error)

    def _move(self, name: RequestName, number: str) -> None:
        assert self._folder is not None
        try:
            (self._folder / DONE).mkdir(exist_ok=True)
            os.replace(self._folder / name, self._folder / DONE / f"{name}-{number}")
        except OSError as error:
            self._say_failed(name, error)

    def _say_failed(self, name: RequestName, error: OSError) -> None:
        # No reason to end a run: this process remembers what it answered.
        self._reporter.say(f"Note: the request {name} stays in {self._folder}: {error.strerror}.")


def _signals() -> list[int]:
    names = ("SIGINT", "SIGTERM", "SIGBREAK")  # SIGBREAK: Windows only, where SIGTERM never comes from outside
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]
