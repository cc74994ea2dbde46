"""Opaque names for the files that the page may show: nobody can make one for a file that the app has not offered."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backend.errors import UserError
from backend.files import write_problem

CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".png": "image/png",
    ".webp": "image/webp",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".safetensors": "application/octet-stream",
}
_SECRET_BYTES = 32
_SIGNATURE_BYTES = 16
_MAX_ID_LENGTH = 2000


@dataclass(frozen=True)
class MediaFile:
    """A file that may be sent: where it lies, which run it belongs to, its content type."""

    path: Path
    run_id: str
    content_type: str


class MediaIds:
    """Makes and resolves media ids: the run and the path inside its folder, signed with the workspace's own secret.

    The secret lies in `secret_file`, readable by its owner only, so that addresses survive a restart.
    """

    def __init__(self, runs_folder: Path, secret_file: Path) -> None:
        self._runs_folder = runs_folder
        self._key = _load_secret(secret_file)

    def id_for(self, run_id: str, relative: str) -> str:
        """The id of a file of a run; `relative` is its path inside the run folder."""
        payload = f"{run_id}/{relative}".encode("utf-8", "surrogateescape")
        return _encode(self._sign(payload) + payload)

    def resolve(self, media: str) -> MediaFile | None:
        """The file behind an id, or None: forged, gone, not a regular file, of a kind that is never shown, or outside
        of its run folder after following symbolic links."""
        raw = _decode(media) if len(media) <= _MAX_ID_LENGTH else None
        if raw is None or not hmac.compare_digest(raw[:_SIGNATURE_BYTES], self._sign(raw[_SIGNATURE_BYTES:])):
            return None
        run_id, _, relative = raw[_SIGNATURE_BYTES:].decode("utf-8", "surrogateescape").partition("/")
        return self._file(run_id, relative)

    def offer(self, run_id: str, path: str) -> tuple[str, int] | None:
        """(id, modification time in ns) for a path as a journal names it, or None if it cannot be shown."""
        folder = self._runs_folder / run_id
        try:
            full = Path(os.path.normpath(folder / path))
            relative = full.relative_to(folder).as_posix()
        except (ValueError, TypeError):
            return None
        found = self._file(run_id, relative)
        return (self.id_for(run_id, relative), found.path.stat().st_mtime_ns) if found else None

    def _file(self, run_id: str, relative: str) -> MediaFile | None:
        folder = self._runs_folder / run_id
        content_type = CONTENT_TYPES.get(Path(relative).suffix.lower())
        if content_type is None or not run_id or "/" in run_id or run_id in (".", ".."):
            return None
        try:
            resolved = (folder / relative).resolve(strict=True)
            whole = resolved.is_relative_to(folder.resolve(strict=True)) and not folder.is_symlink()
            regular = stat.S_ISREG(resolved.stat().st_mode)
        except (OSError, RuntimeError, ValueError):
            return None
        return MediaFile(resolved, run_id, content_type) if whole and regular else None

    def _sign(self, payload: bytes) -> bytes:
        return hmac.new(self._key, payload, hashlib.sha256).digest()[:_SIGNATURE_BYTES]


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes | None:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    # One spelling for each file: spare bits at the end are refused.
    return raw if len(raw) > _SIGNATURE_BYTES and _encode(raw) == text else None


def _load_secret(path: Path) -> bytes:
    """Read the workspace's secret, or make it: 32 random bytes, mode 0600; two apps that start at once agree on one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(descriptor, secrets.token_bytes(_SECRET_BYTES))
            finally:
                os.close(descriptor)
        os.chmod(path, 0o600)
        key = path.read_bytes()
    except OSError as error:
        problem = write_problem(error, path)
        raise UserError(f"{path} cannot be used: {error.strerror}.") if problem is error else problem from error
    if len(key) != _SECRET_BYTES:
        raise UserError(f"{path} is damaged. Delete it; a new one is made at the next start.")
    return key
