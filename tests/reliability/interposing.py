"""Stands between a program and its file system: counts every operation that changes something, and ends it at one."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import backend.lora.formats
import backend.training.state_tensors

_CHANGING = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "remove", "rmdir", "close", "write")


class Cut(BaseException):
    """The machine stops here; nobody catches this, and whoever cleans up meets it again."""


class Interposer:
    """While it is installed, operation number `cut` (from 1) does not happen and `end` is called in its place.

    Writes are cut in their middle: half of the data arrives. Nothing more can be done after the cut, so that an
    `end` that raises is like a process that is gone. fsync is counted but not done: no power is lost here, and a disk
    that must be waited for would make hundreds of trials take minutes.
    """

    def __init__(self, folder: Path, cut: int = 0, end: Callable[[], Any] | None = None) -> None:
        self.folder = str(folder)
        self.operations: list[str] = []
        self.synced: list[int] = []
        self.watch: Callable[[str, tuple[Any, ...]], None] = lambda name, arguments: None
        self._cut = cut
        self._end = end
        self._patch = pytest.MonkeyPatch()
        self._over = False
        self._descriptors: set[int] = set()  # of os.open
        self._handles: set[int] = set()  # of file objects, which close them themselves

    def __enter__(self) -> Interposer:
        for name in _CHANGING:
            self._patch.setattr(os, name, self._around(name, getattr(os, name)))
        self._patch.setattr(io, "open", self._opening(io.open))
        self._patch.setattr("builtins.open", self._opening(open))
        for module in (backend.lora.formats, backend.training.state_tensors):
            self._patch.setattr(module, "save_file", self._saving(module.save_file))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        for descriptor in self._descriptors:  # the system does this when a process is gone; it gives back locks
            os.close(descriptor)
        self._descriptors.clear()

    def _happens(self, name: str, *arguments: Any) -> bool:
        """Count one operation; True when it is the one to be cut, after which the caller calls `_stop`."""
        if self._over:
            raise Cut
        self.operations.append(name)
        self.watch(name, arguments)
        return len(self.operations) == self._cut

    def _stop(self) -> None:
        self._over = True
        if self._end is not None:
            self._end()
        raise Cut

    def _ours(self, target: Any) -> bool:
        if isinstance(target, int):
            return target in self._descriptors | self._handles
        return str(target).startswith(self.folder) or not os.path.isabs(str(target))

    def _around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if not self._ours(arguments[0]):
                return original(*arguments, **named)
            if self._happens(name, *arguments):
                self._stop()
            if name == "fsync":
                self.synced.append(os.fstat(arguments[0]).st_ino)
                return None
            result = original(*arguments, **named)
            if name == "open":
                self._descriptors.add(result)
            if name == "close":
                self._descriptors.discard(arguments[0])
            return result

        return operation

    def _opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if mode in ("r", "rb") or not self._ours(file):
                return original(file, mode, *arguments, **named)
            if self._happens(f"open {mode}", file):
                self._stop()
            handle = original(file, mode, *arguments, **named)
            self._handles.add(handle.fileno())
            return _Handle(handle, self)

        return opening

    def closed(self, descriptor: int) -> None:
        """A file object is about to close."""
        self._handles.discard(descriptor)

    def write(self, handle: Any, data: Any) -> int:
        """What a file object's write does."""
        if self._happens("write to", handle.name):
            handle.write(data[: len(data) // 2])
            handle.flush()
            self._stop()
        return handle.write(data)

    def _saving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def saving(tensors: Any, path: Path, **named: Any) -> None:
            if self._happens("create", path):
                self._stop()
            torn = self._happens("fill", path)
            original(tensors, path, **named)
            if torn:
                os.truncate(path, path.stat().st_size // 2)
                self._stop()

        return saving


class _Handle:
    """A file object whose writes are counted."""

    def __init__(self, handle: Any, interposer: Interposer) -> None:
        self._handle = handle
        self._interposer = interposer

    def write(self, data: Any) -> int:
        return self._interposer.write(self._handle, data)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self._interposer.closed(self._handle.fileno())
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
