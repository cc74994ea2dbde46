"""Training commands in processes of their own, forked from one that has imported everything already.

A process that starts from nothing spends many seconds on imports; a hundred of them would take half an hour. This file
is that process when it is run as a module: it reads a line with a list of words, forks, and writes the child's number
and then, when it has ended, its exit code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

# Also what the command imports only when it needs it, which takes most of its time: optimizers and schedules.
_IMPORTS = (
    "backend.kandinsky5_train_network",
    "backend.training.trainer",
    "torch._dynamo",
    "transformers.optimization",
)


class TrainingServer:
    """Starts training commands; one at a time."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> TrainingServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(self, *words: str, kill_when: Callable[[], bool] | None = None, number: int = signal.SIGKILL) -> int:
        """Run a command to its end, or until `kill_when` is true; the exit code, negative for a signal."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        child = int(self._line())
        if kill_when is not None:
            while not kill_when() and _alive(child):
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(child, number)
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._log.read_text(errors="replace")[-3000:]
        return line


def _alive(child: int) -> bool:
    """Whether it works; what has ended and was not looked at yet does not."""
    try:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _serve(log: Path) -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    from backend.kandinsky5_train_network import main

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            os._exit(main(json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
