"""A store whose runs may start the stub engine, and helpers that lay out run folders by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backend.config.generate import GenerateOptions
from backend.jobs.store import Run, RunStore
from tests.fakes.engine_stub import ENTRY


@pytest.fixture
def store(workspace: Path) -> RunStore:
    return RunStore(workspace, extra_entries=[ENTRY])


@pytest.fixture
def make_run(store: RunStore) -> Callable[..., Run]:
    """Make runs of the stub engine; the prompt says what it does."""

    def make(prompt: str = "a circle", title: str = "") -> Run:
        options = GenerateOptions(task="k5-demo-t2v", prompt=prompt, seed=7)
        return store.create("generate", options, title or prompt, entry=ENTRY)

    return make


def put_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


def put_events(run: Run, *records: tuple[str, float, dict[str, Any]]) -> None:
    """Write a journal of (type, age in seconds, fields)."""
    now = time.time()
    with open(run.folder / "events.jsonl", "w", encoding="utf-8") as handle:
        for seq, (kind, age, fields) in enumerate(records, 1):
            handle.write(json.dumps({"v": 1, "seq": seq, "t": now - age, "type": kind, **fields}) + "\n")
