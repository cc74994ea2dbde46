"""Pictures that were made once: files named by what they show, the least recently used removed beyond a total size."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_BYTES = 512 << 20
_KEEP = 0.8
_SUFFIXES = (".webp", ".mp4")


class PreviewCache:
    """A folder of pictures of at most `limit` bytes; a restart finds them again. Safe to use from several threads."""

    def __init__(self, folder: str | Path, limit: int = MAX_BYTES) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._guard = threading.Lock()
        self._total: int | None = None

    def path(self, parts: Any, suffix: str) -> Path:
        """Where the picture of these parts (plain JSON values that decide how it looks) belongs."""
        name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()[:40]
        return self.folder / name[:2] / f"{name}{suffix}"

    def find(self, path: Path) -> bool:
        """Whether a picture is there; then it counts as used now."""
        try:
            os.utime(path)
        except OSError:
            return False
        return True

    def added(self, path: Path) -> None:
        """Count a new file, and make room when there are too many."""
        with self._guard:
            if self._total is None:
                self._total = sum(size for _, size, _ in self._files())
            else:
                with suppress(OSError):
                    self._total += path.stat().st_size
            if self._total > self.limit:
                self._total = self._make_room(path)

    def _make_room(self, newest: Path) -> int:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self.limit * _KEEP:
                break
            if path != os.fspath(newest):
                with suppress(OSError):
                    os.unlink(path)
                    total -= size
        return total

    def _files(self) -> list[tuple[float, int, str]]:
        found: list[tuple[float, int, str]] = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                if name.endswith(_SUFFIXES):
                    path = os.path.join(folder, name)
                    with suppress(OSError):
                        status = os.stat(path)
                        found.append((status.st_mtime, status.st_size, path))
        return found
