"""Runs of the caching command in processes that are forked from one that has imported everything already.

A process that starts from nothing spends seconds on imports; thirty trials of being killed would take an hour.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.integration.cache_command import VAE

_IMPORTS = [
    "backend.caching.latents",
    "backend.kandinsky5_cache_latents",
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([*_IMPORTS, __name__])


def _run(words: list[str], log: str) -> None:
    from backend.kandinsky5_cache_latents import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os._exit(main(words))


def start(config: Path, *words: str) -> BaseProcess:
    """Start the command in a process of its own; its output goes into log.txt beside the configuration."""
    sys.stdout.flush()
    arguments = ["--dataset_config", str(config), "--vae", VAE, *words]
    process = _CONTEXT.Process(target=_run, args=(arguments, str(config.with_name("log.txt"))))
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 120.0) -> int | None:
    """Wait for its end; the exit code."""
    process.join(seconds)
    return process.exitcode


def kill_hard(process: BaseProcess) -> list[psutil.Process]:
    """kill -9; returns the processes that it had started itself."""
    assert process.pid is not None
    children: list[psutil.Process] = []
    # It may have just ended by itself.
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode in (0, -signal.SIGKILL)
    return children


def all_gone(processes: list[psutil.Process], seconds: float = 10.0) -> bool:
    """Whether these end by themselves in time."""
    deadline = time.monotonic() + seconds
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
