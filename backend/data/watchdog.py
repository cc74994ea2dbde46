"""Reading media in processes of their own, so that a file that hangs or crashes the decoder costs one file, not a run.

Why processes and not threads: a decode that hangs inside FFmpeg cannot be interrupted in a thread, it would keep its
memory and its file for ever, and one that crashes takes the whole program with it. A process can be ended; it also
decodes beside Python instead of in turns with it. The price is one copy of each finished (small) frame and about half
a second for the start of each process, which is then used for many files.

Why silence and not duration: a long file on a slow disk is no fault. The process speaks whenever packets move on, and
only one that says nothing for the whole limit is ended.
"""

from __future__ import annotations

import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray

from backend.data.formats import MediaError
from backend.data.probe import MediaInfo
from backend.data.scaling import Box, Pixels, Size
from backend.data.worker import HEADER, read_picture
from backend.errors import EngineError, Stopped

_ROOT = Path(__file__).resolve().parents[2]
_COMMAND = (sys.executable, "-m", "backend.data.worker")
_START_SECONDS = 120.0
_ANSWERS_AHEAD = 4
_LEAVE_SECONDS = 5.0


class MediaReader:
    """Probes and decodes in up to `workers` processes; give one to all threads that read media, and close it.

    Args:
        workers: how many files are read at once; each process decodes with one thread. They start when needed.
        stall_seconds: how long a process may show no progress with a file before that file is given up.
        command: how a process is started (tests give another one).
    """

    def __init__(self, workers: int = 1, stall_seconds: float = 60.0, command: Sequence[str] = _COMMAND) -> None:
        if workers < 1 or stall_seconds <= 0:
            raise ValueError(f"A media reader needs a worker and time, not {workers} and {stall_seconds} s.")
        self._limit, self._stall_seconds, self._command = workers, stall_seconds, tuple(command)
        self._change = threading.Condition()
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._starting = 0
        self._closed = False

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; threads that wait for an answer get `Stopped`."""
        with self._change:
            self._closed = True
            processes = [*self._idle, *self._busy]
            self._change.notify_all()
        for process in processes:
            process.end()

    def process_ids(self) -> list[int]:
        """The running processes, for status displays."""
        with self._change:
            return [process.pid for process in (*self._idle, *self._busy)]

    def probe(self, path: str | Path) -> MediaInfo:
        """`backend.data.probe.probe`, guarded.

        Raises:
            MediaError: the file is broken, or reading it hangs or crashes.
            Stopped: the reader was closed.
        """
        return MediaInfo(**json.loads(self._ask(path, {"do": "probe"})[1]))

    def presentation_times(self, path: str | Path) -> NDArray[numpy.float64]:
        """float64 [N]: when each frame of a video appears, in seconds, the first at 0; no frame is decoded.

        Raises:
            MediaError, Stopped: as for `probe`.
        """
        return numpy.frombuffer(self._ask(path, {"do": "times"})[1], dtype=numpy.float64).copy()

    def decode_clip(
        self,
        path: str | Path,
        wanted: Sequence[int] | Sequence[float],
        scaled: Size | None = None,
        crop: Box | None = None,
    ) -> Pixels:
        """`backend.data.media.decode_clip`, guarded.

        Raises:
            MediaError, Stopped: as for `probe`; never a part of the clip.
        """
        values = [float(v) if isinstance(v, float | numpy.floating) else int(v) for v in wanted]
        return self._ask(path, {"do": "decode", "wanted": values, "size": scaled, "crop": crop})[0]

    def read_image(self, path: str | Path, scaled: Size | None = None, crop: Box | None = None) -> Pixels:
        """uint8 [H, W, 3]: `backend.data.images.read_image`, guarded; then scaled and cropped as by `fit_image`.

        Raises:
            MediaError, Stopped: as for `probe`.
        """
        return self._ask(path, {"do": "image", "size": scaled, "crop": crop})[0][0]

    def _ask(self, path: str | Path, request: dict[str, Any]) -> tuple[Any, bytes]:
        with self._borrowed(str(path)) as process:
            return process.ask(Path(path), {**request, "path": str(path)})

    @contextmanager
    def _borrowed(self, path: str) -> Iterator[_Process]:
        process = self._take(path)
        try:
            yield process
        except MediaError as error:
            # A file that is merely broken leaves the process as it was.
            if isinstance(error, _ProcessLost):
                process.end()
            raise
        except BaseException:
            process.end()
            raise
        finally:
            with self._change:
                self._busy.discard(process)
                if process.usable and not self._closed:
                    self._idle.append(process)
                self._change.notify()
            if self._closed:
                process.end()

    def _take(self, path: str) -> _Process:
        with self._change:
            while not self._idle and len(self._busy) + self._starting >= self._limit and not self._closed:
                self._change.wait()
            if self._closed:
                raise Stopped("The media reader was closed.")
            self._idle = [process for process in self._idle if process.running]
            if self._idle:
                # The one that read this file last still knows its packets.
                process = next((p for p in self._idle if p.last_path == path), self._idle[0])
                self._idle.remove(process)
                process.last_path = path
                self._busy.add(process)
                return process
            self._starting += 1
        process = None
        try:
            process = _Process(self._command, self._stall_seconds)
            process.last_path = path
            return process
        finally:
            with self._change:
                self._starting -= 1
                if process is not None:
                    self._busy.add(process)
                self._change.notify()


class _ProcessLost(MediaError):
    """The process hangs or is gone; the file that it read is named."""


class _Process:
    """One decoding process, and a thread that takes its answers so that waiting for them can have an end."""

    def __init__(self, command: Sequence[str], stall_seconds: float) -> None:
        self.last_path = ""
        self.usable = True
        self._stall_seconds = stall_seconds
        self._ended_here = False
        self._answers: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue(_ANSWERS_AHEAD)
        path = os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._thread = threading.Thread(target=self._collect, args=(self._process.stdout,), daemon=True)
        self._thread.start()
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ask(self, path: Path, request: dict[str, Any]) -> tuple[Any, bytes]:
        """(clip or None, last payload) for a request; a clip is complete or not returned."""
        self._become_ready(path)
        try:
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.flush()
        except OSError:
            raise self._lost(path) from None
        clip: Pixels | None = None
        while True:
            letter, payload = self._next(path, self._stall_seconds)
            if letter == b"S":
                clip = numpy.empty(json.loads(payload), dtype=numpy.uint8)
            elif letter == b"P" and clip is not None:
                places, pixels = read_picture(payload)
                clip[list(places)] = numpy.frombuffer(pixels, dtype=numpy.uint8).reshape(clip.shape[1:])
            elif letter in (b"D", b"T"):
                return clip, payload
            elif letter == b"E":
                raise MediaError(**json.loads(payload))
            elif letter == b"F":
                trace = json.loads(payload)["traceback"]
                raise EngineError(f"Reading {path} failed by a fault of the program:\n{trace}", "load")

    def end(self) -> None:
        """End the process; it holds nothing that could be lost."""
        self.usable, self._ended_here = False, True
        with suppress(OSError):
            self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            # One that waits for a dead network disk cannot be ended; it is left behind rather than waited for.
            self._process.wait(_LEAVE_SECONDS)
            self._thread.join(_LEAVE_SECONDS)
        with suppress(OSError):
            self._input.close()

    def _become_ready(self, path: Path) -> None:
        if self._ready:
            return
        try:
            letter, _ = self._next(path, max(_START_SECONDS, self._stall_seconds))
        except MediaError:
            letter = b""
        if letter != b"R":
            raise EngineError("The process that reads media does not start; the log says why.", "load")
        self._ready = True

    def _next(self, path: Path, limit: float) -> tuple[bytes, bytes]:
        try:
            found = self._answers.get(timeout=limit)
        except queue.Empty:
            self.usable = False
            raise _ProcessLost(
                path, f"was given up: reading it made no progress for {limit:g} s. Convert it or leave it out."
            ) from None
        if found is None:
            raise self._lost(path)
        return found

    def _lost(self, path: Path) -> Exception:
        if self._ended_here:
            return Stopped("The media reader was closed.")
        self.usable = False
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_SECONDS)
        code = self._process.poll()
        return _ProcessLost(path, f"made the decoder crash (exit code {code}). Convert it or leave it out.")

    def _collect(self, output: BinaryIO) -> None:
        with output:
            while True:
                try:
                    header = output.read(HEADER.size)
                    letter, length = HEADER.unpack(header)
                    payload = output.read(length)
                except (struct.error, OSError, ValueError):
                    break  # the end of its output: it left, was ended, or crashed
                if len(payload) < length or not self._pass_on((letter, payload)):
                    break
            self._pass_on(None)

    def _pass_on(self, found: tuple[bytes, bytes] | None) -> bool:
        """Hand an answer over, unless nobody will take it any more."""
        while True:
            try:
                self._answers.put(found, timeout=0.2)
                return True
            except queue.Full:
                if not self.usable:
                    return False
