"""How a video file is opened: its kind from its bytes, one thread, no other file or address, no frame of any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError
from av.stream import Disposition

from backend.data.formats import MediaError

# The largest frame of a video: 8192 x 4608. A decoder keeps up to 17 of them.
MAX_FRAME_PIXELS = 8192 * 4608
_MAX_SIDE = 32768
_MPEGTS_PACKET = 188
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_SIGNATURES = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"FLV", "flv"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x00\x00\x01\xb3", "mpegvideo"),
)


def container_of(path: str | Path) -> str:
    """The name of FFmpeg's reader for a video file, from its first bytes; the extension plays no part.

    FFmpeg's own guess would also take a text file for a playlist and open the files or addresses that it names.

    Raises:
        MediaError: missing, empty, or none of the containers that are read here.
    """
    try:
        with open(path, "rb") as handle:
            start = handle.read(2 * _MPEGTS_PACKET + 1)
    except IsADirectoryError:
        raise MediaError(path, "is a folder, not a video. Give a file.") from None
    except OSError as error:
        raise MediaError(path, f"cannot be opened: {error.strerror or error}. Check the path.") from None
    if not start:
        raise MediaError(path, "is empty (0 bytes). Copy it again.")
    if start[4:8] in _MP4_BOXES:
        return "mov"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    if len(start) > 2 * _MPEGTS_PACKET and all(start[i * _MPEGTS_PACKET] == 0x47 for i in range(3)):
        return "mpegts"
    for signature, name in _SIGNATURES:
        if start.startswith(signature):
            return name
    raise MediaError(path, "is not a video of a known kind (MP4, MOV, MKV, WebM, AVI, FLV, WMV, MPEG). Convert it.")


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Open a video file and give (container, first video stream that is no cover picture), ready to decode.

    Decoding uses one thread: several files are decoded at once by several processes, and FFmpeg's frame threads have
    hung on H.265 before.

    Raises:
        MediaError: no video can be found in it, or its frames are too large.
    """
    name = container_of(path)
    try:
        # "file:" and the list of protocols: a name like "concat:a" is a file name here, never an instruction.
        container = av.open(
            f"file:{path}", format=name, container_options={"protocol_whitelist": "file"}, metadata_errors="replace"
        )
    except (FFmpegError, OSError, ValueError) as error:
        raise MediaError(path, f"cannot be opened as a video ({describe(error)}). Copy or convert it again.") from None
    with container:
        stream = _first_stream(path, container)
        context = stream.codec_context
        if context is None:
            raise MediaError(path, "holds video in a form that cannot be decoded here. Convert it to H.264.")
        if context.width * context.height > MAX_FRAME_PIXELS or max(context.width, context.height) > _MAX_SIDE:
            raise MediaError(
                path, f"has frames of {context.width} x {context.height}; at most 8192 x 4608 are read. Scale it down."
            )
        context.thread_count = 1
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        yield container, stream


def _first_stream(path: str | Path, container: Any) -> Any:
    # Music files carry the picture of a cover.
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if streams:
        return streams[0]
    if container.streams.audio:
        raise MediaError(path, "holds sound only, no picture. Leave it out.")
    raise MediaError(path, "holds no video. Copy or convert it again.")


def describe(error: BaseException) -> str:
    """What FFmpeg or the system says, in a few words and without the path."""
    return str(getattr(error, "strerror", None) or type(error).__name__)
