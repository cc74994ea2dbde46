"""Writes run folders of trainings that never ran, with as many steps as asked for, for tests of the live view.

`python -m tests.fakes.training_journal RUN_FOLDER STEPS [SECONDS]` makes a whole run at once, or, with SECONDS, one
that grows for so long and counts as alive as long as this process lives.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from backend.config.state_record import COMPLETE, FORMAT, POSITION

ENTRY = "kandinsky5_train_network"


class RunWriter:
    """One run folder; `emit` adds a record to the journal in memory, `flush` writes what waits."""

    def __init__(self, folder: Path, title: str = "wave", created: float | None = None, **options: Any) -> None:
        self.folder = folder
        (folder / "requests").mkdir(parents=True)
        self.time = time.time() - 86_400 if created is None else created
        request = {"kind": "train", "title": title, "created": self.time, "entry": ENTRY}
        (folder / "request.json").write_text(json.dumps(request))
        values = {"task": "k5-demo-t2v", "output_name": title} | options
        (folder / "options.toml").write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        )
        self.seq = 0
        self._waiting: list[str] = []

    def claim(self, alive: bool = False) -> None:
        """Count as started; with `alive` this process is the engine."""
        (self.folder / "started.json").write_text(json.dumps({"time": self.time}))
        self.emit("started", attempt=1, entry=ENTRY, pid=os.getpid() if alive else 1, task="k5-demo-t2v", versions={})
        self.flush()

    def emit(self, type: str, **fields: Any) -> None:
        """Add a record at the time of the run, which only `time` moves."""
        self.seq += 1
        record = {"v": 1, "seq": self.seq, "t": round(self.time, 3), "type": type} | fields
        self._waiting.append(json.dumps(record, separators=(",", ":")))

    def flush(self) -> None:
        """Write the waiting records."""
        if self._waiting:
            with open(self.folder / "events.jsonl", "a", encoding="utf-8") as journal:
                journal.write("\n".join(self._waiting) + "\n")
            self._waiting.clear()

    def step(self, step: int, total: int, loss: float | None, seconds: float = 0.4, **fields: Any) -> None:
        """A step as the trainer writes it."""
        self.time += seconds
        values = {"epoch": (step - 1) // 48 + 1, "epochs": -(-total // 48), "loss": loss, "lr": 1e-4, "grad_norm": 0.5}
        values |= {"band_loss": [loss, None, loss, None, loss], "memory_bytes": 1_000_000_000 + step}
        values |= {"seconds_per_step": seconds, "step_seconds": seconds, "remaining_seconds": (total - step) * seconds}
        self.emit("step", step=step, total=total, **(values | fields))

    def save(self, name: str, step: int, kind: str = "lora", why: str = "step", **fields: Any) -> Path:
        """A LoRA file or a state that is there, and its record."""
        path = self.folder / "checkpoints" / name
        if kind == "state":
            write_state(path, step)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"lora")
        values = {"step": step, "epoch": 1, "path": f"checkpoints/{name}", "kind": kind, "why": why, "bytes": 4}
        self.emit("checkpoint", **(values | fields))
        return path

    def end(self, type: str = "finished", exit_code: int = 0, **fields: Any) -> None:
        """Write the last record and the result."""
        self.emit(type, **fields)
        self.flush()
        result = {"exit_code": exit_code, "signal": None, "ended": self.time}
        (self.folder / "result.json").write_text(json.dumps(result))


def write_state(folder: Path, step: int) -> None:
    """A folder that reads as a whole state, without tensors."""
    folder.mkdir(parents=True)
    record: dict[str, Any] = {"position": {"step": step, "epoch": 0, "batch": 0}, "seed": 1, "processes": 1}
    record |= {"options": {}, "versions": {}, "optimizer": "", "schedule": "", "extra": {}}
    size = (folder / POSITION).write_text(json.dumps(record))
    (folder / COMPLETE).write_text(json.dumps({"format": FORMAT, "files": {POSITION: {"bytes": size, "sha256": ""}}}))


def curve(step: int, total: int, chance: random.Random) -> float:
    """A loss that falls to a fifth, with the noise of random timesteps."""
    return (0.1 + 0.4 * math.exp(-6 * step / total)) * math.exp(chance.gauss(0, 0.4))


def write_run(folder: Path, steps: int, title: str = "wave", **options: Any) -> RunWriter:
    """A finished run of so many steps."""
    run = RunWriter(folder, title, **options)
    run.claim()
    run.emit("phase", phase="train", message="Training")
    chance = random.Random(7)
    for step in range(1, steps + 1):
        run.step(step, steps, curve(step, steps, chance))
        if step % 10_000 == 0:
            run.flush()
    run.end(outputs=[], seconds=steps * 0.4)
    return run


def grow(folder: Path, steps: int, seconds: float) -> None:
    """A run that is alive and does `steps` steps within about `seconds`; `written.txt` gets the time of each tenth of a
    second and the step then, so that a reader can tell how late it is."""
    run = RunWriter(folder, "growing", time.time())
    run.claim(alive=True)
    run.emit("phase", phase="train", message="Training")
    chance = random.Random(7)
    began, done = time.time(), 0
    while done < steps:
        run.time = time.time()
        due = min(steps, int(steps * (run.time - began) / seconds) + 1)
        for step in range(done + 1, due + 1):
            run.step(step, steps, curve(step, steps, chance), 0.0)
        done = due
        run.flush()
        with open(folder / "written.txt", "a", encoding="utf-8") as log:
            log.write(f"{time.time():.3f} {done}\n")
        time.sleep(0.1)
    while not (folder / "end").exists() and os.getppid() != 1:
        time.sleep(0.1)
    run.time = time.time()
    run.end(outputs=[], seconds=run.time - began)


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        grow(folder, steps, float(sys.argv[3]))
    else:
        write_run(folder, steps)


if __name__ == "__main__":
    main()
