"""Caching that is killed without warning: nothing half, nothing lost, and the second run gives the same bytes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.integration.cache_command import caches, inodes, written_again
from tests.real_clips import real_dataset
from tests.reliability.cache_runs import all_gone, finish, kill_hard, start

_ITEMS = 12


def _unfinished(folder: Path) -> int:
    return sum(1 for _ in folder.glob("cache_*/.*.tmp.safetensors"))


def _finished(folder: Path) -> int:
    return sum(1 for _ in folder.glob("cache_*/[!.]*_k5.safetensors"))


def _kill_trials(folder: Path, trials: int) -> dict[str, int]:
    """Kill the command at another moment each time and let it continue; returns what was met."""
    config = real_dataset(folder)
    assert finish(start(config, "--batch_size", "1")) == 0
    undisturbed = caches(folder)
    assert len(undisturbed) == _ITEMS
    chance = random.Random(5)
    met = {"killed": 0, "whole files kept": 0, "unfinished files": 0}
    while met["killed"] < trials:
        for name in undisturbed:
            (folder / name).unlink()
        before = _unfinished(folder)
        process = start(config)
        wanted, delay = chance.randrange(_ITEMS - 1), chance.random() * 0.12
        while _finished(folder) < wanted and process.is_alive():
            time.sleep(0.002)
        if met["killed"] % 2:
            time.sleep(delay)
        else:
            # Every other time in the middle of a write, which is too short to be met by chance.
            while _unfinished(folder) == before and process.is_alive():
                pass
        if not process.is_alive():
            assert finish(process) == 0
            continue  # It was done before the kill.
        assert all_gone(kill_hard(process)), "the processes that decode end with it"
        kept, files = caches(folder), inodes(folder)
        met["killed"] += len(kept) < _ITEMS  # Not one that met it after its last file.
        assert kept == {name: undisturbed[name] for name in kept}, "what has its final name is whole"
        met["whole files kept"] += len(kept)
        met["unfinished files"] += _unfinished(folder) - before
        assert finish(start(config, "--skip_existing")) == 0
        assert caches(folder) == undisturbed
        assert len(written_again(files, folder)) == _ITEMS - len(kept), "only what was missing"
    return met


def test_kill_and_continue(tmp_path: Path) -> None:
    met = _kill_trials(tmp_path, 4)
    assert met["killed"] == 4
    assert met["whole files kept"] > 0


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_thirty_kills(tmp_path: Path) -> None:
    met = _kill_trials(tmp_path, 30)
    print(f"\n30 runs killed with kill -9: {met}")
    assert met["killed"] == 30
