"""The process that decodes for a `MediaReader`: JSON requests on stdin, framed answers on stdout.

Run as `python -m backend.data.worker`. An answer is a letter, the length of its payload (little endian, 32 bits) and
the payload: R ready, A alive, S shape of the clip (JSON), P one picture, D done (JSON), T done (float64 numbers),
E what is wrong with the file (JSON), F a fault of the program (JSON).
"""

from __future__ import annotations

import json
import os
import queue
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from backend.data import decode
from backend.data.formats import MediaError
from backend.data.images import read_image
from backend.data.probe import probe
from backend.data.scaling import Pixels, make_target, resize_pixels
from backend.data.timeline import TimelineCache

HEADER = struct.Struct("<cI")
_ALIVE_EVERY_SECONDS = 0.25
_FILES_REMEMBERED = 16


def picture_payload(positions: list[int], pixels: Pixels) -> bytes:
    """The payload of one picture: how many places of the clip it fills, which, and its bytes."""
    return struct.pack(f"<{1 + len(positions)}I", len(positions), *positions) + pixels.tobytes()


def read_picture(payload: bytes) -> tuple[tuple[int, ...], memoryview]:
    """What `picture_payload` packed: the places and the bytes."""
    (count,) = struct.unpack_from("<I", payload)
    return struct.unpack_from(f"<{count}I", payload, 4), memoryview(payload)[4 + 4 * count :]


class Answers:
    """Writes the answers to one request; says now and then that it is alive, but only when work went on."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._spoke = time.monotonic()

    def send(self, letter: bytes, payload: bytes = b"") -> None:
        """Write one answer."""
        self._output.write(HEADER.pack(letter, len(payload)) + payload)
        self._output.flush()
        self._spoke = time.monotonic()

    def send_json(self, letter: bytes, content: Any) -> None:
        """Write one answer of JSON."""
        self.send(letter, json.dumps(content).encode())

    def alive(self) -> None:
        """Called from within the work: a reader that hangs calls nothing, and that is how it is noticed."""
        if time.monotonic() - self._spoke > _ALIVE_EVERY_SECONDS:
            self.send(b"A")


def answer(request: dict[str, Any], answers: Answers, timelines: TimelineCache) -> None:
    """Do one request and send its last answer."""
    path = Path(request["path"])
    try:
        if request["do"] == "probe":
            answers.send_json(b"D", asdict(probe(path, timelines)))
        elif request["do"] == "times":
            answers.send(b"T", timelines.get(path, None, answers.alive).seconds.tobytes())
        elif request["do"] == "image":
            _read_image(path, request, answers)
        else:
            _decode(path, request, answers, timelines)
    except MediaError as error:
        answers.send_json(b"E", {"path": str(error.path), "reason": error.reason})
    except MemoryError:
        answers.send_json(b"E", {"path": str(path), "reason": "needs more memory than there is. Scale it down."})


def _read_image(path: Path, request: dict[str, Any], answers: Answers) -> None:
    pixels = read_image(path)
    target = make_target(request["size"], request["crop"])
    if target is not None:
        pixels = resize_pixels(pixels, target)
    answers.send_json(b"S", [1, *pixels.shape])
    answers.send(b"P", picture_payload([0], pixels))
    answers.send_json(b"D", None)


def _decode(path: Path, request: dict[str, Any], answers: Answers, timelines: TimelineCache) -> None:
    numbers = decode.resolve_wanted(path, request["wanted"], timelines)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    target = make_target(request["size"], request["crop"])
    shaped = False

    def put(number: int, pixels: Pixels) -> None:
        nonlocal shaped
        if not shaped:
            answers.send_json(b"S", [len(numbers), *pixels.shape])
            shaped = True
        answers.send(b"P", picture_payload(places[number], pixels))

    decode.decode_numbers(path, sorted(places), target, put, timelines, answers.alive)
    answers.send_json(b"D", None)


def _requests(source: BinaryIO, waiting: queue.Queue[bytes], leave: Callable[[int], None]) -> None:
    """Pass requests on, and end the process at once when whoever asks is gone, also in the middle of a decode."""
    for line in source:
        waiting.put(line)
    leave(0)


def main() -> None:
    """Answer requests until stdin ends."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever a library prints must not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answers, timelines = Answers(output), TimelineCache(_FILES_REMEMBERED)
    waiting: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_requests, args=(sys.stdin.buffer, waiting, os._exit), daemon=True).start()
    answers.send(b"R")
    while True:
        line = waiting.get()
        try:
            answer(json.loads(line), answers, timelines)
        except BrokenPipeError:
            return
        except Exception:
            answers.send_json(b"F", {"traceback": traceback.format_exc()})


if __name__ == "__main__":
    main()
