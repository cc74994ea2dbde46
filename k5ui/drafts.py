"""The half-filled forms of the page, kept on the server: a reload, another device or tomorrow shows the same."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

from backend.errors import UserError
from backend.files import write_atomic

_TAB_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
MAX_DRAFT_BYTES = 1_000_000


class Drafts:
    """One JSON file for each tab below `folder`; safe to use from several threads."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._guard = threading.Lock()

    def load(self, tab: str) -> dict[str, Any]:
        """The values saved last; empty if there are none or the file is damaged (the next save replaces it)."""
        path = self._path(tab)
        try:
            with open(path, "rb") as handle:
                content = handle.read(MAX_DRAFT_BYTES + 1)
            values = json.loads(content) if len(content) <= MAX_DRAFT_BYTES else None
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    def save(self, tab: str, values: dict[str, Any]) -> bool:
        """Replace the draft of `tab`; False if it already says the same, so that handlers may be called twice.

        Raises:
            UserError: the values are no plain data, larger than 1 MB, or the workspace cannot be written.
        """
        path = self._path(tab)
        try:
            text = json.dumps(values, ensure_ascii=False, sort_keys=True)
            payload = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
        except (TypeError, ValueError, RecursionError):
            raise UserError("The form holds something that cannot be kept. Reload the page.") from None
        if len(payload) > MAX_DRAFT_BYTES:
            raise UserError("The form holds more than 1 MB of text. Shorten it.")
        with self._guard:
            if path.is_file() and path.read_bytes() == payload:
                return False
            write_atomic(path, payload)
        return True

    def clear(self, tab: str) -> None:
        """Forget the draft of `tab`."""
        with self._guard:
            self._path(tab).unlink(missing_ok=True)

    def _path(self, tab: str) -> Path:
        if not _TAB_NAME.fullmatch(tab):
            raise UserError(f"{tab[:60]!r} is not the name of a tab.")
        return self.folder / f"{tab}.json"
