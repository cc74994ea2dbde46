"""The sequence that saves a state, cut at every single operation: what has its final name is always whole."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backend.config.state_record import read_record, replaced_folder, saving_folder
from backend.config.train import TrainOptions
from backend.training.state import Position, latest_state, load_state, save_state
from tests.reliability.interposing import Cut, Interposer
from tests.unit.training.trained import Training, training

OPTIONS = TrainOptions(output_name="clip")
_EXIT = 77


class Story:
    """A folder with a state of step 1, a training at step 2 that is about to be saved, and what each must hold."""

    def __init__(self, folder: Path, name: str, old_name: str | None, *, set_aside: bool = False) -> None:
        self.folder = folder
        self.new = folder / name
        self.old = folder / old_name if old_name else None
        self.made = training()
        self.weights: dict[int, Tensor] = {1: self.made.run(1, 1)[0]}
        folder.mkdir()
        if self.old is not None:
            self.save(self.old, 1)
        if set_aside and self.old is not None:
            self.old.rename(replaced_folder(self.old))
        self.made.step(2)
        self.weights[2] = _flat(self.made)
        self._kept = folder.with_name(f"{folder.name}-before")
        shutil.copytree(folder, self._kept)

    def again(self) -> None:
        """Put the folder back as it was before the save."""
        shutil.rmtree(self.folder)
        shutil.copytree(self._kept, self.folder)

    def save(self, target: Path, step: int) -> None:
        made = self.made
        save_state(
            target, Position(step, 0, step), 7, made.lora, made.optimizer, made.schedule, OPTIONS, {}, 0, 1,
            lambda: None,
        )  # fmt: skip

    def save_new(self) -> None:
        self.save(self.new, 2)

    def check(self, where: str) -> int:
        """After a cut: all final names are whole, the latest is the old state or the new one; its step (0: none)."""
        for path in self.folder.iterdir():
            if not path.name.startswith("."):
                assert self._loaded(path, where) in (1, 2)
        latest = latest_state(self.folder, "clip")
        assert latest is not None or self.old is None, where
        step = self._loaded(latest, where) if latest is not None else 0
        if saving_folder(self.new).exists() or not self.new.exists():
            assert step == (1 if self.old is not None else 0), where
        return step

    def _loaded(self, path: Path, where: str) -> int:
        fresh = training(seed=9)
        record = read_record(path, hashes=True)
        position, _, _ = load_state(path, fresh.lora, fresh.optimizer, fresh.schedule, 0, 1)
        assert torch.equal(_flat(fresh), self.weights[position.step]), where
        return record.position.step

    def check_next(self, where: str) -> None:
        """The next save of the same run works and leaves no leftovers."""
        self.save_new()
        names = {path.name for path in self.folder.iterdir()}
        assert names == {path.name for path in (self.old, self.new) if path is not None}, where
        assert latest_state(self.folder, "clip") == self.new, where


def _flat(made: Training) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in made.lora.parameters()])


STORIES = {
    "first": None,
    "another name": "clip-step00000001-state",
    "the same name": "clip-state",
    "twice": "clip-state",
}


@pytest.fixture(params=list(STORIES))
def story(request: pytest.FixtureRequest, tmp_path: Path) -> Story:
    """Nothing there yet; an older state beside it; one of the same name; that, set aside by a killed writer."""
    return Story(tmp_path / "out", "clip-state", STORIES[request.param], set_aside=request.param == "twice")


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written, so hundreds of trials need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _operations(story: Story) -> list[str]:
    with Interposer(story.folder) as interposer:
        story.save_new()
    story.again()
    assert len(interposer.operations) > 60
    return interposer.operations


def _cut_at_each(story: Story, cut: Callable[[int], None]) -> dict[int, int]:
    """How often the old (1), the new (2) or no state (0) was the latest."""
    met = {0: 0, 1: 0, 2: 0}
    operations = _operations(story)
    for number, name in enumerate(operations, 1):
        where = f"cut at {number} of {len(operations)}, {name}"
        cut(number)
        met[story.check(where)] += 1
        story.check_next(where)
        story.again()
    return met


@pytest.mark.usefixtures("_no_waiting")
def test_a_machine_that_stops_at_any_operation_leaves_whole_states_only(story: Story) -> None:
    def cut(number: int) -> None:
        with Interposer(story.folder, number), pytest.raises(Cut):
            story.save_new()

    met = _cut_at_each(story, cut)
    assert met[2] >= 1, "the last operations are after the new state has its name"
    assert (met[0] > 50) is (story.old is None)
    assert (met[1] > 50) is (story.old is not None)


def _in_a_child(work: Callable[[], object]) -> int:
    """Fork, work, and end without any clean-up; the wait status."""
    with warnings.catch_warnings():
        # The child writes files and ends; it needs nothing that another thread could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize(
    "story",
    ["the same name", *(pytest.param(name, marks=pytest.mark.torture) for name in ("first", "another name"))],
    indirect=True,
)
def test_a_process_that_dies_at_any_operation_leaves_whole_states_only(story: Story) -> None:
    """As above, but with a real end: locks are given back by the system, buffers are lost, nothing is cleaned up."""

    def cut(number: int) -> None:
        def work() -> None:
            with Interposer(story.folder, number, end=lambda: os._exit(_EXIT)):
                story.save_new()

        assert os.waitstatus_to_exitcode(_in_a_child(work)) == _EXIT

    met = _cut_at_each(story, cut)
    assert met[2] >= 1


def test_everything_is_on_the_disk_before_it_gets_its_name(story: Story) -> None:
    """A power cut: a name may survive only together with what it names."""
    seen: list[str] = []

    with Interposer(story.folder) as interposer:

        def watch(name: str, arguments: tuple) -> None:
            if name == "rename" and Path(arguments[0]) == saving_folder(story.new):
                building = Path(arguments[0])
                inodes = {path.name: path.stat().st_ino for path in building.iterdir()}
                assert {name for name, inode in inodes.items() if inode not in interposer.synced} == set()
                assert interposer.synced[-1] == building.stat().st_ino, "its list of names comes last"
                seen.append("renamed")

        interposer.watch = watch
        story.save_new()
        assert seen == ["renamed"]
        after = interposer.operations[len(interposer.operations) - interposer.operations[::-1].index("rename") :]
        assert after[:3] == ["open", "fsync", "close"], "the folder that holds the name"
        assert interposer.synced[-1] == story.folder.stat().st_ino


# --- every system call --------------------------------------------------------------------------------------------

_TRACE_ME, _NEXT_CALL, _SET_OPTIONS, _GOOD = 0, 24, 0x4200, 1


def _ptrace(request: int, process: int, data: int = 0) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    library.ptrace.restype = ctypes.c_long
    if library.ptrace(request, process, None, data) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _killed_at_call(work: Callable[[], object], number: int) -> bool:
    """Run `work` in a child that is killed when it enters its system call `number`; False if it ended before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _ptrace(_TRACE_ME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    _ptrace(_SET_OPTIONS, child, _GOOD)
    entered, entering = 0, True
    while True:
        _ptrace(_NEXT_CALL, child)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            return False
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:  # a system call, entered or left
            entered += entering
            entering = not entering
            if entered == number and not entering:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return True


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="ptrace's numbers are those of Linux on x86-64"
)
def test_a_process_that_is_killed_at_any_system_call_leaves_whole_states_only(story: Story) -> None:
    """Also inside of libraries that do not go through Python, such as the writer of tensors."""
    met, number = {0: 0, 1: 0, 2: 0}, 0
    for number in itertools.count(1):
        if not _killed_at_call(story.save_new, number):
            break
        met[story.check(f"killed at call {number}")] += 1
        story.check_next(f"killed at call {number}")
        story.again()
    print(f"\nkilled at each of {number - 1} system calls; latest was none/old/new: {met}")
    assert number > 200
    assert met[2] >= 1
