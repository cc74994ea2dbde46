"""Runs as the routes and the page show them: plain dictionaries, with addresses instead of paths."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from backend.config.options import load_toml
from backend.errors import UserError
from backend.jobs.facts import OPTIONS_FILE
from backend.jobs.store import Run
from backend.jobs.view import RunView
from k5ui.media import MediaIds

CLIP_KINDS = ("video", "image")
_OUTPUT_FIELDS = ("kind", "width", "height", "frames", "fps", "seconds", "seed", "prompt", "item")
_RUN_FIELDS = (
    *("id", "kind", "title", "phase", "step", "total", "unit", "item", "items", "item_name"),
    *("seconds_per_step", "remaining_seconds", "epoch", "epochs", "loss"),
    *("created", "started", "ended", "seconds", "message", "problems", "queue_position", "stop_requested"),
)
_DETAIL_FIELDS = ("warnings", "exit_code", "signal", "stalled_seconds", "silent_seconds", "gap", "log_tail", "attempt")
_CACHED_RUNS = 2000
#: A training may have thousands of samples; the lists of runs show the newest, the live view all.
_LISTED_SAMPLES = 8


@dataclass(frozen=True)
class _Asked:
    """What a run's options say, for runs whose journal does not say it yet."""

    values: dict[str, Any]

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        return value if isinstance(value, str) else None

    def whole(self, name: str) -> int | None:
        value = self.values.get(name)
        return value if type(value) is int else None


class RunPages:
    """Makes dictionaries of runs. Addresses begin with /api; the page puts them below its own, as behind a proxy."""

    def __init__(self, media: MediaIds) -> None:
        self._media = media
        self._guard = threading.Lock()
        self._asked: OrderedDict[str, _Asked] = OrderedDict()

    def options_of(self, run: Run) -> dict[str, Any]:
        """The options of a run as plain values, read once; empty if its file is missing or damaged."""
        with self._guard:
            known = self._asked.get(run.id)
        if known is None:
            try:
                known = _Asked(load_toml(run.folder / OPTIONS_FILE))
            except UserError:
                return {}
            with self._guard:
                self._asked[run.id] = known
                while len(self._asked) > _CACHED_RUNS:
                    self._asked.popitem(last=False)
        return known.values

    def summary(self, run: Run, view: RunView) -> dict[str, Any]:
        """One row of GET /api/runs."""
        asked = _Asked(self.options_of(run))
        return {name: getattr(view, name) for name in _RUN_FIELDS} | {
            "state": view.state.value,
            "reason": view.reason.value,
            "prompt": view.prompt if view.prompt is not None else asked.text("prompt"),
            "task": view.task or asked.text("task") or "",
            "seed": view.seed if view.seed is not None else asked.whole("seed"),
            "outputs": self.outputs(view),
        }

    def detail(self, run: Run, view: RunView) -> dict[str, Any]:
        """GET /api/runs/{id}: the row and what only the open run needs."""
        try:
            text = (run.folder / OPTIONS_FILE).read_text("utf-8", errors="replace")
        except OSError:
            text = ""
        extra = {name: getattr(view, name) for name in _DETAIL_FIELDS}
        return self.summary(run, view) | extra | {"options_toml": text}

    def outputs(self, view: RunView) -> list[dict[str, Any]]:
        """What the run has made and the page can show, oldest first; files that are gone or elsewhere are left out, and
        of a training all samples but the newest."""
        listed = view.outputs[-_LISTED_SAMPLES:] if view.kind == "train" else view.outputs
        shown = (self.output(view.id, sample) for sample in listed)
        return [output for output in shown if output is not None]

    def output(self, run_id: str, sample: dict[str, Any]) -> dict[str, Any] | None:
        """The `sample` record of a journal with a media id and an address instead of its path, or None."""
        path = sample.get("path")
        offered = self._media.offer(run_id, path) if isinstance(path, str) else None
        if offered is None:
            return None
        media, changed = offered
        # The time of change is in the address: a browser may keep the file, and a rewritten file is a new address.
        address = f"/api/media/{media}?v={changed:x}"
        return {"media": media, "url": address, "name": str(path).rpartition("/")[2]} | {
            name: sample.get(name) for name in _OUTPUT_FIELDS
        }

    def clips(self, run: Run, view: RunView) -> list[dict[str, Any]]:
        """The videos and images of a run, newest first, as GET /api/clips lists them; samples of trainings are none."""
        if view.kind == "train":
            return []
        task = view.task or _Asked(self.options_of(run)).text("task") or ""
        about = {
            "task": task,
            "run_id": run.id,
            "title": run.title,
            "created": view.ended or view.started or run.created,
        }
        return [output | about for output in reversed(self.outputs(view)) if output["kind"] in CLIP_KINDS]
