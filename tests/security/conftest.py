"""Two real servers for all security tests: one on the loopback interface, one that lets other machines in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.server import Server, begin, end, wait_ready

RUN_ID = "20260101-0000-abcdef"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4


@pytest.fixture(scope="package")
def _both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("servers")
    (folder / "roots").mkdir()
    for name in ("local", "exposed"):
        make_run(folder / name)
    servers = {
        "local": begin(folder / "local"),
        "exposed": begin(folder / "exposed", "--listen", "--root", str(folder / "roots")),
    }
    try:
        yield {name: wait_ready(server) for name, server in servers.items()}
    finally:
        codes = {name: end(server) for name, server in servers.items()}
    assert codes == {"local": 0, "exposed": 0}, "Ctrl-C is an ordinary end"


@pytest.fixture(scope="package")
def local(_both: dict[str, Server]) -> Server:
    """An app as most people start it."""
    return _both["local"]


@pytest.fixture(scope="package")
def exposed(_both: dict[str, Server]) -> Server:
    """An app that was started with --listen; requests carry no token unless a test adds it."""
    return _both["exposed"]


@pytest.fixture(scope="package")
def member(exposed: Server) -> Server:
    """The exposed app as somebody sees it who has the token."""
    headers = {"Authorization": f"Bearer {exposed.token}"}
    return Server(exposed.process, exposed.workspace, exposed.port, exposed.address, exposed.output, headers)


def make_run(workspace: Path) -> None:
    """A finished run with one picture, links that lead out of it, and a secret beside the runs."""
    run = workspace / "runs" / RUN_ID
    (run / "outputs").mkdir(parents=True)
    (workspace / "secret.png").write_bytes(b"outside")
    (run / "outputs" / "clip.png").write_bytes(PICTURE)
    (run / "outputs" / "link.png").symlink_to(workspace / "secret.png")
    (run / "outputs" / "folder.png").mkdir()
    now = time.time()
    request = {"kind": "generate", "title": "a red ball", "created": now, "entry": "kandinsky5_generate_video"}
    (run / "request.json").write_text(json.dumps(request))
    (run / "options.toml").write_text('task = "k5-demo-t2v"\nprompt = "a red ball"\nseed = 7\n')
    (run / "log.txt").write_text("first line\nsecond line\n")
    (run / "started.json").write_text(json.dumps({"time": now}))
    (run / "result.json").write_text(json.dumps({"exit_code": 0, "signal": None, "ended": now}))
    names = ("clip.png", "link.png", "folder.png", "../../../secret.png", "../options.toml", "gone.png")
    records = [{"type": "started", "attempt": 1, "entry": "x", "pid": 1, "task": "k5-demo-t2v", "versions": {}}]
    for name in names:
        records.append(
            {"type": "sample", "path": f"outputs/{name}", "kind": "image", "width": 4, "height": 4, "seed": 7}
        )
    records.append({"type": "sample", "path": "/etc/passwd", "kind": "image"})
    records.append({"type": "finished", "outputs": [], "seconds": 1.0})
    lines = [json.dumps({"v": 1, "seq": seq, "t": now, **record}) for seq, record in enumerate(records, 1)]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
