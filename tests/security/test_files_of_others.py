"""No route gives a file that the app has not offered, and no name of an upload leaves the folder of uploads."""

from __future__ import annotations

import base64
import hashlib
import hmac
from pathlib import Path

import pytest

from tests.security.conftest import PICTURE, RUN_ID
from tests.security.server import Server

RUN_IDS = (
    *("..", ".", "%2e%2e", "..%2f..", "..%2f..%2fsettings.toml", "%2e%2e%2f%2e%2e%2fetc", f"{RUN_ID}%2f..%2f{RUN_ID}"),
    *("%00", "a%00b", "-", "~root", "con", "x" * 190, "x" * 300, "%ff%fe", "run%0aid", "..\\..", "C:%5cWindows"),
)


@pytest.mark.parametrize("name", RUN_IDS)
@pytest.mark.parametrize("ending", ["", "/log", "/events"])
def test_hostile_run_names(local: Server, name: str, ending: str) -> None:
    """The answer is the same for everything, and says nothing about folders."""
    answer = local.fetch(f"/api/runs/{name}{ending}")
    assert answer.status in (404, 422)
    assert str(local.workspace) not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("ending", ["log/../options.toml", "options.toml", "log.txt", "..", "log/", "%2e%2e/x"])
def test_a_run_gives_nothing_but_its_routes(local: Server, ending: str) -> None:
    answer = local.fetch(f"/api/runs/{RUN_ID}/{ending}")
    assert answer.status in (307, 404)
    assert b"prompt" not in answer.body


def test_a_run_offers_its_own_regular_pictures_only(local: Server) -> None:
    """Not links out of the run, folders, other files, files outside, or what the journal says of /etc."""
    outputs = local.fetch(f"/api/runs/{RUN_ID}").json()["outputs"]
    assert [output["name"] for output in outputs] == ["clip.png"]
    answer = local.fetch(outputs[0]["url"])
    assert (answer.status, answer.body) == (200, PICTURE)
    assert answer.headers["content-type"] == "image/png"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert [clip["run_id"] for clip in local.fetch("/api/clips").json()["clips"]] == [RUN_ID]


def test_media_in_parts(local: Server) -> None:
    address = local.fetch(f"/api/runs/{RUN_ID}").json()["outputs"][0]["url"]
    part = local.fetch(address, {"Range": "bytes=8-11"})
    assert part.status == 206
    assert part.body == PICTURE[8:12]
    assert part.headers["content-range"] == f"bytes 8-11/{len(PICTURE)}"
    assert local.fetch(address, {"Range": "bytes=999999-"}).status == 416
    whole = local.fetch(address.partition("?")[0] + "?download=true", method="HEAD")
    assert whole.status == 200
    assert 'filename="clip.png"' in whole.headers["content-disposition"]


def encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forged_ids(server: Server) -> list[str]:
    good = server.fetch(f"/api/runs/{RUN_ID}").json()["outputs"][0]["media"]
    raw = base64.urlsafe_b64decode(good + "==")
    secret = (server.workspace / ".secret").read_bytes()
    hostile = [f"{RUN_ID}/outputs/link.png", f"{RUN_ID}/../../secret.png", f"../secret.png/{RUN_ID}", "/etc/x.png"]
    hostile += [f"{RUN_ID}/options.toml", f"{RUN_ID}/outputs/folder.png", "nobody/clip.png", f"{RUN_ID}/\0.png", ""]
    signed = [hmac.new(secret, text.encode(), hashlib.sha256).digest()[:16] + text.encode() for text in hostile]
    guessed = [bytes(16) + raw[16:], raw[:16] + raw[16:].replace(b"clip", b"link"), raw[16:], b"", raw + b"x"]
    return [encode(item) for item in (*signed, *guessed)] + [good + "=", good[:-1], good + "A", "..", "%00", "é"]


def test_forged_media_ids(local: Server) -> None:
    """Even a rightly signed id opens nothing outside of its run: the signature is not the only lock."""
    for media in forged_ids(local):
        answer = local.fetch(f"/api/media/{media}".encode("ascii", "ignore").decode())
        assert answer.status == 404, media
        assert b"outside" not in answer.body


def test_ids_of_one_workspace_do_not_open_another(local: Server, member: Server) -> None:
    media = local.fetch(f"/api/runs/{RUN_ID}").json()["outputs"][0]["media"]
    assert member.fetch(f"/api/media/{media}").status == 404


def test_the_secret_is_its_owners_only(local: Server) -> None:
    assert (local.workspace / ".secret").stat().st_mode & 0o777 == 0o600


GRADIO_FILES = (
    *("/etc/passwd", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "app.py", "./app.py", "/proc/self/environ"),
    *("{workspace}/.secret", "{workspace}/settings.toml", "{workspace}/runs/{run}/options.toml"),
    *("{workspace}/runs/{run}/outputs/clip.png", "{workspace}/cache/uploads/../../.secret", "{root}/app.py"),
    *("{workspace}/cache/uploads/..%2f..%2f.secret", "~/.bashrc", "http://127.0.0.1:1/", "https://evil.example/x"),
)


@pytest.mark.parametrize("path", GRADIO_FILES)
@pytest.mark.parametrize(
    "route", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/"]
)
def test_gradios_own_file_routes(local: Server, repository: Path, route: str, path: str) -> None:
    answer = local.fetch(route + path.format(workspace=local.workspace, run=RUN_ID, root=repository))
    assert answer.status in (307, 403, 404)
    assert b"root:" not in answer.body
    assert b"prompt" not in answer.body


HOSTILE_NAMES = (
    *("../../../escaped.png", "..\\..\\escaped.png", "/tmp/escaped.png", "....//escaped.png", "a/../../escaped.png"),
    *("%2e%2e%2fescaped.png", "\u202egnp.exe", "x" * 500 + ".png", ".htaccess", "CON.png", "a;rm -rf x.png", "é.png"),
)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_of_uploads(local: Server, name: str) -> None:
    uploads = local.workspace / "cache" / "uploads"
    outside = set(local.workspace.parent.rglob("*escaped*"))
    answer = local.upload(name, b"content")
    if answer.status == 200:
        for path in answer.json():
            stored = Path(path)
            assert stored.resolve().is_relative_to(uploads)
            assert stored.read_bytes() == b"content"
    else:
        assert answer.status in (400, 403, 422, 500)
    new = set(local.workspace.parent.rglob("*escaped*")) - outside
    assert all(path.resolve().is_relative_to(uploads) for path in new)
    assert not Path("/tmp/escaped.png").exists()


def test_an_uploaded_page_is_not_shown_as_one(local: Server) -> None:
    """A dropped HTML or SVG file must not run scripts with the rights of our page."""
    for name, kind in (("x.html", b"<script>alert(1)</script>"), ("x.svg", b"<svg onload='alert(1)'/>")):
        stored = local.upload(name, kind).json()[0]
        answer = local.fetch(f"/gradio_api/file={stored}")
        assert answer.status == 200
        assert "attachment" in answer.headers.get("content-disposition", "")
