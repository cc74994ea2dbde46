"""Which frames of a video are read: exactly the wanted ones, whatever the container, rate, order or damage."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy
import pytest

from backend.data import decode
from backend.data.formats import MediaError
from backend.data.media import decode_clip, fit_image, presentation_times, probe, read_image
from backend.data.timeline import TimelineCache, read_timeline
from tests.unit.data.clips import corners, damage, numbered, packet_places, read_corners, read_numbers, write_clip

H264 = {"g": "12", "bf": "2"}
KINDS = {
    "plain.mp4": {"options": H264},
    "one_group.mp4": {"options": {"g": "1000", "bf": "3"}},
    "all_keys.mp4": {"options": {"g": "1"}},
    "open_groups.mp4": {"options": {**H264, "x264-params": "open-gop=1:scenecut=0"}},
    "index_first.mp4": {"container_options": {"movflags": "faststart"}},
    "fragments.mp4": {"options": H264, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "lossless_odd.mkv": {"codec": "ffv1", "size": (63, 47), "pixel_format": "yuv444p"},
    "rgb.mkv": {"codec": "ffv1", "pixel_format": "bgr0"},
    "h264.mkv": {"options": H264},
    "hevc.mkv": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12"}},
    "apple.mov": {"options": H264},
    "phone.M4V": {"container_options": {}, "rate": 30},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "cpu-used": "8", "deadline": "realtime"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "windows.wmv": {"codec": "wmv2"},
    "flash.flv": {"codec": "flv1"},
    "mpeg2.mpg": {"codec": "mpeg2video", "rate": 25, "options": {"bf": "2"}},
}


def _write(folder: Path, name: str, frames: int = 50) -> Path:
    path = folder / name
    if name.endswith("M4V"):
        return write_clip(path.with_suffix(".m4v"), frames, **KINDS[name]).rename(path)
    return write_clip(path, frames, **KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_every_container_gives_exactly_the_wanted_frames(tmp_path, name) -> None:
    path = _write(tmp_path, name)
    info = probe(path)
    assert (info.kind, info.frames, info.variable_rate, info.rotation) == ("video", 50, False, 0)
    assert info.fps == pytest.approx(KINDS[name].get("rate", 24))
    assert info.seconds == pytest.approx(50 / info.fps, abs=2e-3)
    for wanted in (range(50), [49], [0], [30, 31, 40], [47, 2, 2, 25, 2], range(20, 37)):
        clip = decode_clip(path, list(wanted))
        assert clip.dtype == numpy.uint8
        assert clip.shape == (len(list(wanted)), info.height, info.width, 3)
        assert read_numbers(clip) == list(wanted)
    times = presentation_times(path)
    assert numpy.abs(times - numpy.arange(50) / info.fps).max() < 2e-3
    assert read_numbers(decode_clip(path, [float(time) for time in times])) == list(range(50))


@pytest.mark.parametrize("rate", [12, Fraction(24000, 1001), 24, 25, 30, 60])
@pytest.mark.parametrize("size", [(64, 48), (98, 130), (320, 96)])
def test_rates_sizes_and_lengths(tmp_path, rate, size) -> None:
    frames = 5 + int(rate) % 7
    path = write_clip(tmp_path / "clip.mp4", frames, size, rate)
    info = probe(path)
    assert (info.width, info.height, info.frames, info.codec) == (*size, frames, "h264")
    assert info.fps == pytest.approx(float(rate), rel=1e-9)
    assert info.seconds == pytest.approx(frames / float(rate), abs=2e-3)
    assert not info.variable_rate
    assert read_numbers(decode_clip(path, list(range(frames)))) == list(range(frames))


def test_one_frame(tmp_path) -> None:
    path = write_clip(tmp_path / "one.mp4", 1)
    assert (probe(path).frames, probe(path).fps) == (1, 24.0)
    assert read_numbers(decode_clip(path, [0, 0])) == [0, 0]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_goes_by_presentation_time(tmp_path, suffix) -> None:
    generator = numpy.random.default_rng(5)
    pts = [0, *numpy.cumsum(generator.choice([20, 40, 120], 59)).tolist()]
    path = write_clip(tmp_path / f"vfr.{suffix}", 60, pts=pts, unit=Fraction(1, 1000), options={"g": "20", "bf": "2"})
    info = probe(path)
    assert info.variable_rate
    assert info.frames == 60
    assert info.fps == pytest.approx(59 / (pts[-1] / 1000), rel=0.02)
    times = presentation_times(path)
    assert numpy.abs(times - numpy.array(pts) / 1000).max() < 2e-3
    asked = generator.uniform(0, pts[-1] / 1000, 40)
    expected = [int(numpy.searchsorted(times, second + 1.1e-3, side="right")) - 1 for second in asked]
    assert read_numbers(decode_clip(path, asked.tolist())) == expected
    assert read_numbers(decode_clip(path, [-1.0, 1e6])) == [0, 59]


def test_a_steady_rate_with_rounded_times_is_not_variable(tmp_path) -> None:
    path = write_clip(
        tmp_path / "ntsc.webm", 40, rate=Fraction(30000, 1001), codec="libvpx-vp9", options={"lag-in-frames": "0"}
    )
    assert not probe(path).variable_rate
    assert probe(path).fps == pytest.approx(29.97, abs=1e-3)


def test_only_the_needed_part_is_read_and_decoded(tmp_path, monkeypatch) -> None:
    path = write_clip(tmp_path / "long.mp4", 400, options={"g": "20", "bf": "2"})
    head = read_timeline(path, 16)
    assert not head.complete
    assert 17 <= len(head.ticks) < 200
    assert numpy.array_equal(head.ticks, read_timeline(path).ticks[: len(head.ticks)])
    decoded = []
    original = decode._Clip._place
    monkeypatch.setattr(decode._Clip, "_place", lambda self, tick: decoded.append(tick) or original(self, tick))
    assert read_numbers(decode_clip(path, [5, 250, 251, 390])) == [5, 250, 251, 390]
    assert len(decoded) < 70


def test_a_remembered_timeline_follows_the_file(tmp_path) -> None:
    cache = TimelineCache(2)
    path = write_clip(tmp_path / "a.mp4", 200)
    assert not cache.get(path, 3).complete
    assert len(cache.get(path, 180).ticks) > 180
    assert cache.get(path) is cache.get(path, 3)
    write_clip(path, 30)
    assert len(cache.get(path).ticks) == 30
    for name in "bc":
        cache.get(write_clip(tmp_path / f"{name}.mp4", 2))
    assert len(cache._known) == 2


@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize("frames_between", ["0", "2"])
def test_a_broken_group_is_refused_and_the_others_are_read(tmp_path, start, frames_between) -> None:
    """Frames that need a broken packet are refused up to the next key; FFmpeg would hand out a patched-up picture."""
    noise = numpy.random.default_rng(1).integers(0, 25, (60, 96, 128, 3), dtype=numpy.uint8)
    options = {"g": "12", "bf": frames_between, "crf": "10", "sc_threshold": "0"}
    path = write_clip(
        tmp_path / "bad.mp4", 60, (128, 96), options=options, draw=lambda n: numbered(n, (128, 96)) + noise[n]
    )
    damage(path, 27, start)
    assert probe(path).frames == 60
    assert read_numbers(decode_clip(path, list(range(25)))) == list(range(25))
    assert read_numbers(decode_clip(path, list(range(36, 60)))) == list(range(36, 60))
    for wanted in ([31], [35], list(range(20, 40))):
        with pytest.raises(MediaError, match=r"frame \d\d \(1\.\d\d s\) is damaged"):
            decode_clip(path, wanted)


def test_frames_that_do_not_exist(tmp_path) -> None:
    path = write_clip(tmp_path / "short.mp4", 10)
    with pytest.raises(MediaError, match="has 10 frames that can be read; frame 10"):
        decode_clip(path, [3, 10])
    for wanted in ([], [-1], [0, 1.5], [float("nan")]):
        with pytest.raises(ValueError):
            decode_clip(path, wanted)


def test_cut_files_never_give_a_part(tmp_path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", 50, container_options={"movflags": "faststart"})
    data, (place, _) = whole.read_bytes(), packet_places(whole)[30]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[:place])
    with pytest.raises(MediaError, match="cut off"):
        probe(cut)
    assert read_numbers(decode_clip(cut, list(range(20)))) == list(range(20))
    with pytest.raises(MediaError, match="frames that can be read"):
        decode_clip(cut, [45])
    for length in (4, 40, 300, len(data) // 3):
        cut.write_bytes(data[:length])
        with pytest.raises(MediaError):
            probe(cut)


def test_files_without_frame_times_are_counted(tmp_path, monkeypatch) -> None:
    """Some files give no or equal times; then frames are found by counting from the start, still exactly."""
    path = write_clip(tmp_path / "clip.mp4", 40, options=H264)
    known = read_timeline(path)
    ticks = numpy.arange(40)
    counted = type(known)(ticks, ticks[:0], Fraction(1, 24), True, False, 40)
    monkeypatch.setattr(TimelineCache, "get", lambda *_: counted)
    assert read_numbers(decode_clip(path, [39, 0, 17])) == [39, 0, 17]
    # A decoder that reports times which no packet has: the same way out.
    shifted = type(known)(known.ticks + 1, known.keys, known.unit, True, True, 40)
    monkeypatch.setattr(TimelineCache, "get", lambda *_: shifted)
    assert read_numbers(decode_clip(path, [5, 17])) == [5, 17]


def test_a_folder_of_frames_is_a_video(tmp_path) -> None:
    from PIL import Image

    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(numbered(number)).save(folder / f"frame_{number}.{'png' if number % 2 else 'PNG'}")
    (folder / "notes.txt").write_text("not a frame")
    info = probe(folder)
    assert (info.kind, info.frames, info.fps, info.width, info.height) == ("video", 12, None, 64, 48)
    assert read_numbers(decode_clip(folder, [11, 0, 10, 9, 9], (32, 24))) == [11, 0, 10, 9, 9]
    with pytest.raises(MediaError, match="12 frames"):
        decode_clip(folder, [12])
    with pytest.raises(MediaError, match="no times"):
        decode_clip(folder, [0.5])
    with pytest.raises(MediaError, match="no times"):
        presentation_times(folder)
    Image.fromarray(numbered(0, (32, 24))).save(folder / "frame_5.png")
    with pytest.raises(MediaError, match=r"frame_5\.png: is 32 x 24, other frames"):
        decode_clip(folder, list(range(12)))
    with pytest.raises(MediaError, match="without images"):
        probe(tmp_path)


def test_an_image_and_a_clip_of_it_are_scaled_alike(tmp_path) -> None:
    """The same picture as PNG and as a lossless clip agree after scaling up, down and cropping."""
    y, x = numpy.mgrid[0:120, 0:160]
    picture = numpy.stack([128 + 100 * numpy.sin(x / 20), 2 * y, x + y // 2], -1).astype(numpy.uint8)
    path = write_clip(
        tmp_path / "clip.mkv", 2, (160, 120), codec="ffv1", pixel_format="yuv444p", draw=lambda _: picture
    )
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    for size, crop in (
        ((83, 61), None),
        ((160, 120), (8, 4, 100, 90)),
        ((320, 240), (1, 2, 300, 200)),
        ((80, 60), None),
    ):
        clip = decode_clip(path, [1], size, crop)[0]
        still = fit_image(image, size, crop)
        assert clip.shape == still.shape
        assert numpy.abs(clip.astype(int) - still).mean() < 2
    assert read_corners(corners()) == "RGBW"
