"""What every test shares: one thread for torch, no network, a workspace of its own."""

from __future__ import annotations

import os

# Before any import of gradio, transformers or torch; the processes that tests start inherit these too.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ipaddress
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Small shapes are slower on more threads, and results stay the same from machine to machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket
    host = str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A test that reaches for another machine fails at once and says which."""
    patch = pytest.MonkeyPatch()

    def guarded(name: str):
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: object):
            if not _is_local(address):
                raise AssertionError(f"A test tried to connect to {address}; tests use no network.")
            return original(self, address)

        return connect

    patch.setattr(socket.socket, "connect", guarded("connect"))
    patch.setattr(socket.socket, "connect_ex", guarded("connect_ex"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty workspace folder that belongs to one test."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder
