"""An engine without torch: the flags, events and files of a generation, for tests of everything around the engine.

Options of a training (`max_train_steps`, `output_name` ...) play a training instead: tests/fakes/training_stub.py.

Words in the prompt choose what happens: [slow] takes about twenty seconds, [crash] exits with 3, [kill] ends itself by
SIGKILL, [hang] stops saying anything, [ignore-stop] ignores stop requests and SIGTERM, [fail] reports problems and
exits with 2, [oom] reports a memory error and exits with 1, [child] starts a process of its own that sleeps for a
minute, [late] exits with 4 after it has finished, [silent] ends with 0 without a word. `starts.txt` in the run folder
gets one line for each time that the engine was started.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import struct
import subprocess
import sys
import time
import tomllib
import zlib
from pathlib import Path
from typing import Any

from backend.events import Heartbeat, Journal
from tests.fakes.training_stub import TrainingStub, is_training

ENTRY = "tests.fakes.engine_stub"
SIZE = 8
STEPS = 5


def png(width: int, height: int, red: int) -> bytes:
    """A whole small PNG in one colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes([red, 64, 128]) * width for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config_file", required=True)
    parser.add_argument("--run_dir", required=True, type=Path)
    arguments = parser.parse_args()
    count_start(arguments.run_dir)
    options = tomllib.loads(Path(arguments.config_file).read_text("utf-8"))
    with Journal(arguments.run_dir / "events.jsonl") as journal:
        with Heartbeat(journal, 0.2):
            if is_training(options):
                stub = TrainingStub(journal, arguments.run_dir, options)
                return stub.play(ENTRY, png(SIZE, SIZE, int(options.get("seed", 42)) % 256))
            code = generate(journal, arguments.run_dir, options)
    return 4 if "[late]" in options.get("prompt", "") else code


def count_start(run: Path) -> None:
    descriptor = os.open(run / "starts.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)


def generate(journal: Journal, run: Path, options: dict[str, Any]) -> int:
    began = time.monotonic()
    prompt, task = options.get("prompt", ""), options.get("task", "k5-demo-t2v")
    seed = options.get("seed", 42)
    versions = {"python": platform.python_version(), "engine": "stub"}
    journal.emit("started", attempt=1, entry=ENTRY, pid=os.getpid(), task=task, versions=versions)
    sys.stdout.write(f"stub: {prompt}\n")
    prepare(journal, prompt)
    for phase in ("load", "text"):
        journal.emit("phase", phase=phase, message=f"stub {phase}")
        journal.emit(
            "progress", phase=phase, done=1, total=1, unit="file", rate=10.0, remaining_seconds=0.0, message=""
        )
        time.sleep(0.002)
    if "[fail]" in prompt:
        return fail(journal, "The options do not fit together.", "load", 2)
    if "[oom]" in prompt:
        return fail(journal, "Not enough memory: 99 GB are needed, 1 GB is free.", "denoise", 1)
    journal.emit("phase", phase="denoise", message="stub denoise")
    if not denoise(journal, run, prompt):
        journal.emit("stopped", reason="Stopped on request.")
        return 0
    journal.emit("phase", phase="save", message="stub save")
    outputs = save(journal, run, prompt, seed)
    journal.emit("finished", outputs=outputs, seconds=round(time.monotonic() - began, 3))
    return 0


def prepare(journal: Journal, prompt: str) -> None:
    """Do at once what the words in the prompt ask for at the start."""
    if "[ignore-stop]" in prompt and hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "[child]" in prompt:
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)"]
        )
        journal.emit("warning", message=f"child {child.pid}", field=None)
    if "[silent]" in prompt:
        os._exit(0)


def denoise(journal: Journal, run: Path, prompt: str) -> bool:
    """Step through; False when a stop was asked for."""
    total, pause = (400, 0.05) if "[slow]" in prompt or "[ignore-stop]" in prompt else (STEPS, 0.002)
    for step in range(1, total + 1):
        time.sleep(pause)
        left = round((total - step) * pause, 3)
        journal.emit("step", step=step, total=total, seconds_per_step=pause, remaining_seconds=left, item=1, items=1)
        if step == 2:
            misbehave(prompt)
        if (run / "requests" / "stop").exists() and "[ignore-stop]" not in prompt:
            journal.emit("request_done", request="stop")
            return False
    return True


def misbehave(prompt: str) -> None:
    """End or hang in the middle, as the prompt asks."""
    if "[crash]" in prompt:
        sys.stdout.write("stub: about to crash\n")
        sys.stdout.flush()
        os._exit(3)
    if "[kill]" in prompt:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    if "[hang]" in prompt:
        # SIGSTOP would do, but a hanging engine still has to react to SIGTERM; so only the journal falls silent.
        Journal.emit = lambda *_, **__: 0  # type: ignore[method-assign]
        time.sleep(600)


def fail(journal: Journal, message: str, phase: str, code: int) -> int:
    problems = [{"field": "width", "message": "must be a multiple of 16."}, {"field": None, "message": message}]
    shown = problems if code == 2 else []
    journal.emit("error", message=message, phase=phase, field=None, problems=shown, exit_code=code)
    sys.stderr.write(f"{message}\n")
    return code


def save(journal: Journal, run: Path, prompt: str, seed: int) -> list[str]:
    folder = run / "outputs"
    folder.mkdir(exist_ok=True)
    temporary, final = folder / ".clip.tmp.png", folder / "clip.png"
    temporary.write_bytes(png(SIZE, SIZE, seed % 256))
    os.replace(temporary, final)
    facts = {"width": SIZE, "height": SIZE, "frames": 1, "fps": 24, "seconds": 0.0}
    journal.emit("sample", path="outputs/clip.png", kind="image", seed=seed, prompt=prompt, item=1, **facts)
    return ["outputs/clip.png"]


if __name__ == "__main__":
    raise SystemExit(main())
