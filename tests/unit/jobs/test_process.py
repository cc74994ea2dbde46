"""Who a process is: not its number alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from backend.jobs.process import ProcessIdentity, alive_since, boot_id, end_tree, identify, is_alive, tree

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(SLEEP, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    with process:
        yield process
        process.kill()


def test_a_running_process_is_itself(sleeper: subprocess.Popen[str]) -> None:
    me = identify(sleeper.pid)
    assert me is not None
    assert is_alive(me)
    assert is_alive(ProcessIdentity.from_dict(json.loads(json.dumps(me.as_dict()))))
    assert me.boot_id == boot_id()


def test_a_reused_pid_is_somebody_else(sleeper: subprocess.Popen[str]) -> None:
    me = identify(sleeper.pid)
    assert me is not None
    assert not is_alive(replace(me, create_time=me.create_time - 5, start_ticks=None))
    assert not is_alive(replace(me, start_ticks=(me.start_ticks or 0) - 5))


def test_a_clock_that_was_set_changes_nobody(sleeper: subprocess.Popen[str]) -> None:
    me = identify(sleeper.pid)
    assert me is not None
    if me.start_ticks is None:
        pytest.skip("only Linux counts from boot")
    assert is_alive(replace(me, create_time=me.create_time - 3600))


def test_another_boot_is_another_world(sleeper: subprocess.Popen[str]) -> None:
    me = identify(sleeper.pid)
    assert me is not None
    assert not is_alive(replace(me, boot_id="another"))
    assert is_alive(replace(me, boot_id=""))


def test_a_zombie_is_gone(sleeper: subprocess.Popen[str]) -> None:
    me = identify(sleeper.pid)
    assert me is not None
    os.kill(sleeper.pid, signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert os.path.exists(f"/proc/{sleeper.pid}")
    assert not is_alive(me)
    assert tree(me) == []
    sleeper.wait()
    assert not is_alive(me)
    assert identify(sleeper.pid) is None


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        5,
        {},
        {"pid": "1", "create_time": 1.0},
        {"pid": True, "create_time": 1.0},
        {"pid": 0, "create_time": 1.0},
        {"pid": 1 << 40, "create_time": 1.0},
        {"pid": 1},
        {"pid": 1, "create_time": "x"},
    ],
)
def test_a_damaged_identity_is_none(value: object) -> None:
    assert ProcessIdentity.from_dict(value) is None
    assert not is_alive(None)


def test_a_process_of_a_terminal_is_known_by_its_first_record(sleeper: subprocess.Popen[str]) -> None:
    assert alive_since(sleeper.pid, time.time()) is not None
    assert alive_since(sleeper.pid, time.time() - 3600) is None


FAMILY = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
processes = [subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) for _ in range(2)]
for process in processes:
    process.stdout.readline()
print(*[process.pid for process in processes], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("leader_dies_first", [False, True])
def test_the_whole_tree_ends_also_when_its_root_is_gone(leader_dies_first: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as leader:
        assert leader.stdout is not None
        children = [identify(int(pid)) for pid in leader.stdout.readline().split()]
        me = identify(leader.pid)
        assert me is not None
        assert len(children) == 2
        assert all(is_alive(child) for child in children)
        if leader_dies_first:
            leader.kill()
            leader.wait()
            assert {member.pid for member in tree(me)} == {child.pid for child in children if child}
        assert end_tree(me, 0.3) == signal.SIGKILL
        assert not any(is_alive(child) for child in children)
        assert end_tree(me, 0.3) is None


def test_a_tree_that_obeys_is_not_killed(sleeper: subprocess.Popen[str]) -> None:
    me = identify(sleeper.pid)
    assert me is not None
    assert end_tree(me, 5.0) == signal.SIGTERM
    assert sleeper.wait() == -signal.SIGTERM
