"""The page's own events, called by hand with values that no widget would send."""

from __future__ import annotations

import io
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.security.conftest import RUN_ID
from tests.security.server import Server

HOSTILE_TEXT = ("../../../etc/passwd", "{workspace}/.secret", "$(touch owned)", "';--", "\0", "x" * 100_000)
HOSTILE_VALUES: tuple[Any, ...] = (None, -1, 1e308, True, [], {}, [["../.."]], {"path": "../.."}, *HOSTILE_TEXT)
VERBS = {
    *("set_preference", "stop", "dequeue", "kill", "trash"),
    *("new_dataset", "open_dataset", "forget_dataset", "set_key", "add_entry", "remove_entry", "save_text"),
    *("set_caption", "change_captions", "undo_captions", "redo_captions", "exclude"),
    *("check", "ignore_findings", "fix_finding"),
    *("cache", "prune", "change"),
    *("set_train", "preset_train", "import_train", "start_train", "clone_train", "resume_train", "reset_train"),
    *("undo_train", "ask_train"),
}


class Page:
    """The page's components and events, as anybody can read them from /config."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.config = server.fetch("/config").json()
        self.components = {component["id"]: component for component in self.config["components"]}

    def event(self, name: str) -> dict[str, Any]:
        """The event that a part of the page triggers under this name."""
        return next(d for d in self.config["dependencies"] if any(target[1] == name for target in d["targets"]))

    def run(self, name: str, changes: dict[str, Any], event_data: Any = None) -> dict[str, Any]:
        """Trigger an event with the form as it stands, some fields (by element id) changed."""
        event = self.event(name)
        data = []
        for number in event["inputs"]:
            props = self.components[number]["props"]
            data.append(changes.get(props.get("elem_id") or "", props.get("value")))
        return self.server.event(event["id"], data, event_data)

    def parts(self) -> list[tuple[int, str]]:
        """(component, function) of everything that the page's scripts may call directly, each function once."""
        found = {fn: n for n, c in self.components.items() for fn in c["props"].get("server_fns") or []}
        return [(component, function) for function, component in found.items()]

    def call(self, component: int, function: str, data: Any) -> Any:
        session = uuid.uuid4().hex
        request = {"component_id": component, "fn_name": function, "data": data, "session_hash": session}
        return self.server.post("/gradio_api/component_server", request)


@pytest.fixture(scope="module")
def page(local: Server) -> Page:
    return Page(local)


@pytest.fixture(scope="module")
def member_page(member: Server) -> Page:
    return Page(member)


def runs_of(server: Server) -> set[str]:
    return set(os.listdir(server.workspace / "runs"))


# --- what can be called at all ------------------------------------------------------------------------------------


def test_no_event_is_a_public_endpoint(page: Page) -> None:
    """An unnamed lambda would become a public endpoint; whatever is public has to be listed here."""
    info = page.server.fetch("/gradio_api/info").json()
    assert info["named_endpoints"] == {}
    assert {d["api_name"] for d in page.config["dependencies"] if d["api_visibility"] != "private"} <= {"js_fn"}


def test_private_events_have_no_address(page: Page) -> None:
    for event in page.config["dependencies"]:
        answer = page.server.post(f"/gradio_api/call/{event['api_name']}", {"data": []})
        assert answer.status in (403, 404, 422), event["api_name"]


def test_scripts_may_call_these_functions_only(page: Page) -> None:
    assert {function for _, function in page.parts()} == VERBS
    for component, _ in page.parts():
        for name in ("postprocess", "__init__", "_", "value.__class__", "get_config", ""):
            assert page.call(component, name, ["x"]).status in (404, 422)


def test_no_route_of_gradio_takes_a_shared_link(page: Page) -> None:
    assert page.server.fetch("/gradio_api/deep_link?session_hash=x").status == 404
    assert page.server.fetch("/gradio_api/mcp/").status == 404


# --- runs by hostile names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["../x", "..", "", f"{RUN_ID}/../{RUN_ID}", "/etc", "\0", None, 7, ["a"], {"a": 1}])
def test_verbs_on_hostile_runs(page: Page, run: Any) -> None:
    """kohya_ss once deleted any file that a hidden textbox named: kohya_ss#3604."""
    before = runs_of(page.server)
    for component, function in page.parts():
        if function != "set_preference":
            for data in ([run], run):
                answer = page.call(component, function, data)
                assert answer.status in (200, 422, 500)
                assert answer.status != 200 or any(answer.json().get(key) for key in ("error", "problems"))
                assert str(page.server.workspace) not in answer.text
    assert runs_of(page.server) == before
    assert not (page.server.workspace / "trash").exists() or not os.listdir(page.server.workspace / "trash")


@pytest.mark.parametrize("arguments", [["theme", "../x"], ["models", "x"], ["lora_folder", "/etc"], [], "theme", None])
def test_preferences_are_from_a_list(page: Page, arguments: Any) -> None:
    for component, function in page.parts():
        if function == "set_preference":
            answer = page.call(component, function, arguments)
            assert answer.status == 500 or answer.json()["error"]
    settings = page.server.workspace / "settings.toml"
    assert not settings.exists() or "etc" not in settings.read_text()


@pytest.mark.parametrize("name", ["clone", "use", "fromfile", "frame"])
@pytest.mark.parametrize(
    "value", ["../x", "/etc/passwd", "{workspace}/.secret", "{workspace}/runs/../.secret", None, 7]
)
def test_clips_and_runs_by_hostile_names(page: Page, name: str, value: Any) -> None:
    if isinstance(value, str):
        value = value.format(workspace=page.server.workspace)
    uploads = page.server.workspace / "cache" / "uploads"
    before = set(uploads.rglob("*"))
    message = page.run(name, {}, {"run": value, "media": value, "path": value})
    text = json.dumps(message)
    assert "root:" not in text
    assert "Traceback" not in text
    assert not {path for path in set(uploads.rglob("*")) - before if path.is_file()}


# --- values of the form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "{workspace}/.secret", "{workspace}/runs/{run}/outputs/clip.png"])
def test_files_of_this_machine_are_no_uploads(page: Page, path: str) -> None:
    """Gradio gives a handler only files that were uploaded, whatever path a request names.

    A mounted Blocks skips that check unless it is marked as launched: any file could be copied and fetched.
    """
    uploads = page.server.workspace / "cache" / "uploads"
    before = set(uploads.rglob("*"))
    path = path.format(workspace=page.server.workspace, run=RUN_ID)
    file = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    for element in ("k5-f-image", "k5-f-prompt", "k5-loras", "k5-actions"):
        message = page.run("generate", {"k5-f-task": "k5-demo-i2v", element: file}, {"count": 1})
        assert message["success"] is False, element
        assert "root:" not in json.dumps(message)
    assert set(uploads.rglob("*")) == before
    assert page.server.fetch(f"/gradio_api/file={path}").status == 403
    assert runs_of(page.server) == {RUN_ID}


def test_every_event_survives_hostile_values(page: Page) -> None:
    """Any value in any place: an answer or an error, no file, no run, no secret, and the app lives."""
    secret = (page.server.workspace / ".secret").read_bytes().hex()
    values = [v.replace("{workspace}", str(page.server.workspace)) if isinstance(v, str) else v for v in HOSTILE_VALUES]
    handlers = {event["api_name"].rstrip("_0123456789"): event for event in page.config["dependencies"]}
    for event in handlers.values():
        for shift in range(0, len(values), 4):
            turned = values[shift:] + values[:shift]
            data = [turned[index % len(turned)] for index in range(len(event["inputs"]))]
            text = json.dumps(page.server.event(event["id"], data, {"count": turned[0], "path": turned[1]}))
            assert "root:" not in text
            assert secret not in text
    assert not Path("/tmp/k5-owned").exists()
    assert runs_of(page.server) == {RUN_ID}
    assert page.server.fetch("/api/status").status == 200


def test_the_settings_in_a_clip_are_not_trusted(page: Page) -> None:
    """A clip from the internet may name any file of this machine as its start image; only images are taken over."""
    info, picture = PngInfo(), io.BytesIO()
    options = {"task": "k5-demo-i2v", "prompt": "x", "image": f"{page.server.workspace}/.secret"}
    info.add_text("k5_settings", json.dumps({"version": 1, "options": options}))
    Image.new("RGB", (8, 8)).save(picture, "PNG", pnginfo=info)
    (stored,) = page.server.upload("clip.png", picture.getvalue()).json()
    message = page.run("fromfile", {}, {"path": stored})
    assert message["success"], message
    secret = (page.server.workspace / ".secret").read_bytes()
    uploads = page.server.workspace / "cache" / "uploads"
    assert not [path for path in uploads.rglob("*") if path.is_file() and path.read_bytes() == secret]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"k5-f-task": "../../../etc"}, 1),
        ({"k5-f-task": ["k5-demo-t2v"]}, 1),
        ({"k5-f-frames": -5}, 1),
        ({"k5-f-seed": 2**70}, 1),
        ({"k5-f-steps": "many"}, 1),
        ({}, 0),
        ({}, 100_000),
    ],
)
def test_a_refused_form_makes_no_run(page: Page, changes: dict[str, Any], count: int) -> None:
    page.run("generate", {"k5-f-task": "k5-demo-t2v", "k5-f-prompt": "a red circle", **changes}, {"count": count})
    assert runs_of(page.server) == {RUN_ID}


# --- an app that lets others in reads its roots only --------------------------------------------------------------

OUTSIDE = "/etc/passwd"


@pytest.mark.parametrize(
    "changes",
    [
        {"k5-loras": [{"path": OUTSIDE, "strength": 1.0}]},
        {"k5-loras": [{"path": "{roots}/../local/secret.png", "strength": 1.0}]},
        {"k5-loras": [{"path": "{roots}/link", "strength": 1.0}]},
        {"k5-f-from_file": OUTSIDE, "k5-f-prompt": ""},
        {"k5-f-from_file": "{roots}/prompts.txt", "k5-f-prompt": ""},
        {"k5-f-latent_path": OUTSIDE},
        {"k5-f-dit": "/"},
        {"k5-f-vae": OUTSIDE},
        {"k5-f-text_encoder_qwen": "/etc"},
    ],
)
def test_paths_outside_the_roots(member_page: Page, changes: dict[str, Any]) -> None:
    server = member_page.server
    roots = server.workspace.parent / "roots"
    (roots / "prompts.txt").write_text(f"a red circle --i {server.workspace.parent}/local/secret.png\n")
    if not (roots / "link").is_symlink():
        (roots / "link").symlink_to(OUTSIDE)
    filled = json.loads(json.dumps(changes).replace("{roots}", str(roots)))
    if "k5-f-from_file" in changes:
        filled["k5-f-task"] = "k5-demo-i2v"
    before = runs_of(server)
    message = json.dumps(
        member_page.run("generate", {"k5-f-task": "k5-demo-t2v", "k5-f-prompt": "a red circle", **filled}, {"count": 1})
    )
    assert runs_of(server) == before
    assert "outside the folders" in message
    assert "root:" not in message


def test_settings_outside_the_roots(member_page: Page) -> None:
    changes = {"k5-s-task": "k5-pro-t2v-5s-sd", "k5-s-dit": OUTSIDE, "k5-s-lora_folder": "/etc"}
    event = next(
        d for d in member_page.config["dependencies"] if [95, "click"] in d["targets"] or d["api_name"] == "_save"
    )
    data = [changes.get(member_page.components[n]["props"].get("elem_id"), "") for n in event["inputs"]]
    member_page.server.event(event["id"], data)
    settings = member_page.server.workspace / "settings.toml"
    assert not settings.exists() or "/etc" not in settings.read_text()


def test_a_whole_form_makes_a_run_and_nothing_else(page: Page) -> None:
    """The counterpart of all refusals, last because it starts an engine: the same call with honest values works."""
    message = page.run(
        "generate", {"k5-f-task": "k5-demo-t2v", "k5-f-prompt": "a red circle", "k5-f-steps": 1}, {"count": 1}
    )
    assert message["success"], message
    (made,) = runs_of(page.server) - {RUN_ID}
    run = page.server.fetch(f"/api/runs/{made}").json()
    assert run["prompt"] == "a red circle"
    component = next(n for n, function in page.parts() if function == "stop")
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and page.server.fetch(f"/api/runs/{made}").json()["ended"] is None:
        page.call(component, "dequeue", [made])
        page.call(component, "kill", [made])
        state = page.server.fetch(f"/api/runs/{made}").json()
        if state["state"] == "queued" and state["queue_position"] is None:
            break
        time.sleep(0.3)
    assert page.call(component, "trash", [made]).json() == {}
    assert runs_of(page.server) == {RUN_ID}
    assert os.listdir(page.server.workspace / "trash") == [made]
