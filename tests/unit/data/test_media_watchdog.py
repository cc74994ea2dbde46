"""Reading in guarded processes: same results, and a file that hangs or crashes the decoder costs one file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import psutil
import pytest

from backend.data.formats import MediaError
from backend.data.media import MediaReader, decode_clip, presentation_times, probe
from backend.errors import EngineError, Stopped
from tests.unit.data.clips import read_numbers, write_clip

ROOT = Path(__file__).resolve().parents[3]

# A worker whose decoder hangs, crashes or fails in the middle of clips of these names.
_FAULTY_WORKER = """
import os, sys, time
from backend.data import decode, worker

plain = decode._Clip._give

def give(self, number, frame, stream):
    print("libraries may print", flush=True)
    plain(self, number, frame, stream)
    if number == 3 and "hang" in self._path.name:
        time.sleep(600)
    if number == 3 and "crash" in self._path.name:
        os.abort()
    if number == 3 and "fault" in self._path.name:
        raise RuntimeError("a fault of ours")
    if "slow" in self._path.name:
        time.sleep(0.3)

decode._Clip._give = give
worker.main()
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """24 frames of H.264."""
    return write_clip(tmp_path_factory.mktemp("clips") / "good.mp4", 24)


def _copy(clip: Path, name: str) -> Path:
    path = clip.with_name(name)
    path.write_bytes(clip.read_bytes())
    return path


def test_guarded_results_equal_plain_ones(clip, tmp_path) -> None:
    with MediaReader() as reader:
        assert reader.probe(clip) == probe(clip)
        assert numpy.array_equal(reader.presentation_times(clip), presentation_times(clip))
        for wanted, size, crop in (
            ([3, 3, 20], None, None),
            ([0.0, 0.5], (40, 30), (2, 3, 30, 20)),
            ([1], (80, 60), None),
        ):
            assert numpy.array_equal(
                reader.decode_clip(clip, wanted, size, crop), decode_clip(clip, wanted, size, crop)
            )
        (process,) = reader.process_ids()
        for wanted in ([99], [5, 30]):
            with pytest.raises(MediaError, match="has 24 frames"):
                reader.decode_clip(clip, wanted)
        with pytest.raises(MediaError, match="No such file"):
            reader.probe(tmp_path / "none.mp4")
        assert reader.process_ids() == [process], "a broken file costs no process"
        assert read_numbers(reader.decode_clip(clip, list(range(24)))) == list(range(24))
    assert not psutil.pid_exists(process)


def test_hangs_crashes_and_faults_cost_one_file(clip) -> None:
    """PyAV 14 with FFmpeg 7.1 hung for ever in some H.265 files; nothing can end such a decode but another process."""
    command = (sys.executable, "-c", _FAULTY_WORKER)
    with MediaReader(stall_seconds=1.0, command=command) as reader:
        assert len(reader.decode_clip(clip, [1])) == 1
        for name, sentence in (("hang.mp4", "made no progress for 1 s"), ("crash.mp4", "made the decoder crash")):
            (process,) = reader.process_ids()
            path = _copy(clip, name)
            began = time.monotonic()
            with pytest.raises(MediaError, match=sentence) as caught:
                reader.decode_clip(path, list(range(10)))
            assert time.monotonic() - began < 4
            assert caught.value.path == path
            assert not psutil.pid_exists(process)
            assert read_numbers(reader.decode_clip(clip, list(range(24)))) == list(range(24))
        with pytest.raises(EngineError, match="a fault of ours"):
            reader.decode_clip(_copy(clip, "fault.mp4"), list(range(10)))
        # Slower than the limit in all, but never silent for so long.
        assert read_numbers(reader.decode_clip(_copy(clip, "slow.mp4"), list(range(6)))) == list(range(6))


def test_a_process_that_does_not_start_is_no_fault_of_the_file(clip) -> None:
    for program in ("raise SystemExit(3)", "import sys; sys.stdout.buffer.write(bytes(5))"):
        with MediaReader(command=(sys.executable, "-c", program)) as reader:
            with pytest.raises(EngineError, match="does not start"):
                reader.probe(clip)


@pytest.mark.skipif(os.name == "nt", reason="needs signals of POSIX")
def test_a_process_that_is_frozen_from_outside_is_given_up(clip) -> None:
    with MediaReader(stall_seconds=0.6) as reader:
        reader.probe(clip)
        (process,) = reader.process_ids()
        os.kill(process, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(MediaError, match="no progress"):
            reader.probe(clip)
        assert time.monotonic() - began < 3
        assert reader.probe(clip).frames == 24


def test_closing_answers_all_that_wait(clip) -> None:
    reader = MediaReader(stall_seconds=30, command=(sys.executable, "-c", _FAULTY_WORKER))
    path = _copy(clip, "hang.mp4")
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            reader.decode_clip(path, list(range(10)))
        except Stopped as error:
            ended.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not reader.process_ids():
        time.sleep(0.02)
    time.sleep(1.0)
    processes = reader.process_ids()
    reader.close()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 2
    assert not any(psutil.pid_exists(process) for process in processes)
    with pytest.raises(Stopped):
        reader.probe(clip)


def test_many_threads_share_few_processes(clip) -> None:
    found: dict[int, list[int]] = {}
    with MediaReader(workers=2) as reader:

        def work(number: int) -> None:
            found[number] = read_numbers(reader.decode_clip(clip, [number, 23 - number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(reader.process_ids()) <= 2
    assert found == {number: [number, 23 - number] for number in range(12)}


@pytest.mark.skipif(os.name == "nt", reason="needs signals of POSIX")
def test_no_process_outlives_a_killed_program(clip) -> None:
    path = _copy(clip, "hang.mp4")
    program = (
        "import sys\nfrom backend.data.watchdog import MediaReader\n"
        f"reader = MediaReader(command=(sys.executable, '-c', {_FAULTY_WORKER!r}))\n"
        f"reader.probe({str(path)!r})\nprint(reader.process_ids()[0], flush=True)\n"
        f"reader.decode_clip({str(path)!r}, list(range(10)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        parent.kill()
    worker.wait(10)


# VmHWM: the peak of this program alone; getrusage would also count the one that started it.
_MEMORY = """
import re, sys
from pathlib import Path
from backend.data.media import decode_clip
clip = decode_clip(sys.argv[1], list(range(int(sys.argv[2]), int(sys.argv[2]) + 17)))
assert clip.shape == (17, 144, 192, 3)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak of a process")
def test_memory_does_not_grow_with_the_length_of_the_video(tmp_path) -> None:
    """2,000 frames of 192 x 144 are 166 MB; reading 17 near the end takes what it takes from 50 frames."""
    plain = numpy.zeros((144, 192, 3), numpy.uint8)
    peaks = []
    for frames, first in ((50, 30), (2000, 1980)):
        path = tmp_path / f"{frames}.mp4"
        write_clip(
            path,
            frames,
            (192, 144),
            options={"preset": "ultrafast", "g": "1000", "sc_threshold": "0"},
            draw=lambda _: plain,
        )
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(path), str(first)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    assert abs(peaks[1] - peaks[0]) < 20, peaks
