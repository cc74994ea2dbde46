"""Files that are whole or not there: atomic writes, confined paths, free space, fingerprints. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backend.errors import UserError

_SAMPLE_BYTES = 1 << 20
_SAMPLES = 16
_NAME_BYTES = 180
_WEIGHT_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
_RESERVED_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"COM{i}" for i in range(1, 10)), *(f"LPT{i}" for i in range(1, 10))}


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(final: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`; when the block ends well it is fsynced and renamed to `final`.

    The temporary name keeps the suffix (encoders choose their format by it) and starts with a dot. On any error it is
    removed and `final` stays as it was.

    Raises:
        UserError: the folder cannot be created or written, or the disk is full.
    """
    final = Path(final)
    # 20 characters of the stem are at most 80 bytes, so that a long name that fits does not fail by its temporary one.
    temporary = final.with_name(f".{final.stem[:20]}.{uuid.uuid4().hex[:8]}.tmp{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:  # Windows flushes only files that are open for writing.
            os.fsync(handle.fileno())
        os.replace(temporary, final)
        fsync_folder(final.parent)
    except OSError as error:
        problem = write_problem(error, final)
        if problem is error:
            raise
        raise problem from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def share_like_others(path: Path) -> None:
    """Give a file the permissions that any new file of this process has.

    The safetensors library makes files that only their owner can read, so that another program under another name
    (a server of workflows, a share in the network) would not find the LoRA that lies before it.
    """
    # Python can read the mask of permissions only by setting it, which all threads would notice.
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
        mask = int(status.partition("\nUmask:")[2].split()[0], 8)
    except (OSError, ValueError, IndexError):
        mask = 0o022  # what systems without that file begin with
    os.chmod(path, 0o666 & ~mask)


def write_problem(error: OSError, path: Path, field: str | None = None) -> Exception:
    """Turn an OSError of writing `path` into the sentence that a person needs; unknown ones are returned unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"No space is left for {path}. Free some space or choose another folder.", field)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{path} cannot be written: {error.strerror}. Choose a folder that you may write to.", field)
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT):
        return UserError(f"{path} cannot be written: {error.strerror}. Choose another output path.", field)
    return error


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write `data` (str as UTF-8) to `path` so that readers see the old content or the new one, never a part."""
    payload = data.encode("utf-8") if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(payload)


def confine(root: str | Path, path: str | Path) -> Path:
    """Resolve `path` (relative ones against `root`) and return it if it lies inside `root`, symbolic links followed.

    Raises:
        UserError: the path leaves `root` or holds a NUL byte.
    """
    if "\0" in str(path):
        raise UserError("A path may not hold a NUL byte.")
    base = Path(root).resolve()
    try:
        resolved = (base / path).resolve()
    except (OSError, RuntimeError):
        raise UserError(f"{path} cannot be followed: its links lead in a circle. Choose another path.") from None
    if not resolved.is_relative_to(base):
        raise UserError(f"{path} lies outside {base}. Choose a path inside it.")
    return resolved


def safe_name(text: str, fallback: str = "clip", length: int = 60) -> str:
    """Make a file stem that every system accepts from free text: letters, digits, dash and underscore only.

    At most `length` characters and 180 bytes of UTF-8, so that numbers and suffixes still fit into a file name.
    """
    plain = unicodedata.normalize("NFKC", text)
    name = re.sub(r"[^\w-]+", "-", plain, flags=re.UNICODE).strip("-_. ")[:length]
    name = name.encode("utf-8", "ignore")[:_NAME_BYTES].decode("utf-8", "ignore").strip("-_. ")
    return fallback if not name or name.upper() in _RESERVED_NAMES else name


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    for candidate in (path, *path.parents):
        if os.path.isdir(candidate):
            return candidate
    return Path(path.anchor or ".")


def require_free_space(folder: str | Path, needed_bytes: int, field: str | None = None) -> None:
    """Raise a UserError when the disk of `folder` (or of its nearest existing parent) has less than `needed_bytes`."""
    free = shutil.disk_usage(existing_parent(Path(folder).absolute())).free
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free, but {needed_bytes / 1e6:.0f} MB are needed. "
            "Free some space or choose another folder.",
            field,
        )


def check_writable(path: Path, field: str | None = None) -> None:
    """Raise a UserError when a file at `path` could not be created: its folder is missing rights or is no folder."""
    parent = existing_parent(path.absolute().parent)
    blocker = next((p for p in path.absolute().parents if os.path.exists(p)), parent)
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{path.name[:40]}... is too long for a file name. Choose a shorter one.", field) from None
    if not os.path.isdir(blocker):
        raise UserError(f"{path} cannot be written: {blocker} is a file, not a folder. Choose another path.", field)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder. Give a file name.", field)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission in {parent}. Choose another folder.", field)


def fingerprint(path: str | Path) -> str:
    """Identify weights quickly: SHA-256 over the size and up to 16 samples of 1 MiB, first and last bytes included.

    A file of up to 16 MiB is hashed whole. A folder is the hash of its weight and configuration files' names and
    fingerprints, in order. The result is 16 hexadecimal digits; a 40 GB file takes a few milliseconds when cached.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _WEIGHT_SUFFIXES):
            digest.update(f"{file.relative_to(path).as_posix()}:{fingerprint(file)}\n".encode())
        return digest.hexdigest()[:16]
    size = path.stat().st_size
    digest.update(str(size).encode())
    with open(path, "rb") as handle:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(handle.read())
        else:
            for index in range(_SAMPLES):
                handle.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
