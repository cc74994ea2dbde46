"""Stamps of many files, also with the help of a second process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backend.data import stat_many as module
from backend.data.stat_many import FIELD_COUNT, stat_many


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = [f"{number:03d} ä.txt" for number in range(40)] + ["line\nbreak.png", os.fsdecode(b"raw\xff.png")]
    for size, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * size)
    return [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("worth", [10, 1000])
def test_numbers_are_those_of_the_files_in_order(files: list[str], worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH_A_PROCESS", worth)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    facts = stat_many(files)
    assert facts is not None
    expected = [os.stat(name) for name in files]
    assert list(facts[0::FIELD_COUNT]) == [one.st_size for one in expected] == list(range(len(files)))
    assert list(facts[1::FIELD_COUNT]) == [one.st_mtime_ns for one in expected]
    assert list(facts[2::FIELD_COUNT]) == [one.st_ino for one in expected]
    assert list(facts[3::FIELD_COUNT]) == [one.st_mode for one in expected]


@pytest.mark.parametrize("missing", [0, -1])
def test_one_missing_file_in_either_half_means_no_answer(
    files: list[str], missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORTH_A_PROCESS", 10)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    os.remove(files[missing])
    assert stat_many(files) is None
