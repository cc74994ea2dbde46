"""A training without torch: the journal, files and answers to requests of a training run, for tests of the page.

The options of a real training decide what happens, as far as they are given: `max_train_steps`, `save_every_n_steps`,
`save_state`, `sample_every_n_steps`, `sample_at_first`, `validate_every_n_steps`, `output_name`, `learning_rate`,
`seed`, `resume` (a state folder that a stub wrote). An epoch has twenty steps. Words in `training_comment` choose the
rest: [slow] takes 0.05 s a step, [steady] 0.2 s, otherwise steps take 2 ms; [nan] has a step without a loss every
tenth time, [crash] dies at step 5, [fail] ends with problems, [oom] with a memory error, [ignore] answers no request.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.events import Journal

REQUESTS = ("stop", "stop_and_save", "stop_after_epoch", "save", "sample")
EPOCH_STEPS = 20
PROMPTS = ("a red circle moves right", "a blue square turns")


def is_training(options: dict[str, Any]) -> bool:
    """Whether the options are those of a training."""
    return any(name in options for name in ("max_train_steps", "network_dim", "output_name", "training_comment"))


@dataclass
class TrainingStub:
    """One training that is played."""

    journal: Journal
    run: Path
    options: dict[str, Any]
    step: int = 0
    outputs: list[str] = field(default_factory=list)

    def play(self, entry: str, picture: bytes) -> int:
        """Play it; `picture` is a whole PNG that stands for a sample. Returns the exit code."""
        self.picture = picture
        began = time.monotonic()
        self.total = int(self.options.get("max_train_steps", 40))
        self.pause = 0.05 if self.says("[slow]") else 0.2 if self.says("[steady]") else 0.002
        self.name = str(self.options.get("output_name", "k5_lora"))
        versions = {"python": platform.python_version(), "engine": "stub"}
        task = self.options.get("task", "k5-demo-t2v")
        self.journal.emit("started", attempt=1, entry=entry, pid=os.getpid(), task=task, versions=versions)
        self.journal.emit("phase", phase="load", message="Loading the stub")
        if self.says("[fail]"):
            return self._fail("The dataset has no caches.", "load", 2, "dataset_config")
        self._resume()
        self.journal.emit("phase", phase="train", message="Training")
        if self.options.get("sample_at_first") and self.step == 0:
            self._samples()
        reason = self._steps()
        if reason == "oom":
            return self._fail("Not enough memory: 99 GB are needed, 1 GB is free.", "train", 1, None)
        if reason:
            self.journal.emit("stopped", reason=reason, step=self.step)
            return 0
        self._save("end", f"{self.name}.safetensors", bool(self.options.get("save_state")), f"{self.name}-state")
        self.journal.emit("finished", outputs=self.outputs, seconds=round(time.monotonic() - began, 3))
        return 0

    def says(self, word: str) -> bool:
        return word in str(self.options.get("training_comment", ""))

    def _resume(self) -> None:
        given = self.options.get("resume")
        if not given:
            return
        position = json.loads((Path(given) / "position.json").read_text("utf-8"))
        self.step = position["step"]
        message = f"Going on after step {self.step}"
        self.journal.emit(
            "phase", phase="resume", message=message, step=self.step, epoch=self._epoch(), path=str(given)
        )

    def _epoch(self) -> int:
        return self.step // EPOCH_STEPS

    def _steps(self) -> str:
        """Step through; "" at the end, otherwise why it ended before."""
        leaving = False
        while self.step < self.total:
            asked = self._poll()
            if "stop" in asked:
                return "Stopped on request; nothing was saved."
            if "stop_and_save" in asked:
                self._save_step("stop", state=True)
                return "Stopped and saved on request."
            leaving = leaving or "stop_after_epoch" in asked
            if "save" in asked:
                self._save_step("request", state=bool(self.options.get("save_state")))
            if "sample" in asked:
                self._samples()
            time.sleep(self.pause)
            self.step += 1
            self._tell_step()
            if self.step == 5 and self.says("[crash]"):
                os._exit(3)
            if self.step == 3 and self.says("[oom]"):
                return "oom"
            if leaving and self.step % EPOCH_STEPS == 0:
                self._save_step("stop", state=True)
                return "Stopped after the epoch on request."
            self._after_step()
        return ""

    def _after_step(self) -> None:
        if self._due("save_every_n_steps") and self.step < self.total:
            self._save_step("step", state=bool(self.options.get("save_state")))
        if self._due("sample_every_n_steps"):
            self._samples()
        if self._due("validate_every_n_steps"):
            by_sigma = [[0.2, self._loss(0.1)], [0.5, self._loss(0.2)], [0.8, self._loss(0.3)]]
            self.journal.emit(
                "validation", step=self.step, epoch=self._epoch(), loss=self._loss(0.2), by_sigma=by_sigma, items=2,
                took_seconds=0.01,
            )  # fmt: skip

    def _due(self, name: str) -> bool:
        every = self.options.get(name)
        return bool(every) and self.step % int(every) == 0

    def _loss(self, floor: float) -> float:
        """Falls towards `floor`, with a wave on top instead of chance."""
        return floor + 0.6 * math.exp(-self.step / 60) + 0.03 * math.sin(self.step * 12.9898)

    def _tell_step(self) -> None:
        skipped = self.says("[nan]") and self.step % 10 == 0
        fields: dict[str, Any] = {"skipped": True} if skipped else {}
        left = (self.total - self.step) * self.pause
        bands = [None if (self.step + band) % 3 == 0 else self._loss(0.05 * band) for band in range(5)]
        self.journal.emit(
            "step",
            step=self.step,
            total=self.total,
            epoch=(self.step - 1) // EPOCH_STEPS + 1,
            epochs=-(-self.total // EPOCH_STEPS),
            loss=None if skipped else self._loss(0.1),
            lr=float(self.options.get("learning_rate", 1e-4)) * min(1.0, self.step / 10),
            grad_norm=None if skipped else 0.5 + 0.2 * math.cos(self.step),
            band_loss=bands,
            seconds_per_step=self.pause,
            remaining_seconds=round(left, 3),
            step_seconds=self.pause,
            memory_bytes=(200 << 20) + self.step * 1000,
            **fields,
        )
        sys.stdout.write(f"stub: step {self.step}/{self.total}\n")

    def _poll(self) -> set[str]:
        """What was asked for since the last look; each is answered and moved away."""
        folder = self.run / "requests"
        if self.says("[ignore]") or not folder.is_dir():
            return set()
        found = {name for name in REQUESTS if (folder / name).is_file()}
        for name in found:
            (folder / "done").mkdir(exist_ok=True)
            os.replace(folder / name, folder / "done" / f"{name}-{self.step}")
            self.journal.emit("request_done", request=name, step=self.step)
        return found

    def _samples(self) -> None:
        self.journal.emit("phase", phase="sample", message=f"Sampling at step {self.step}")
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        seed = int(self.options.get("seed", 42))
        for index, prompt in enumerate(PROMPTS, 1):
            path = folder / f"{self.name}-step{self.step:06d}-p{index:02d}.png"
            _write(path, self.picture)
            facts = {"step": self.step, "epoch": self._epoch(), "prompt": prompt, "seed": seed, "index": index}
            shown = {"path": f"samples/{path.name}", "kind": "image", "width": 8, "height": 8, "frames": 1, "fps": 24}
            with open(folder / "manifest.jsonl", "a", encoding="utf-8") as manifest:
                manifest.write(json.dumps(shown | facts) + "\n")
            self.journal.emit("sample", **shown, **facts, seconds=0.0, took_seconds=0.01)
        self.journal.emit("phase", phase="train", message="Training")

    def _save_step(self, why: str, state: bool) -> None:
        stem = f"{self.name}-step{self.step:08d}"
        self._save(why, f"{stem}.safetensors", state, f"{stem}-state")

    def _save(self, why: str, file: str, state: bool, state_name: str) -> None:
        folder = self.run / "checkpoints"
        folder.mkdir(exist_ok=True)
        content = _safetensors({"ss_output_name": self.name, "ss_steps": str(self.step)})
        _write(folder / file, content)
        self.outputs.append(f"checkpoints/{file}")
        facts = {"step": self.step, "epoch": self._epoch(), "why": why, "took_seconds": 0.01}
        digest = hashlib.sha256(content).hexdigest()
        self.journal.emit(
            "checkpoint", path=f"checkpoints/{file}", kind="lora", bytes=len(content), sha256=digest, **facts
        )
        if state:
            (folder / state_name).mkdir(exist_ok=True)
            _write(folder / state_name / "position.json", json.dumps({"step": self.step}).encode())
            _write(folder / state_name / "COMPLETE.json", b"{}")
            self.journal.emit("checkpoint", path=f"checkpoints/{state_name}", kind="state", bytes=20, **facts)

    def _fail(self, message: str, phase: str, code: int, name: str | None) -> int:
        problems = [{"field": name, "message": message}] if code == 2 else []
        self.journal.emit("error", message=message, phase=phase, field=name, problems=problems, exit_code=code)
        sys.stderr.write(f"{message}\n")
        return code


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _safetensors(metadata: dict[str, str]) -> bytes:
    """A whole file of the format with one small tensor."""
    body = {"__metadata__": metadata, "lora_unet_x.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
    header = json.dumps(body).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0)
