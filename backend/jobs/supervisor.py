"""The small process beside every engine: starts it once, waits for it, writes down how it ended.

`python -m backend.jobs.supervisor <run folder>` lives in a session of its own, so the app may come and go. It claims
the run by creating started.json exclusively; a second supervisor on the same folder ends at once and does nothing.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from backend.errors import K5Error, UserError
from backend.files import fsync_folder, write_atomic
from backend.jobs.facts import COMMAND_FILE, LOG_FILE, OPTIONS_FILE, REQUEST_FILE, RESULT_FILE, STARTED_FILE, read_json
from backend.jobs.process import ProcessIdentity, end_tree, identify

#: What a person does -> the module under `backend` that does it.
ENTRIES = {
    "generate": "kandinsky5_generate_video",
    "train": "kandinsky5_train_network",
    "cache_latents": "kandinsky5_cache_latents",
    "cache_text": "kandinsky5_cache_text_encoder_outputs",
    "check_dataset": "kandinsky5_check_dataset",
}
PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_RESULT_ATTEMPTS = 10
_NEW_WINDOWS_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)


def module_of(entry: str) -> str:
    """The module that `python -m` runs for an entry: a bare name lies under `backend`.

    Raises:
        UserError: the entry is no module name.
    """
    if not _MODULE_NAME.fullmatch(entry):
        raise UserError(f"{entry!r} is not a program of this project. Delete the run and make it again.")
    return entry if "." in entry else f"backend.{entry}"


def claim(folder: Path, who: dict[str, Any]) -> bool:
    """Create started.json with `who` and the time in it; False if it is there already. Only one caller ever succeeds.

    Raises:
        OSError: the folder is gone or cannot be written; then nothing is claimed.
    """
    content = json.dumps({"time": round(time.time(), 3), **who}).encode() + b"\n"
    try:
        descriptor = os.open(folder / STARTED_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        (folder / STARTED_FILE).unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    fsync_folder(folder)
    return True


def engine_environment() -> dict[str, str]:
    """This process' environment with what lets `-m backend.x` work from any folder and brings the log out at once.

    The current folder is kept off the module path: a folder called `backend` there would hide ours.
    """
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def detached() -> dict[str, Any]:
    """Popen arguments for a process that outlives its parent and has no terminal."""
    if os.name == "nt":
        return {"creationflags": _NEW_WINDOWS_GROUP}
    return {"start_new_session": True}


def write_result(folder: Path, **result: Any) -> None:
    """Write result.json, again and again for some seconds: a full disk may have room when the engine's rest is gone.

    Raises:
        OSError, K5Error: it could not be written.
    """
    content = json.dumps({**result, "ended": round(time.time(), 3)}) + "\n"
    for attempt in range(_RESULT_ATTEMPTS):
        if not folder.is_dir():  # write_atomic would make it again
            raise FileNotFoundError(f"{folder} was deleted.")
        try:
            write_atomic(folder / RESULT_FILE, content)
            return
        except (OSError, K5Error):
            if attempt == _RESULT_ATTEMPTS - 1:
                raise
            time.sleep(1.0)


def supervise(folder: Path, entry: str) -> int:
    """Run the job of `folder` once, to its end. Returns 0, also when another supervisor was first.

    `entry` is a name that the caller has checked. Raises what `claim` and `write_result` raise.
    """
    module = module_of(entry)
    me = identify(os.getpid())
    if not claim(folder, {"supervisor": me.as_dict() if me else None}):
        return 0
    argv = [sys.executable, "-m", module, "--config_file", str(folder / OPTIONS_FILE), "--run_dir", str(folder)]
    try:
        with open(folder / LOG_FILE, "ab", buffering=0) as log:
            engine = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=engine_environment(),
                **detached(),
            )
    except (OSError, ValueError) as error:
        write_result(folder, exit_code=None, signal=None, error=f"The engine could not be started: {error}")
        return 0
    identity = identify(engine.pid)
    _write_command(folder, argv, identity, me)
    code = _wait(engine, identity)
    write_result(folder, exit_code=code if code >= 0 else None, signal=-code if code < 0 else None)
    return 0


def _write_command(
    folder: Path, argv: list[str], engine: ProcessIdentity | None, supervisor: ProcessIdentity | None
) -> None:
    command = {
        "argv": argv,
        "cwd": str(Path.cwd()),
        "versions": {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"},
        "started": round(time.time(), 3),
        "pid": engine.pid if engine else None,
        "create_time": engine.create_time if engine else None,
        "boot_id": engine.boot_id if engine else "",
        "engine": engine.as_dict() if engine else None,
        "supervisor": supervisor.as_dict() if supervisor else None,
    }
    try:
        write_atomic(folder / COMMAND_FILE, json.dumps(command, indent=1) + "\n")
    except (OSError, K5Error) as error:
        # The engine runs and its journal names its pid; waiting for it matters more than this file.
        sys.stderr.write(f"{COMMAND_FILE} could not be written: {error}\n")


def _wait(engine: subprocess.Popen[Any], identity: ProcessIdentity | None) -> int:
    """Wait for the engine, end what it leaves behind, and return its exit code (negative: the signal)."""
    if hasattr(os, "waitid"):
        # Wait without collecting it: until then nobody else can get its pid, nor its session's number.
        os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)
    else:
        engine.wait()
    if identity is not None:
        end_tree(identity, 0.0)
    return engine.wait()


def main(arguments: list[str]) -> int:
    """`<run folder> [--entry module]`: the second form is for a caller that has checked the module itself."""
    if len(arguments) not in (1, 3) or (len(arguments) == 3 and arguments[1] != "--entry"):
        sys.stderr.write("Usage: python -m backend.jobs.supervisor RUN_FOLDER [--entry MODULE]\n")
        return 2
    folder = Path(arguments[0]).absolute()
    entry = arguments[2] if len(arguments) == 3 else str((read_json(folder / REQUEST_FILE) or {}).get("entry"))
    if len(arguments) == 1 and entry not in ENTRIES.values():
        sys.stderr.write(f"{folder / REQUEST_FILE} names no program of this project. Make the run again.\n")
        return 2
    # Signals meant for a terminal or a session end the engine, not the one who writes down how it ended. Functions, not
    # SIG_IGN: the engine would inherit that.
    for name in ("SIGHUP", "SIGINT", "SIGTERM"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: None)
    try:
        return supervise(folder, entry)
    except K5Error as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"{folder} cannot be used: {error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
