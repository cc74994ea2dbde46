"""Exactly the wanted frames of a video: sought, decoded forwards, scaled at once; memory for one large frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
from av.error import FFmpegError
from av.video.frame import VideoFrame

from backend.data.container import open_video
from backend.data.formats import MediaError
from backend.data.frame_folders import read_frames
from backend.data.scaling import FrameScaler, Pixels, Target, seen_size
from backend.data.screen_time import frames_at
from backend.data.timeline import Timeline, TimelineCache

Put = Callable[[int, Pixels], None]
Alive = Callable[[], None]


class _UnknownTime(Exception):
    """The decoder gave a frame a time that no packet has; the frames of this file can only be counted."""


def resolve_wanted(path: str | Path, wanted: Sequence[int] | Sequence[float], timelines: TimelineCache) -> list[int]:
    """Frame numbers for frame numbers (integers) or for times in seconds since the first frame (floats).

    Raises:
        ValueError: nothing is wanted, a number is negative, or numbers and times are mixed.
        MediaError: times of a folder of frames, which has none.
    """
    if not len(wanted):
        raise ValueError("At least one frame has to be wanted.")
    if all(isinstance(value, int | numpy.integer) for value in wanted):
        numbers = [int(value) for value in wanted]
        if min(numbers) < 0:
            raise ValueError(f"Frame numbers start at 0, not {min(numbers)}.")
        return numbers
    if not all(isinstance(value, float | numpy.floating) and numpy.isfinite(value) for value in wanted):
        raise ValueError("Give frame numbers as integers or times as finite floats, not both.")
    if os.path.isdir(path):
        raise MediaError(path, "is a folder of frames, which have numbers but no times. Ask for numbers.")
    return frames_at(timelines.get(path).seconds, wanted).tolist()


def decode_numbers(
    path: str | Path,
    numbers: Sequence[int],
    target: Target | None,
    put: Put,
    timelines: TimelineCache,
    alive: Alive = lambda: None,
) -> None:
    """Give each of these frames (ascending, different) to `put` as uint8 [H, W, 3]; no target: as a person sees it.

    Frames are numbered from 0 in the order in which they are shown. `alive` is called whenever a packet was read.
    A frame may be given twice with equal pixels; only when this function returns are all of them whole.

    Raises:
        MediaError: a wanted frame does not exist, is damaged, or needs a damaged one.
    """
    if os.path.isdir(path):
        read_frames(path, numbers, target, put, alive)
        return
    timeline = timelines.get(path, numbers[-1], alive)
    if numbers[-1] >= len(timeline.ticks):
        count = len(timeline.ticks)
        raise MediaError(path, f"has {count} frames that can be read; frame {numbers[-1]} (from 0) was asked for.")
    clip = _Clip(path, timeline, target, put, alive)
    if timeline.stamped:
        try:
            for run in _runs(timeline, numbers):
                clip.decode_stamped(run)
            return
        except _UnknownTime:
            pass
    clip.decode_counted(list(numbers))


def _runs(timeline: Timeline, numbers: Sequence[int]) -> list[list[int]]:
    """Split the numbers where a seek saves at least one whole group of pictures."""
    groups = numpy.searchsorted(timeline.keys, timeline.ticks[list(numbers)], side="right")
    runs = [[numbers[0]]]
    for number, previous, group in zip(numbers[1:], groups[:-1], groups[1:], strict=True):
        if group - previous > 1:
            runs.append([])
        runs[-1].append(number)
    return runs


class _Clip:
    def __init__(self, path: str | Path, timeline: Timeline, target: Target | None, put: Put, alive: Alive) -> None:
        self._path, self._timeline, self._target, self._put, self._alive = path, timeline, target, put, alive
        self._scaler: FrameScaler | None = None
        self._stored_size: tuple[int, int] | None = None

    def decode_stamped(self, run: list[int]) -> None:
        """Decode one run of ascending numbers, frames recognised by their presentation time."""
        ticks = self._timeline.ticks
        waiting = iter(run)
        number = next(waiting)
        damaged_from: int | None = None
        previous: int | None = None
        start = self._timeline.key_before(int(ticks[number]))
        with self._started(start) as (stream, packets):
            for frame, broken_at in self._frames(stream, packets):
                if frame is None:
                    # Pictures that precede the key in time may need what was not read; they are not wanted.
                    if start is not None and broken_at < start:
                        continue
                    damaged_from = broken_at if damaged_from is None else min(damaged_from, broken_at)
                    continue
                if frame.pts is None:
                    raise _UnknownTime
                here = self._place(frame.pts)
                if here is None:
                    continue
                if frame.key_frame and damaged_from is not None and frame.pts > damaged_from:
                    damaged_from = None
                if previous is not None and here > previous + 1 and not frame.key_frame:
                    damaged_from = int(ticks[previous + 1])
                if frame.is_corrupt and damaged_from is None:
                    damaged_from = frame.pts
                previous = here
                if here < number:
                    continue
                if here > number or (damaged_from is not None and frame.pts >= damaged_from):
                    break
                self._give(number, frame, stream)
                following = next(waiting, None)
                if following is None:
                    return
                number = following
        raise self._damage(number)

    def decode_counted(self, numbers: list[int]) -> None:
        """Decode from the start and count; after any damage the count is not trusted."""
        wanted = set(numbers)
        with open_video(self._path) as (container, stream):
            for count, (frame, _) in enumerate(self._frames(stream, container.demux(stream))):
                if frame is None or frame.is_corrupt:
                    break
                if count in wanted:
                    self._give(count, frame, stream)
                    wanted.discard(count)
                    if not wanted:
                        return
        raise self._damage(min(wanted))

    def _frames(self, stream: Any, packets: Iterator[Any]) -> Iterator[tuple[VideoFrame | None, int]]:
        """Decoded frames, and (None, time) for every packet that cannot be decoded."""
        try:
            for packet in packets:
                self._alive()
                try:
                    decoded = packet.decode()
                except FFmpegError:
                    yield None, packet.pts if packet.pts is not None else int(self._timeline.ticks[0])
                    continue
                for frame in decoded:
                    yield frame, 0
        except FFmpegError:
            # The rest of the file cannot be read; what the decoder still holds is whole.
            with suppress(FFmpegError):
                for frame in stream.codec_context.decode(None):
                    yield frame, 0

    def _place(self, tick: int) -> int | None:
        """The number of the frame of this time; None for those that come before the first shown one."""
        ticks = self._timeline.ticks
        place = int(numpy.searchsorted(ticks, tick))
        if place < len(ticks) and ticks[place] == tick:
            return place
        if tick < ticks[0]:
            return None
        if place == len(ticks) and not self._timeline.complete:
            return place
        raise _UnknownTime

    def _give(self, number: int, frame: VideoFrame, stream: Any) -> None:
        size = (frame.width, frame.height)
        self._stored_size = self._stored_size or size
        if size != self._stored_size:
            first = self._stored_size
            raise MediaError(
                self._path, f"changes from {first[0]} x {first[1]} to {size[0]} x {size[1]} on the way. Convert it."
            )
        if self._scaler is None:
            aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
            self._scaler = FrameScaler(self._target or Target(seen_size(frame, aspect)))
        self._put(number, self._scaler.pixels(frame))

    @contextmanager
    def _started(self, key: int | None) -> Iterator[tuple[Any, Iterator[Any]]]:
        """The stream and its packets from `key` or before it; from the start if the file cannot be sought."""
        if key is not None:
            with open_video(self._path) as (container, stream):
                packets = _packets_from(container, stream, key)
                if packets is not None:
                    yield stream, packets
                    return
        with open_video(self._path) as (container, stream):
            yield stream, container.demux(stream)

    def _damage(self, number: int) -> MediaError:
        seconds = float(self._timeline.seconds[number])
        return MediaError(self._path, f"frame {number} ({seconds:.2f} s) is damaged. Convert the file or leave it out.")


def _packets_from(container: Any, stream: Any, key: int) -> Iterator[Any] | None:
    """Packets from a key at or before `key`, or None if the file has no index that leads there."""
    try:
        container.seek(key, stream=stream)
        packets = container.demux(stream)
        first = next(packets, None)
    except FFmpegError:
        return None
    if first is None or first.pts is None or not first.is_keyframe or first.pts > key:
        return None
    return chain([first], packets)
