"""Which files a request may name: everything for the person at this machine, given folders only when exposed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from backend.errors import UserError

MAX_PATH_LENGTH = 4096


class Roots:
    """The folders that requests may read when the app is exposed to a network.

    On the loopback interface the person behind the page owns this machine's files anyway, so any readable path is
    accepted there; a NUL byte or an endless path never is.
    """

    def __init__(self, folders: Iterable[str | Path], exposed: bool) -> None:
        self.folders = tuple(Path(folder).resolve() for folder in folders)
        self.exposed = exposed

    def absolute(self, path: str, field: str | None = None) -> str:
        """The path without `~`, absolute; it need not exist.

        Raises:
            UserError: a NUL byte, too long, or (exposed) outside the folders, symbolic links followed.
        """
        if "\0" in path or len(path) > MAX_PATH_LENGTH or not path.isprintable():
            raise UserError("is not a path. Choose a file.", field)
        full = Path(os.path.abspath(os.path.expanduser(path)))
        if self.exposed and not self.allows(full):
            raise UserError(
                f"{Path(path).name} lies outside the folders that this app may read. "
                "Choose a file inside them, or start the app with --root FOLDER.",
                field,
            )
        return os.fspath(full)

    def allows(self, path: str | Path) -> bool:
        """Whether `path` lies in one of the folders after following symbolic links."""
        try:
            resolved = Path(path).resolve()
        except (OSError, RuntimeError, ValueError):
            return False
        return any(resolved.is_relative_to(folder) for folder in self.folders)
