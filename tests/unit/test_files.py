"""Files that are whole or not there, under exceptions, kills, full disks and hostile names."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend.errors import UserError
from backend.files import (
    atomic_path,
    check_writable,
    confine,
    existing_parent,
    fingerprint,
    require_free_space,
    safe_name,
    write_atomic,
    write_problem,
)

MIB = 1 << 20


def _names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


# --- atomic writes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\0\xff whole", "Привет, 🎬\n", b"", ""])
def test_write_atomic_writes_exactly_this(tmp_path: Path, data: bytes | str) -> None:
    write_atomic(tmp_path / "new" / "deep" / "a.txt", data)
    expected = data.encode() if isinstance(data, str) else data
    assert (tmp_path / "new" / "deep" / "a.txt").read_bytes() == expected
    assert _names(tmp_path / "new" / "deep") == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3), OSError(errno.EIO, "x")])
def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, error: BaseException) -> None:
    final = tmp_path / "clip.mp4"
    final.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_path(final) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert final.read_bytes() == b"old"
    assert _names(tmp_path) == ["clip.mp4"]


def test_the_temporary_file_is_beside_the_final_one_hidden_and_of_the_same_kind(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.latent.safetensors") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"
        assert temporary.name.startswith(".")
        temporary.write_bytes(b"1")
        assert _names(tmp_path) == [temporary.name]


def test_a_block_that_writes_nothing_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError), atomic_path(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("name", ["я" * 120, "🎬" * 62, "x" * 250])
def test_the_longest_names_that_fit_are_written(tmp_path: Path, name: str) -> None:
    write_atomic(tmp_path / f"{name}.mp4", b"x")
    assert _names(tmp_path) == [f"{name}.mp4"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_folder_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be written"):
        write_atomic(tmp_path / "clip.mp4", b"x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "clip.mp4", b"x")
    assert _names(tmp_path) == ["clip.mp4", "file"]


_KILLED = """
import sys, time
from backend.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    with open(temporary, "wb") as handle:
        while True:
            handle.write(b"new" * 1000); handle.flush()
            print("half", flush=True)
            time.sleep(0.002)
"""


def test_kill_in_the_middle_of_a_write_leaves_the_old_file_whole(tmp_path: Path, repository: Path) -> None:
    """Five kills with SIGKILL at different moments; the name that people see never holds a part."""
    final = tmp_path / "clip.mp4"
    final.write_bytes(b"old" * 1000)
    for attempt in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(final)], cwd=repository, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"half\n"
            time.sleep(0.004 * attempt)
            process.send_signal(signal.SIGKILL)
        assert final.read_bytes() == b"old" * 1000
    write_atomic(final, b"next")
    assert final.read_bytes() == b"next"


_FULL = """
import resource, sys
from backend.errors import UserError
from backend.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomic(sys.argv[1], b"x" * 1_000_000)
except UserError as error:
    print(error)
"""


def test_a_disk_that_fills_up_is_one_sentence(tmp_path: Path, repository: Path) -> None:
    final = tmp_path / "clip.mp4"
    final.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(final)], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"No space is left for {final}. Free some space or choose another folder.\n"
    assert final.read_bytes() == b"old"
    assert _names(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "No space"), (errno.EDQUOT, "No space"), (errno.EROFS, "may write"), (errno.EACCES, "may write"),
     (errno.ENAMETOOLONG, "another output"), (errno.ENOTDIR, "another output")],
)  # fmt: skip
def test_write_problems_say_what_to_do(number: int, words: str) -> None:
    problem = write_problem(OSError(number, os.strerror(number)), Path("a.mp4"), "output")
    assert isinstance(problem, UserError)
    assert problem.field == "output"
    assert "a.mp4" in problem.message
    assert words in problem.message


def test_unknown_write_problems_stay_themselves() -> None:
    error = OSError(errno.EIO, "input/output error")
    assert write_problem(error, Path("a")) is error


# --- space and rights ---------------------------------------------------------------------------------------------


def test_free_space_is_asked_of_the_disk_that_will_hold_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> shutil._ntuple_diskusage:
        asked.append(Path(path))
        return shutil._ntuple_diskusage(10, 9, 1_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_free_space(tmp_path / "not" / "yet", 1_000_000)
    with pytest.raises(UserError, match="1 MB free, but 2 MB are needed") as caught:
        require_free_space(tmp_path / "not" / "yet", 2_000_000, "output")
    assert caught.value.field == "output"
    assert asked == [tmp_path, tmp_path]


def test_existing_parent(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path
    (tmp_path / "file").write_text("x")
    assert existing_parent(tmp_path / "file" / "b") == tmp_path


def test_check_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_writable(tmp_path / "new" / "clip.mp4")
    check_writable(tmp_path / "file")
    assert not (tmp_path / "new").exists()
    for path, words in (
        (tmp_path / "file" / "clip.mp4", "is a file, not a folder"),
        (tmp_path / "file" / "deep" / "clip.mp4", "is a file, not a folder"),
        (tmp_path, "is a folder. Give a file name"),
        (tmp_path / ("x" * 300), "too long"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            check_writable(path, "output")
        assert caught.value.field == "output"


def test_a_folder_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="no permission in"):
        check_writable(tmp_path / "a" / "clip.mp4")


# --- confinement and names ----------------------------------------------------------------------------------------


def test_confine(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "root-twin").mkdir()
    (root / "out").symlink_to(tmp_path)
    (root / "home").symlink_to(root / "in")
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    assert confine(root, "in/file") == root / "in" / "file"
    assert confine(root, "in/../in") == root / "in"
    assert confine(root, "home/file") == root / "in" / "file"
    assert confine(root, root / "in") == root / "in"
    assert confine(root, ".") == root
    for path in ("..", "../root-twin", "in/../../x", "/etc/passwd", "out/x", tmp_path, f"{root}-twin", "a\0b", "a/x"):
        with pytest.raises(UserError):
            confine(root, path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat, walking!", "A-cat-walking"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\Windows\\x", "C-Windows-x"),
        ("", "clip"),
        (" .. ", "clip"),
        ("🎬🎬", "clip"),
        ("CON", "clip"),
        ("nul", "clip"),
        ("COM¹", "clip"),
        ("Кот идёт", "Кот-идёт"),
        ("ﬁne", "fine"),
        ("a\nb\tc\0d", "a-b-c-d"),
        ("--flag", "flag"),
        ("~root $(x) `y`", "root-x-y"),
    ],
)
def test_safe_name(text: str, expected: str) -> None:
    assert safe_name(text) == expected


def test_safe_name_of_2000_hostile_texts_is_a_plain_short_name() -> None:
    rng = random.Random(1)
    alphabet = "aZ9 ._-/\\:*?\"<>|\0\n\t'`$;&%~#я𐐷𠀀漢🎬\u202e\u0301\ud800"
    for _ in range(2000):
        name = safe_name("".join(rng.choices(alphabet, k=rng.randint(0, 300))))
        assert name
        assert len(name) <= 60
        assert len(f"0001-{name}-{2**63 - 1}_00001.latent.safetensors".encode()) <= 255
        assert all(letter.isalnum() or letter in "-_" for letter in name)
        assert name[0] not in "-_"
        assert name[-1] not in "-_"


# --- fingerprints -------------------------------------------------------------------------------------------------


def test_fingerprint_of_a_small_file_sees_every_byte(tmp_path: Path) -> None:
    content = bytearray(random.Random(2).randbytes(3000))
    file = tmp_path / "w.safetensors"
    seen = set()
    for position in (0, 1, 1500, 2999, None):
        changed = bytearray(content)
        if position is not None:
            changed[position] ^= 1
        file.write_bytes(changed)
        seen.add(fingerprint(file))
    assert len(seen) == 5
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in seen)
    os.utime(file, (1, 1))
    assert fingerprint(file) in seen
    assert fingerprint(file) == fingerprint(str(file))


def test_fingerprint_of_a_big_file_sees_head_middle_and_tail(tmp_path: Path) -> None:
    """Sparse, 3 GiB: changes in the sampled places count, and it takes no time."""
    file, size = tmp_path / "big.safetensors", 3 << 30
    with open(file, "wb") as handle:
        handle.truncate(size)
    started = time.perf_counter()
    seen = {fingerprint(file)}
    assert time.perf_counter() - started < 1.0
    middle = (size - MIB) * 7 // 15
    for position in (0, MIB - 1, middle, middle + MIB - 1, size - MIB, size - 1):
        with open(file, "r+b") as handle:
            handle.seek(position)
            handle.write(b"\1")
        seen.add(fingerprint(file))
    assert len(seen) == 7
    with open(file, "r+b") as handle:
        handle.truncate(size + 1)
    assert fingerprint(file) not in seen


def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "model.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
    (second / "README.md").write_text("says nothing about the weights")
    assert fingerprint(first) == fingerprint(second)
    (second / "config.json").write_text("{ }")
    assert fingerprint(first) != fingerprint(second)
    (second / "config.json").write_text("{}")
    (second / "sub" / "model.safetensors").rename(second / "sub" / "other.safetensors")
    assert fingerprint(first) != fingerprint(second)
