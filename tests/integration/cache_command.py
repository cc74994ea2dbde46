"""Runs the command that caches latents, here or in a process of its own, and reads what it made."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from backend.config.tasks import TASKS, default_weights
from backend.events import read_events
from backend.kandinsky5_cache_latents import main
from tests.integration.command import Run

VAE = str(default_weights(TASKS["k5-demo-t2v"]).vae)
_COUNTER = iter(range(1, 1_000_000))


def latents_command(config: Path, *words: str) -> list[str]:
    """The guide's command line, as a process."""
    return [
        *(sys.executable, "-m", "backend.kandinsky5_cache_latents"),
        *("--dataset_config", str(config), "--vae", VAE),
        *words,
    ]


def cache(config: Path, *words: str, vae: str | None = VAE) -> Run:
    """Cache the latents of `config` in this process, with a run folder beside it."""
    folder = config.parent / "runs" / str(next(_COUNTER))
    stream = io.StringIO()
    given = ["--vae", vae] if vae is not None else []
    with contextlib.redirect_stderr(stream):
        code = main(["--dataset_config", str(config), *given, *words, "--run_dir", str(folder)])
    records = [dict(record) for record in read_events(folder / "events.jsonl").records]
    return Run(code, records, stream.getvalue(), folder)


def caches(folder: Path) -> dict[str, bytes]:
    """Every cache below `folder` by its path, with its bytes; temporary files and the index are none."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*_k5.safetensors"))
        if not path.name.startswith(".")
    }


def inodes(folder: Path) -> dict[str, int]:
    """Which file stands under each name; a cache that is written again is another file."""
    return {name: os.stat(folder / name).st_ino for name in caches(folder)}


def written_again(before: dict[str, int], folder: Path) -> set[str]:
    """The caches that are new or written again since `before`."""
    return {name for name, inode in inodes(folder).items() if before.get(name) != inode}


def read_cache(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and all metadata of a file, with the safetensors library itself."""
    with safe_open(str(path), framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
