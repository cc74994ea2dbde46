"""What goes wrong while latents are cached: broken files, full disks, stops, several processes, bad requests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy
import pytest
from PIL import Image

from backend import files
from backend.caching import latents
from backend.caching.latents import MediaReader
from tests.integration.cache_command import VAE, cache, caches, inodes, written_again
from tests.real_clips import real_clip, real_dataset, real_still

# A worker whose decoder hangs in clips called so, and one that fails by a fault of its own.
_FAULTY_WORKER = """
import time
from backend.data import decode, worker

plain = decode._Clip._give

def give(self, number, frame, stream):
    if "hang" in self._path.name:
        time.sleep(600)
    if "fault" in self._path.name:
        raise RuntimeError("a fault of ours")
    plain(self, number, frame, stream)

decode._Clip._give = give
worker.main()
"""


def _clips(folder: Path, *names: str) -> Path:
    """A dataset of short clips of these names; returns its configuration."""
    for place, name in enumerate(names):
        real_clip(folder / "clips" / f"{name}.mp4", "phone", (88, 72), 9, start=3 * place)
    config = folder / "dataset.toml"
    config.write_text(
        f"[[datasets]]\nvideo_directory = '{folder / 'clips'}'\ncache_directory = '{folder / 'cache'}'\n"
        "resolution = [48, 48]\ntarget_frames = [9]\n",
        encoding="utf-8",
    )
    return config


def test_broken_and_hanging_files_cost_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted and named; everything else is cached, and a later run with a repaired file adds it."""
    config = _clips(tmp_path, "good", "hang", "fault", "torn", "empty")
    torn, empty = tmp_path / "clips" / "torn.mp4", tmp_path / "clips" / "empty.mp4"
    whole = torn.read_bytes()
    place = whole.index(b"mdat") - 4
    middle = place + int.from_bytes(whole[place : place + 4], "big") * 2 // 3
    torn.write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    empty.write_bytes(b"no video")
    command = [sys.executable, "-c", _FAULTY_WORKER]
    monkeypatch.setattr(latents, "MediaReader", partial(MediaReader, stall_seconds=1.5, command=command))
    run = cache(config)
    assert run.code == 0, run.stderr
    assert "1 of 5 sources cannot be read" in run.stderr
    assert "3 of 4 items could not be read" in run.stderr
    for name in ("hang", "fault", "torn", "empty"):
        assert f"  {name}.mp4: " in run.stderr
    assert "was given up" in run.stderr
    assert set(caches(tmp_path / "cache")) == {"good_00000-009_0048x0048_k5.safetensors"}
    assert run.of("progress")[-1]["done"] == 4
    assert any("3 of 4 items" in record["message"] for record in run.of("warning"))
    torn.write_bytes(whole)
    before = inodes(tmp_path / "cache")
    assert cache(config, "--skip_existing").code == 0
    assert written_again(before, tmp_path / "cache") == {"torn_00000-009_0048x0048_k5.safetensors"}


def test_a_folder_without_anything_usable(tmp_path: Path) -> None:
    config = _clips(tmp_path, "a", "b")
    for name in ("a", "b"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"no video")
    run = cache(config)
    assert run.code == 2
    assert "none of its 2 sources can be used" in run.stderr
    assert run.of("error")[0]["field"] == "datasets[0].video_directory"
    for name in ("a", "b"):
        (tmp_path / "clips" / f"{name}.mp4").unlink()
    run = cache(config)
    assert run.code == 2
    assert "has no video that can be used" in run.stderr


def test_stop_and_continue(tmp_path: Path) -> None:
    """A stop between two batches; the second run does the rest, and all bytes are those of an undisturbed one."""
    config = real_dataset(tmp_path)
    assert cache(config, "--batch_size", "1").code == 0
    undisturbed = caches(tmp_path)
    for name in undisturbed:
        (tmp_path / name).unlink()

    def stop() -> None:
        while len(caches(tmp_path)) < 3:
            time.sleep(0.002)
        requests = max((tmp_path / "runs").iterdir(), key=lambda path: int(path.name)) / "requests"
        requests.mkdir()
        (requests / "stop").touch()

    stopper = threading.Thread(target=stop)
    stopper.start()
    run = cache(config, "--batch_size", "1")
    stopper.join()
    assert run.code == 0
    assert "Stopped as asked" in run.of("stopped")[0]["reason"]
    done = inodes(tmp_path)
    assert 3 <= len(done) < 12
    assert f"{len(done)} of 12 latents are written" in run.of("stopped")[0]["reason"]
    assert cache(config, "--skip_existing").code == 0
    assert len(written_again(done, tmp_path)) == 12 - len(done)
    assert caches(tmp_path) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, where this system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this system does not let us mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _on(disk: Path, config: Path) -> Path:
    config.write_text(config.read_text("utf-8").replace(str(config.parent / "cache"), str(disk / "cache")), "utf-8")
    return config


def test_a_disk_that_is_too_small(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the work; when the space goes away meanwhile: a clear error, nothing half, and it continues."""
    config = _on(small_disk, _clips(tmp_path, *"abcdef"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((1 << 20) - 60_000))
    run = cache(config)
    assert run.code == 2
    assert "MB are needed" in run.stderr
    assert run.of("error")[0]["field"] == "datasets[0].cache_directory"
    assert not caches(small_disk)
    # As if somebody else filled it after the check.
    monkeypatch.setattr(latents, "require_space", lambda *_: None)
    run = cache(config)
    assert run.code == 2
    assert "No space is left for" in run.stderr
    assert "continue with --skip_existing" in run.stderr
    kept = caches(small_disk)
    assert 0 < len(kept) < 6
    assert not list((small_disk / "cache").glob("*.tmp*")), "the half file is gone"
    ballast.unlink()
    before = inodes(small_disk)
    assert cache(config, "--skip_existing").code == 0
    found = caches(small_disk)
    assert len(found) == 6
    assert len(written_again(before, small_disk)) == 6 - len(kept)
    assert {name: found[name] for name in kept} == kept


def test_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every system: the fourth file meets a full disk when it is made durable."""
    config = _clips(tmp_path, *"abcdef")
    plain, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if threading.current_thread().name == "write-behind" and len(calls) > 7:
            raise OSError(28, "No space left on device")
        plain(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        run = cache(config)
    assert run.code == 2
    assert "No space is left for" in run.stderr
    kept = caches(tmp_path)
    assert len(kept) < 6
    assert not list((tmp_path / "cache").glob(".*.tmp*"))
    assert cache(config, "--skip_existing").code == 0
    assert len(caches(tmp_path)) == 6


def test_shares_of_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The split does not depend on what is cached: the second one finds the first one's caches and does its own."""
    config = real_dataset(tmp_path)
    assert cache(config).code == 0
    alone = caches(tmp_path)
    for name in alone:
        (tmp_path / name).unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    counts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        before = inodes(tmp_path)
        run = cache(config, "--skip_existing")
        assert run.code == 0, run.stderr
        assert bool(run.events) is (rank == "0"), "one journal"
        assert f"[{int(rank) + 1}/2] " in run.stderr
        new = written_again(before, tmp_path)
        assert f"{len(new)} latents were written" in run.stderr
        counts.append(len(new))
    assert sum(counts) == 12
    assert min(counts) >= 4
    assert caches(tmp_path) == alone


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """`accelerate launch`: each item is done by one of them, one journal, the same bytes as alone."""
    config = real_dataset(tmp_path)
    assert cache(config).code == 0
    alone = caches(tmp_path)
    for name in alone:
        (tmp_path / name).unlink()
    run_dir = tmp_path / "together"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--main_process_port", "0", "--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"),
        *("--module", "backend.kandinsky5_cache_latents"),
        *("--dataset_config", str(config), "--vae", VAE, "--run_dir", str(run_dir)),
    ]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert caches(tmp_path) == alone
    written = [line for line in done.stderr.splitlines() if "latents were written" in line]
    assert sorted(line.split("]")[0] for line in written) == ["[1/2", "[2/2"]
    assert sum(int(line.split("] ")[1].split()[0]) for line in written) == 12
    assert (run_dir / "events.jsonl").read_text("utf-8").count('"type":"started"') == 1


def test_debug_modes_encode_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No VAE is needed; the pictures show the frames that would be encoded."""
    config = _clips(tmp_path, "a")
    real_still(tmp_path / "stills" / "s.png", "bikes", (64, 48))
    with config.open("a", encoding="utf-8") as handle:
        handle.write(
            f"[[datasets]]\nimage_directory = '{tmp_path / 'stills'}'\ncache_directory = '{tmp_path / 'cache2'}'\n"
            "resolution = [64, 48]\n"
        )
    for mode in ("image", "video", "console"):
        run = cache(config, "--debug_mode", mode, vae=None)
        assert run.code == 0, run.stderr
    folder = tmp_path / "cache" / "k5_debug"
    with Image.open(folder / "a_00000-009_0048x0048_k5.png") as strip:
        assert strip.size == (8 * 48, 48)
    with av.open(str(folder / "a_00000-009_0048x0048_k5.mp4")) as container:
        assert container.streams.video[0].average_rate == 24
        assert len(list(container.decode(video=0))) == 9
    with (
        Image.open(tmp_path / "cache2" / "k5_debug" / "s_0064x0048_k5.png") as shown,
        Image.open(tmp_path / "stills" / "s.png") as still,
    ):
        assert numpy.array_equal(numpy.asarray(shown), numpy.asarray(still))
    art = capsys.readouterr().out
    assert "a.mp4: 48 x 48, 9 frames" in art
    assert len([line for line in art.splitlines() if line.startswith("\x1b[38;2;")]) == 40 + 30
    assert not caches(tmp_path)
    small = ("--debug_mode", "console", "--console_width", "20", "--console_back", "#102030")
    assert cache(config, *small, "--console_num_images", "1", vae=None).code == 0
    art = capsys.readouterr().out
    assert "s.png" not in art
    rows = [line for line in art.splitlines() if line.startswith("\x1b[48;2;16;32;48m")]
    assert len(rows) == 10
    assert all(row.count("\x1b[38;2;") == 20 for row in rows)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """Options, weights and dataset, each with its field, before anything is loaded; exit code 2."""
    config = _clips(tmp_path, "a")
    config.write_text(config.read_text("utf-8") + "[[datasets]]\nimage_directory = 'none'\n", "utf-8")
    run = cache(config, "--prune", "--keep_cache", "--nabla_stretch", vae=str(Path(VAE).parent / "transformer"))
    assert run.code == 2
    problems = {problem["field"]: problem["message"] for problem in run.of("error")[0]["problems"]}
    assert set(problems) == {"prune", "nabla_stretch", "vae", "datasets[1].image_directory"}
    assert "not a VAE" in problems["vae"]
    assert cache(tmp_path / "none.toml", vae=None).of("error")[0]["problems"][0]["field"] == "dataset_config"
    run = cache(_clips(tmp_path, "a"), "--debug_mode", "image", "--skip_existing", "--console_back", "red", vae=None)
    assert {problem["field"] for problem in run.of("error")[0]["problems"]} == {"skip_existing", "console_back"}


def test_check_and_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _clips(tmp_path, "a", "b")
    assert cache(config).code == 0
    run = cache(config, "--check", "--vae_dtype", "float32")
    assert run.code == 0
    assert "latents: 2 valid" in capsys.readouterr().out
    assert (run.folder / "ledger.json").is_file()
    (tmp_path / "clips" / "b.mp4").unlink()
    assert cache(config, "--skip_existing").code == 0
    assert len(caches(tmp_path)) == 2, "nothing is removed without being asked"
    run = cache(config, "--skip_existing", "--prune")
    assert run.code == 0, run.stderr
    assert {path.name for path in (tmp_path / "cache").glob("*_k5.safetensors")} == {
        "a_00000-009_0048x0048_k5.safetensors"
    }
    assert len(list((tmp_path / "cache" / ".k5_trash").rglob("b_*_k5.safetensors"))) == 1
