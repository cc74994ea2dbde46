"""What the live view of a training shows: its state, its lists and the columns of its chart, as plain dictionaries."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from backend.errors import UserError
from backend.jobs import runner
from backend.jobs.facts import EVENTS_FILE, read_facts
from backend.jobs.store import Run
from backend.jobs.view import RunView
from k5ui.training.checkpoints import Attempts, checkpoint_rows
from k5ui.training.journal import TrainingJournal
from k5ui.training.series import BANDS, NAMES, bucket_width, plain, reach, sigma_for, smooth, thin

MAX_POINTS = 2000
#: Share of a run's length that the smoothing takes in, by the strength that is asked for.
SMOOTHING = (0.005, 0.01, 0.02, 0.04, 0.08)
_KEPT_JOURNALS = 16
_MAX_SAMPLES = 600
_MAX_MARKS = 400
_SHOWN_WARNINGS = 20
_SAMPLE_FIELDS = ("step", "epoch", "index", "prompt", "seed", "kind", "width", "height", "frames", "fps", "seconds")
_BANDS = [f"band{index}" for index in range(BANDS)]
_SINGLE = [name for name in NAMES if name not in _BANDS]

if TYPE_CHECKING:
    from k5ui.services import Services


@dataclass(frozen=True)
class Window:
    """What the page asks of a chart.

    `key` and `since` are those of the last answer: then only what is new comes. `first` and `last` are the steps that
    are looked at (None: all). `validations` is how many validations the page knows.
    """

    since: int = 0
    key: str = ""
    points: int = MAX_POINTS
    first: int | None = None
    last: int | None = None
    smoothing: int = 2
    chain: bool = False
    validations: int = -1


@dataclass(frozen=True)
class _Rows:
    """The rows of a run, perhaps behind those of earlier attempts."""

    steps: NDArray[numpy.int64]
    columns: dict[str, NDArray[numpy.float32]]
    validations: list[dict[str, Any]]
    mark: str
    read: float


class LiveTrainings:
    """The live view of every training of a workspace; the journals of the last 16 that were looked at stay in memory.

    Methods may be called from any thread and answer within about half a second; a journal that is too long for that is
    taken in over several calls, `read` of the answers says how far.

    Raises (all methods that take a run):
        UserError: there is no such training.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._guard = threading.Lock()
        self._journals: OrderedDict[tuple[str, int], TrainingJournal] = OrderedDict()
        self._attempts = Attempts(self._trainings, services.pages.options_of, self._checkpoints, self._resumes)

    # --- lists ----------------------------------------------------------------------------------------------------

    def list(self) -> list[dict[str, Any]]:
        """All trainings to choose from, newest first: id, title, state, step, total, loss, task, created, seconds."""
        names = ("id", "title", "step", "total", "epoch", "epochs", "loss", "task", "created", "seconds")
        return [
            {name: getattr(view, name) for name in names} | {"state": view.state.value}
            for view in self._services.runs(200)
            if view.kind == "train"
        ]

    def page(self, run_id: str, version: str = "", chain: bool = False) -> dict[str, Any]:
        """The state of one training, and its lists if `version` is not theirs any more.

        Times in seconds, `budget` by what they were spent on; `attempts` are the earlier attempts and this one, oldest
        first, each with the step after which it began.
        """
        run, view = self._find(run_id)
        journal = self._journal(run)
        with journal.guard:
            read = journal.read()
            budget, skipped, stopping = dict(journal.budget), journal.skipped, set(journal.stopping)
        links = self._attempts.chain(run)
        used = links if chain else links[-1:]
        # Files of an earlier attempt may be removed by a later one, so its numbers of lists count too.
        current = ".".join(f"{link.id}-{self._journal(link).version}" for link, _ in used)
        facts = read_facts(run.folder)
        pending = sorted((facts.requests & runner.REQUESTS) | stopping) if view.state.alive else []
        page = self._services.pages.summary(run, view) | {
            "budget": {name: round(seconds, 3) for name, seconds in budget.items()},
            "skipped": skipped,
            "requests": pending,
            "killing": view.state.alive and "kill" in facts.requests,
            "warnings": view.warnings[-_SHOWN_WARNINGS:],
            "attempts": [{"run": link.id, "title": link.title, "after": step} for link, step in links],
            "read": round(read, 4),
            "version": current,
        }
        del page["outputs"]
        return page if current == version else page | self._lists(used)

    def _lists(self, links: list[tuple[Run, int | None]]) -> dict[str, Any]:
        checkpoints: list[dict[str, Any]] = []
        samples: list[dict[str, Any]] = []
        marks: list[tuple[int, str]] = []
        for index, (run, after) in enumerate(links):
            end = links[index + 1][1] if index + 1 < len(links) else None
            journal = self._journal(run)
            with journal.guard:
                saved, made, resumes = list(journal.checkpoints), list(journal.samples), list(journal.resumes)
            # What an earlier attempt did after the state that the next one went on from belongs to another line.
            saved = [record for record in saved if end is None or record["step"] <= end]
            made = [record for record in made if end is None or record["step"] <= end]
            checkpoints += [row | {"run": run.id} for row in checkpoint_rows(run, saved, self._allowed)]
            samples += self._samples(run, made)
            marks += [(record["step"], str(record.get("kind"))) for record in saved]
            marks += [(record["step"], "sample") for record in made]
            begins = {record["step"] for record in resumes} | ({after} if after is not None else set())
            marks += [(step, "resume") for step in begins]
        checkpoints.sort(key=lambda row: -row["t"])
        samples.sort(key=lambda row: (-row["step"], row["index"] or 0))
        prompts = {row["index"]: row["prompt"] for row in reversed(samples)}
        return {
            "checkpoints": checkpoints,
            "samples": samples[:_MAX_SAMPLES],
            "prompts": [{"index": index, "prompt": prompts[index]} for index in sorted(prompts)],
            "marks": _spread(marks),
        }

    def _samples(self, run: Run, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for record in records[-_MAX_SAMPLES:]:
            output = self._services.pages.output(run.id, record)
            if output is not None:
                shown = {name: record.get(name) for name in _SAMPLE_FIELDS}
                index = shown["index"] if type(shown["index"]) is int else 0
                rows.append(shown | {"index": index, "url": output["url"], "media": output["media"], "run": run.id})
        return rows

    # --- the chart ------------------------------------------------------------------------------------------------

    def series(self, run_id: str, window: Window) -> dict[str, Any]:
        """The columns of the chart; see `Window`.

        With `reset` they replace what the page has; else it keeps its points before step `from`, and the smoothed ones
        before step `smooth_from`, and puts these behind them. `rows` and `key` are for the next call.
        """
        run, _ = self._find(run_id)
        links: list[tuple[Run, int | None]] = self._attempts.chain(run) if window.chain else [(run, None)]
        with ExitStack() as stack:
            rows = self._rows(links, stack)
            answer = _chart(rows, window)
        known = len(rows.validations) == window.validations
        answer["validation"] = None if known else _validation(rows.validations)
        return answer | {"validations": len(rows.validations), "read": round(rows.read, 4)}

    def _rows(self, links: list[tuple[Run, int | None]], stack: ExitStack) -> _Rows:
        """The rows of all attempts, each up to where the next one went on; the journals stay locked by `stack`."""
        parts: list[tuple[TrainingJournal, int]] = []
        validations: list[dict[str, Any]] = []
        read, mark = 1.0, ""
        for index, (run, _) in enumerate(links):
            journal = self._journal(run)
            stack.enter_context(journal.guard)
            read = min(read, journal.read(0.4 / len(links)))
            end = links[index + 1][1] if index + 1 < len(links) else None
            count = journal.columns.rows
            if end is not None:
                count = int(numpy.searchsorted(journal.columns.steps, end, side="right"))
            parts.append((journal, count))
            validations += [row for row in journal.validations if end is None or row["step"] <= end]
            mark += f"{run.id}:{journal.columns.generation}:{count if end is not None else ''}/"
        if len(parts) == 1:
            columns = parts[0][0].columns
            return _Rows(columns.steps, {name: columns.column(name) for name in NAMES}, validations, mark, read)
        steps = numpy.concatenate([journal.columns.steps[:count] for journal, count in parts])
        values = {
            name: numpy.concatenate([journal.columns.column(name)[:count] for journal, count in parts])
            for name in NAMES
        }
        return _Rows(steps, values, validations, mark, read)

    # --- requests -------------------------------------------------------------------------------------------------

    def ask(self, run_id: str, name: str) -> None:
        """Ask a training for something (see `runner.REQUESTS`); one that waits can only be taken out of the queue.

        Raises:
            UserError: no such training, an unknown request, or it has ended.
        """
        run, _ = self._find(run_id)
        if name == "stop":
            self._services.stop(run.id)
        else:
            runner.request(run, name)

    def lora(self, run_id: str, path: str) -> tuple[str, str]:
        """(path, task) of a LoRA file that a training has saved and that is still there.

        Raises:
            UserError: it has saved no such file.
        """
        run, view = self._find(run_id)
        for link, _ in self._attempts.chain(run):
            if any(row["path"] == path and row["kind"] == "lora" for row in self._saved(link)):
                return path, view.task
        raise UserError("This training has no such LoRA file (any more). Load the page again.")

    # --- helpers --------------------------------------------------------------------------------------------------

    def _find(self, run_id: str) -> tuple[Run, RunView]:
        run, view = self._services.run(run_id)
        if view.kind != "train":
            raise UserError(f"The run '{run.title}' is no training.")
        return run, view

    def _journal(self, run: Run) -> TrainingJournal:
        path = run.folder / EVENTS_FILE
        try:
            key = (run.id, path.stat().st_ino)
        except OSError:
            key = (run.id, 0)
        with self._guard:
            journal = self._journals.setdefault(key, TrainingJournal(path))
            self._journals.move_to_end(key)
            while len(self._journals) > _KEPT_JOURNALS:
                self._journals.popitem(last=False)
            return journal

    def _trainings(self) -> list[Run]:
        return [run for run in self._services.store.list() if run.kind in ("train", "")]

    def _checkpoints(self, run: Run) -> list[dict[str, Any]]:
        journal = self._journal(run)
        with journal.guard:
            journal.read()
            return list(journal.checkpoints)

    def _resumes(self, run: Run) -> list[dict[str, Any]]:
        journal = self._journal(run)
        with journal.guard:
            journal.read()
            return list(journal.resumes)

    def _saved(self, run: Run) -> list[dict[str, Any]]:
        return checkpoint_rows(run, self._checkpoints(run), self._allowed)

    def _allowed(self, path: Path) -> bool:
        roots = self._services.roots
        return not roots.exposed or roots.allows(path)


def _chart(rows: _Rows, window: Window) -> dict[str, Any]:
    """The part of the chart that the page does not have, thinned to `window.points` in all."""
    steps = rows.steps
    total = len(steps)
    begin = 0 if window.first is None else max(0, int(numpy.searchsorted(steps, window.first)) - 1)
    end = total if window.last is None else min(total, int(numpy.searchsorted(steps, window.last, side="right")) + 1)
    if end <= begin:
        empty: dict[str, Any] = {"step": [], "smooth": [], "bands": [[] for _ in _BANDS]}
        base = {"key": "", "rows": total, "reset": True, "from": 0, "smooth_from": 0, "first": None, "last": None}
        return empty | {name: [] for name in _SINGLE} | base
    width = bucket_width(int(steps[begin]), int(steps[end - 1]), window.points)
    sigma = sigma_for(int(steps[-1] - steps[0]) + 1, SMOOTHING[window.smoothing])
    key = f"{rows.mark}{width}|{sigma:.5g}|{begin}|{window.first}|{window.last}"
    reset = key != window.key or window.since > total
    new = begin if reset else max(begin, window.since)
    if new < end:
        cut = int(steps[new]) // width * width
        smooth_cut = max(int(steps[begin]), int(steps[new]) - reach(sigma)) // width * width
    else:
        cut = smooth_cut = int(steps[end - 1]) + 1
    fresh = slice(max(begin, int(numpy.searchsorted(steps, cut))), end)
    drawn = thin(steps[fresh], {name: values[fresh] for name, values in rows.columns.items()}, width)
    again = slice(max(begin, int(numpy.searchsorted(steps, smooth_cut))), end)
    at = thin(steps[again], {}, width).steps
    return {
        "key": key,
        "rows": total,
        "reset": reset,
        "from": cut,
        "smooth_from": smooth_cut,
        "first": int(steps[0]),
        "last": int(steps[-1]),
        "step": drawn.steps.tolist(),
        "smooth": plain(smooth(steps, rows.columns["loss"], at, sigma)),
        "bands": [plain(drawn.values[name]) for name in _BANDS],
    } | {name: plain(drawn.values[name]) for name in _SINGLE}


def _validation(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Validations as columns; of more than can be drawn, evenly spread ones."""
    latest = list({record["step"]: record for record in records}.values())
    latest.sort(key=lambda record: record["step"])
    stride = math.ceil(len(latest) / (MAX_POINTS // 2)) or 1
    shown = [*latest[::-stride]][::-1]
    return {"step": [record["step"] for record in shown], "loss": [float(record["loss"]) for record in shown]}


def _spread(marks: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Marks without doubles, at most 400 of a kind, evenly spread over their steps."""
    found: list[tuple[int, str]] = []
    for kind in sorted({kind for _, kind in marks}):
        steps = sorted({step for step, other in marks if other == kind})
        stride = math.ceil(len(steps) / _MAX_MARKS)
        found += [(step, kind) for step in steps[::stride]]
    return found
