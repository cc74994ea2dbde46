"""Pictures of sources and of what training sees of them, made when they are asked for, by guarded processes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from backend.config.dataset import DatasetEntry
from backend.data.clips import item_numbers, read_item
from backend.data.formats import MediaError
from backend.data.frames import TARGET_FPS
from backend.data.items import Item
from backend.data.scaling import Pixels
from backend.errors import K5Error, Stopped, UserError
from k5ui.datasets.encoding import fitted, write_mp4, write_webp
from k5ui.datasets.preview_cache import PreviewCache
from k5ui.datasets.readers import SharedReader
from k5ui.datasets.snapshot import Row

THUMB_SIDE = 256
PREVIEW_SIDE = 320
PREVIEW_SECONDS = 4.0
PREVIEW_FPS = 16
STRIP_FRAMES = 8
STRIP_HEIGHT = 160
MAX_CLIP_FRAMES = 1500
MAX_WAITING = 200
_WORKERS = 2
_CHUNK_PIXELS = 24_000_000
_MAX_FAILURES = 5000
_VERSION = 1
_THUMB = ["thumb", THUMB_SIDE]


class Busy(UserError):
    """Too many pictures are asked for at once."""


class Previews:
    """Makes pictures and remembers them. Each method gives a future of the finished file, or of its UserError."""

    def __init__(self, folder: str | Path, reader: SharedReader) -> None:
        self._reader = reader
        self.cache = PreviewCache(folder)
        self._guard = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._working: dict[Path, Future[Path]] = {}
        self._failures: OrderedDict[Path, str] = OrderedDict()
        self._waiting = 0
        self._closed = False

    def thumb(self, row: Row) -> Future[Path]:
        """WebP, long side 256: the image, or the frame at a third of the video."""
        return self._make(_THUMB, row, None, ".webp", lambda path: self._draw_thumb(row, path))

    def thumb_problem(self, row: Row) -> str | None:
        """Why the picture of a source could not be made when it was asked for; None: it could, or nobody asked."""
        if not self._failures:
            return None
        with self._guard:
            return self._failures.get(self._path(_THUMB, row, None, ".webp"))

    def preview(self, row: Row) -> Future[Path]:
        """MP4, long side 320: the first four seconds of a video."""
        parts = ["preview", PREVIEW_SIDE, PREVIEW_FPS]
        return self._make(parts, row, None, ".mp4", lambda path: self._draw_preview(row, path))

    def strip(self, row: Row, entry: DatasetEntry, item: Item) -> Future[Path]:
        """WebP: up to eight frames of an item as training sees them, side by side, from its first to its last."""
        return self._make(
            ["strip", STRIP_HEIGHT], row, (entry, item), ".webp", lambda path: self._draw_strip(entry, item, path)
        )

    def clip(self, row: Row, entry: DatasetEntry, item: Item) -> Future[Path]:
        """MP4 of exactly the frames that training sees, 24 a second."""
        return self._make(["clip"], row, (entry, item), ".mp4", lambda path: self._draw_clip(entry, item, path))

    def frame_numbers(self, entry: DatasetEntry, item: Item) -> tuple[list[int], list[float]]:
        """The source frames of an item and when each is shown in the source, in seconds (empty: it has no times).

        Raises:
            UserError: the file is broken or shorter than it was. This may take as long as reading its index.
        """
        reader = self._reader.get()
        numbers = item_numbers(reader, entry, item)
        if item.clip is None or item.media.seconds <= 0:
            return numbers, []
        times = reader.presentation_times(item.source.location)
        return numbers, [round(float(times[min(number, len(times) - 1)]), 4) for number in numbers]

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something that reads media, when a worker is free.

        Raises:
            Busy: too much is waiting.
        """
        with self._guard:
            return self._submit(work)

    def close(self) -> None:
        """Make no more pictures. Close the reader first: work that goes on then ends at once."""
        with self._guard:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    # --- once for each picture ------------------------------------------------------------------------------------

    def _make(
        self, parts: list[Any], row: Row, item: tuple[DatasetEntry, Item] | None, suffix: str,
        draw: Callable[[Path], None],
    ) -> Future[Path]:  # fmt: skip
        path = self._path(parts, row, item, suffix)
        if self.cache.find(path):
            return _done(path)
        with self._guard:
            reason = self._failures.get(path)
            if reason is not None:
                return _failed(MediaError(row.source.location, reason))
            future = self._working.get(path)
            if future is None:
                future = self._working[path] = self._submit(lambda: self._draw(path, draw))
            return future

    def _path(self, parts: list[Any], row: Row, item: tuple[DatasetEntry, Item] | None, suffix: str) -> Path:
        return self.cache.path([_VERSION, *parts, row.source.location, row.stamp, _item_parts(item)], suffix)

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        if self._closed:
            raise Stopped("The app ends.")
        if self._waiting >= MAX_WAITING:
            raise Busy("Too many pictures are asked for at once. Try again in a moment.")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="previews")
        future = self._pool.submit(work)
        self._waiting += 1
        future.add_done_callback(self._count_down)
        return future

    def _count_down(self, _: Future[Any]) -> None:
        with self._guard:
            self._waiting -= 1

    def _draw(self, path: Path, draw: Callable[[Path], None]) -> Path:
        try:
            draw(path)
            self.cache.added(path)
            return path
        except MediaError as error:  # a full disk may have room again later, a broken file stays as it is
            with self._guard:
                self._failures[path] = error.reason
                while len(self._failures) > _MAX_FAILURES:
                    self._failures.popitem(last=False)
            raise
        finally:
            with self._guard:
                self._working.pop(path, None)

    # --- the pictures ---------------------------------------------------------------------------------------------

    def _draw_thumb(self, row: Row, path: Path) -> None:
        media = _media_of(row)
        size = fitted(media.width, media.height, THUMB_SIDE)
        if row.source.kind == "image":
            pixels = self._reader.get().read_image(row.source.location, size)
        else:
            pixels = self._reader.get().decode_clip(row.source.location, [media.frames // 3], size)[0]
        write_webp(path, pixels)

    def _draw_preview(self, row: Row, path: Path) -> None:
        media = _media_of(row)
        if row.source.kind != "video":
            raise UserError("An image has no moving preview.")
        size = fitted(media.width, media.height, PREVIEW_SIDE, even=True)
        wanted: list[int] | list[float]
        if media.seconds > 0:
            count = max(1, int(min(media.seconds, PREVIEW_SECONDS) * PREVIEW_FPS))
            wanted = [number / PREVIEW_FPS for number in range(count)]
        else:
            wanted = list(range(min(media.frames, int(PREVIEW_SECONDS * PREVIEW_FPS))))
        pixels = self._reader.get().decode_clip(row.source.location, wanted, size)
        write_mp4(path, pixels, PREVIEW_FPS, crf=28)

    def _draw_strip(self, entry: DatasetEntry, item: Item, path: Path) -> None:
        reader = self._reader.get()
        numbers = item_numbers(reader, entry, item)
        places = numpy.linspace(0, len(numbers) - 1, min(STRIP_FRAMES, len(numbers))).round().astype(int)
        pixels = read_item(reader, entry, item, [numbers[place] for place in places])
        height = min(STRIP_HEIGHT, item.bucket.height)
        width = max(1, round(item.bucket.width * height / item.bucket.height))
        frames = [
            numpy.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX)) for frame in pixels
        ]
        write_webp(path, numpy.concatenate(frames, axis=1), quality=85)

    def _draw_clip(self, entry: DatasetEntry, item: Item, path: Path) -> None:
        if item.clip is None:
            raise UserError("A still is no clip.")
        if item.frames > MAX_CLIP_FRAMES:
            raise UserError(f"The clip has {item.frames} frames; at most {MAX_CLIP_FRAMES} are shown here.")
        write_mp4(path, self._clip_frames(entry, item), TARGET_FPS, crf=18)

    def _clip_frames(self, entry: DatasetEntry, item: Item) -> Iterator[Pixels]:
        """The frames of an item, some at a time, so that long clips need no more memory than short ones."""
        reader = self._reader.get()
        numbers = item_numbers(reader, entry, item)
        step = max(1, _CHUNK_PIXELS // (item.bucket.width * item.bucket.height))
        for start in range(0, len(numbers), step):
            yield from read_item(reader, entry, item, numbers[start : start + step])


def _media_of(row: Row) -> Any:
    if row.media is None or not row.allowed:
        raise UserError(row.reason or "The file cannot be read.")
    return row.media


def _item_parts(made: tuple[DatasetEntry, Item] | None) -> list[Any]:
    if made is None:
        return []
    entry, item = made
    plan = item.resize_plan
    clip = [item.clip.start, item.clip.frames] if item.clip else []
    return [clip, plan.scaled, plan.crop, item.bucket.width, item.bucket.height, entry.source_fps]


def _done(path: Path) -> Future[Path]:
    future: Future[Path] = Future()
    future.set_result(path)
    return future


def _failed(error: K5Error) -> Future[Path]:
    future: Future[Path] = Future()
    future.set_exception(error)
    return future
