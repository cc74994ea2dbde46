"""A workspace with a dataset of stills and the training form over it; nothing here needs torch."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.config.state_record import COMPLETE, FORMAT, POSITION
from backend.config.train import TrainOptions
from k5ui.training_api import training_verbs
from tests.unit.k5ui.caching_kit import SECONDS, Studio


class Training:
    """Services with one dataset of four stills, the verbs of the form and its state."""

    def __init__(self, workspace: Path, exposed: bool = False, cached: bool = True) -> None:
        self.studio = Studio(workspace, exposed=exposed)
        if cached:
            self.studio.write_caches()
        self.services = self.studio.services
        self.verbs: dict[str, Callable[[Any], dict[str, Any]]] = {
            verb.__name__: verb for verb in training_verbs(self.services)
        }

    def ask(self, verb: str, *arguments: Any) -> dict[str, Any]:
        """What a verb answers."""
        return self.verbs[verb](list(arguments))

    def done(self, verb: str, *arguments: Any) -> dict[str, Any]:
        """What a verb answers that does what it is asked for."""
        answer = self.ask(verb, *arguments)
        assert "error" not in answer, answer
        assert "problems" not in answer, answer
        return answer

    def set(self, **values: Any) -> None:
        """Set options."""
        for name, value in values.items():
            self.done("set_train", name, value)

    def state(self) -> dict[str, Any]:
        """The state of the form after the caches have been looked at."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            state = self.services.training.state()
            if state["dataset"] is None or not state["dataset"]["checking"]:
                return state
            time.sleep(0.02)
        raise AssertionError(f"Not within {SECONDS} s.")

    def problems(self) -> dict[str, str]:
        """The problems by field."""
        return {problem["field"]: problem["message"] for problem in self.state()["problems"]}

    def start(self, queue: bool = False) -> str:
        """Start; the id of the run."""
        self.state()
        return self.done("start_train", {"queue": queue})["run"]

    def options(self, run: str) -> dict[str, Any]:
        """What the engine of a run would read."""
        return tomllib.loads((self.services.store.get(run).folder / "options.toml").read_text("utf-8"))


def write_state(folder: Path, options: TrainOptions, step: int = 500, epoch: int = 4) -> Path:
    """A whole state folder without tensors, as its record is read."""
    folder.mkdir(parents=True)
    record = {
        "position": {"step": step, "epoch": epoch, "batch": 0},
        "seed": 1,
        "processes": 1,
        "options": options.model_dump(mode="json"),
        "versions": {},
        "optimizer": "torch.optim.AdamW",
        "schedule": "",
        "extra": {},
    }
    (folder / POSITION).write_text(json.dumps(record))
    files = {POSITION: {"bytes": (folder / POSITION).stat().st_size, "sha256": ""}}
    (folder / COMPLETE).write_text(json.dumps({"format": FORMAT, "files": files}))
    return folder
