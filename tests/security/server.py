"""A real server in a process of its own, and a client that sends exactly what a test says."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240
READY = re.compile(r"^K5 Studio is ready: http://[^/]*?:(\d+)(/\S*)$", re.MULTILINE)


@dataclass
class Reply:
    """One HTTP answer; header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    """A running app."""

    process: subprocess.Popen[str]
    workspace: Path
    port: int = 0
    address: str = ""
    output: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    reader: threading.Thread | None = None

    @property
    def token(self) -> str:
        return self.address.partition("?token=")[2]

    def fetch(
        self, path: str, headers: dict[str, str] | None = None, method: str = "GET", body: bytes | None = None
    ) -> Reply:
        """Send one request; the path goes out as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            sent = {"Host": f"127.0.0.1:{self.port}", **self.headers, **(headers or {})}
            if body is not None:
                sent["Content-Length"] = str(len(body))
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = b"" if answer.getheader("content-type", "").startswith("text/event-stream") else answer.read()
            return Reply(answer.status, {key.lower(): value for key, value in answer.getheaders()}, content)
        finally:
            connection.close()

    def post(self, path: str, value: Any, headers: dict[str, str] | None = None) -> Reply:
        """Send JSON."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        return self.fetch(path, sent, "POST", json.dumps(value).encode())

    def upload(self, name: str, content: bytes, headers: dict[str, str] | None = None) -> Reply:
        """Send a file as the page does when one is dropped on it; the name goes out as it is."""
        mark = uuid.uuid4().hex
        head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + f"\r\n--{mark}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        return self.fetch("/gradio_api/upload", kind | (headers or {}), "POST", body)

    def event(self, index: int, data: list[Any], event_data: Any = None) -> dict[str, Any]:
        """Run one of the page's events by hand, as anybody can who reaches the server; returns its last message."""
        session = uuid.uuid4().hex[:10]
        request = {"data": data, "fn_index": index, "session_hash": session, "event_data": event_data}
        joined = self.post("/gradio_api/queue/join", request)
        if joined.status != 200:
            return {"success": False, "status": joined.status, "output": {"error": joined.text}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={session}", headers=self.headers)
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    message = json.loads(line[6:])
                    if message["msg"] in ("process_completed", "unexpected_error"):
                        return message
        finally:
            connection.close()
        raise AssertionError("The event has not ended.")


def begin(workspace: Path, *arguments: str) -> Server:
    """Start `python app.py` on a free port; `wait_ready` comes after that, so that several can start side by side."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "app.py"), "--port", "0", "--workspace", str(workspace), *arguments],
        cwd=workspace.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Server(process, workspace)

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                server.output.append(line)

    server.reader = threading.Thread(target=read, daemon=True)
    server.reader.start()
    return server


def wait_ready(server: Server) -> Server:
    """Wait for the line that says that the app serves."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        ready = READY.search("".join(server.output))
        if ready:
            server.port, server.address = int(ready[1]), ready[2]
            return server
        time.sleep(0.05)
    raise AssertionError("The app did not start:\n" + "".join(server.output))


def end(server: Server) -> int:
    """Ctrl-C; returns the exit code."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGINT)
    try:
        return server.process.wait(20)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise
    finally:
        server.process.wait()
        if server.reader is not None:
            server.reader.join()
