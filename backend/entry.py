"""What every command has in common: parse, open the journal, run, turn what happens into events and an exit code."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from backend.config.options import Options, parse_command_line
from backend.config.version import VERSION
from backend.errors import EngineError, Problems, Stopped, UserError
from backend.events import EventSink, Heartbeat, Journal, NullJournal
from backend.progress import Reporter

OptionsModel = TypeVar("OptionsModel", bound=Options)
Work = Callable[[OptionsModel, Reporter, Path | None], list[str]]
EXIT_INTERRUPTED = 130
_SHOWN_VERSIONS = ("torch", "diffusers", "transformers", "av")


def run_entry(
    model: type[OptionsModel], entry: str, description: str, argv: Sequence[str] | None, work: Work[OptionsModel]
) -> int:
    """Run `work` on the options of the command line; returns the exit code.

    0: finished, or stopped because somebody asked. 2: mistakes in the request, each in one sentence on stderr.
    1: a fault of the engine. 130: interrupted from the keyboard. With `--run_dir` everything is in the journal too;
    of several processes that a launcher started (RANK, WORLD_SIZE), the first one writes it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    run_dir = _run_dir_of(words)
    rank, count = _place()
    try:
        # A journal has one writer: the first of several processes.
        journal = _open_journal(run_dir if rank == 0 else None)
    except (Problems, OSError) as error:
        print(f"The journal in {run_dir} cannot be opened: {error}", file=sys.stderr)
        return Problems.exit_code
    reporter = Reporter(journal, run_dir, label=f"{rank + 1}/{count}" if count > 1 else "")
    started = time.monotonic()
    try:
        with Heartbeat(journal):
            options = parse_command_line(model, words, f"python -m backend.{entry}", description).options
            journal.emit(
                "started", entry=entry, pid=os.getpid(), task=getattr(options, "task", ""), versions=_versions()
            )
            outputs = work(options, reporter, run_dir)
        journal.emit("finished", outputs=outputs, seconds=round(time.monotonic() - started, 3))
        return 0
    except BaseException as error:
        return _report(error, journal, reporter, run_dir)
    finally:
        journal.close()


def _place() -> tuple[int, int]:
    """Which of how many processes this is, from 0; what makes no sense counts as alone and is reported by the work."""
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not rank.isdecimal() or not count.isdecimal() or int(rank) >= int(count):
        return 0, 1
    return int(rank), int(count)


def _open_journal(run_dir: Path | None) -> Journal | NullJournal:
    if run_dir is None:
        return NullJournal()
    run_dir.mkdir(parents=True, exist_ok=True)
    return Journal(run_dir / "events.jsonl")


def _run_dir_of(words: Sequence[str]) -> Path | None:
    """The run folder named on the command line, found even when the rest of it is wrong."""
    for index, word in enumerate(words):
        if word.startswith("--run_dir="):
            return Path(word.partition("=")[2])
        if word == "--run_dir" and index + 1 < len(words):
            return Path(words[index + 1])
    return None


def _report(error: BaseException, journal: EventSink, reporter: Reporter, run_dir: Path | None) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, Stopped):
        journal.emit("stopped", reason=str(error), **error.facts)
        print(str(error), file=sys.stderr)
        return Stopped.exit_code
    if isinstance(error, KeyboardInterrupt):
        journal.emit("stopped", reason="Interrupted from the keyboard.")
        print("Interrupted. Files that were finished are kept.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, Problems):
        listed = [{"field": problem.field, "message": problem.message} for problem in error.problems]
        message = error.message if isinstance(error, UserError) else f"{len(listed)} problems in the request."
        journal.emit(
            "error", message=message, phase=reporter.phase_name, problems=listed, exit_code=error.exit_code,
            field=error.problems[0].field,
        )  # fmt: skip
        print("\n".join(str(problem) for problem in error.problems), file=sys.stderr)
        return error.exit_code
    phase = error.phase if isinstance(error, EngineError) else reporter.phase_name
    message = str(error) or type(error).__name__
    journal.emit("error", message=message, phase=phase, problems=[], exit_code=EngineError.exit_code, field=None)
    print(f"The engine failed while it did '{phase}': {message}", file=sys.stderr)
    _keep_traceback(error, run_dir)
    return EngineError.exit_code


def _keep_traceback(error: BaseException, run_dir: Path | None) -> None:
    """The traceback goes into the log: stderr is the log of a run folder; a terminal gets the name of a file."""
    text = "".join(traceback.format_exception(error))
    if run_dir is not None:
        print(text, file=sys.stderr)
        return
    with tempfile.NamedTemporaryFile("w", prefix="k5-studio-", suffix=".log", delete=False, encoding="utf-8") as log:
        log.write(text)
    print(f"Details are in {log.name}.", file=sys.stderr)


def _versions() -> dict[str, str]:
    """Versions of Python, of this program and of the libraries that decide results, read without importing them."""
    found = {"python": platform.python_version(), "k5": VERSION}
    for name in _SHOWN_VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
