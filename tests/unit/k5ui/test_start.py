"""Mistakes at the start: one sentence each, exit code 2, before anything slow happens."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

import app


def start(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert app.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err


def test_a_taken_port_names_a_free_one(capsys, tmp_path: Path) -> None:
    with app.open_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        said = start(capsys, "--port", str(port), "--workspace", str(tmp_path))
    assert f"Port {port} of 127.0.0.1 is taken" in said
    free = int(re.search(r"--port (\d+), which is free", said)[1])
    assert free > port
    app.open_port("127.0.0.1", free).close()


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_ports_that_are_none(capsys, tmp_path: Path, port: str) -> None:
    assert "is not a port" in start(capsys, f"--port={port}", "--workspace", str(tmp_path))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "studio.example", "127.0.0.1.evil.example"])
def test_other_machines_are_let_in_only_on_purpose(capsys, tmp_path: Path, host: str) -> None:
    said = start(capsys, "--host", host, "--workspace", str(tmp_path))
    assert "--listen" in said
    assert "--listen" in start(capsys, "--allow-host", "studio.example", "--workspace", str(tmp_path))


def test_there_is_no_share(capsys) -> None:
    with pytest.raises(SystemExit):
        app.main(["--share"])
    assert "unrecognized arguments: --share" in capsys.readouterr().err


def test_a_host_of_another_machine(capsys, tmp_path: Path) -> None:
    said = start(capsys, "--host", "192.0.2.1", "--listen", "--port", "0", "--workspace", str(tmp_path))
    assert "192.0.2.1" in said
    assert "--host" in said


def test_a_workspace_that_cannot_be_one(capsys, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    for folder in (blocker, blocker / "below"):
        said = start(capsys, "--port", "0", "--workspace", str(folder))
        assert str(folder) in said
        assert "--workspace" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workspace_without_rights(capsys, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "--workspace" in start(capsys, "--port", "0", "--workspace", str(tmp_path / "x"))


@pytest.mark.parametrize("path", ["http://x/", "/a b", "/a/../b", "//evil", "/a;b", '/"'])
def test_root_paths_that_are_none(capsys, tmp_path: Path, path: str) -> None:
    if path == "//evil":
        assert app._root_path(path) == "/evil"
    else:
        assert "--root-path" in start(capsys, f"--root-path={path}", "--workspace", str(tmp_path))


@pytest.mark.parametrize(("given", "meant"), [("", ""), ("/", ""), ("k5", "/k5"), ("/k5/", "/k5"), ("/a/b", "/a/b")])
def test_root_paths(given: str, meant: str) -> None:
    assert app._root_path(given) == meant


def test_the_policy_follows_the_address() -> None:
    policy = app.make_policy("127.0.0.1", [], None, 7860, "")
    assert policy.hosts == {"localhost", "127.0.0.1", "::1"}
    assert not policy.any_address
    policy = app.make_policy("::", ["studio.example:443", "fe80::1", "[fe80::2]"], "t", 7860, "/k5")
    assert {"studio.example", "fe80::1", "fe80::2", socket.gethostname().lower()} <= policy.hosts
    assert policy.any_address
    assert policy.root_path == "/k5"
    with pytest.raises(app.UserError):
        app.make_policy("127.0.0.1", ["a b:x"], "t", 7860, "")


def test_uploads_stay_in_the_workspace_and_nothing_is_reported(monkeypatch, workspace: Path) -> None:
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "before")
    app.prepare_environment(workspace)
    assert Path(os.environ["GRADIO_TEMP_DIR"]).is_relative_to(workspace)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
