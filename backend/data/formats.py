"""Which files are images and videos, and the error that every reader of media raises. Needs no decoder."""

from __future__ import annotations

from pathlib import Path

from backend.errors import UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
VIDEO_EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")


class MediaError(UserError):
    """An image or a video that cannot be used, with the reason; nothing of it is ever handed out in part."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def kind_of(path: str | Path) -> str | None:
    """`image` or `video` by the extension in any letter case, else None; the file is not looked at."""
    suffix = Path(path).suffix.lower()
    if suffix in IMAGE_EXTENSIONS:
        return "image"
    return "video" if suffix in VIDEO_EXTENSIONS else None
