"""Requests that other sites and strangers can send to a running app: names, origins, tokens, over real HTTP."""

from __future__ import annotations

import base64
import http.client
import os

import pytest

from tests.security.server import Server

ROUTES = (
    *("/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/queue/data?session_hash=x", "/api/status"),
    *("/api/runs", "/gradio_api/heartbeat/x", "/assets/none.js", "/gradio_api/file=/etc/passwd", "/no/such/route"),
)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "[::2]:1"])
def test_dns_rebinding(local: Server, route: str, host: str) -> None:
    """A name of somebody else that points at this machine opens nothing, not even Gradio's own routes."""
    answer = local.fetch(route, {"Host": host.format(port=local.port)})
    assert answer.status == 403
    assert "evil" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}"])
def test_our_own_names_open_the_page(local: Server, host: str) -> None:
    answer = local.fetch("/", {"Host": host.format(port=local.port)})
    assert answer.status == 200
    assert "K5 Studio" in answer.text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_other_sites_read_nothing(local: Server, route: str, headers: dict[str, str]) -> None:
    """Streams of events are plain GETs, so reading is checked as well."""
    assert local.fetch(route, headers).status == 403


def test_a_link_from_another_site_opens_the_page_only(local: Server) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert local.fetch("/", link).status == 200
    assert local.fetch("/api/status", link).status == 403
    assert local.fetch("/", link | {"Sec-Fetch-Dest": "iframe"}).status == 403


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}])
@pytest.mark.parametrize("route", ["/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/component_server"])
def test_other_sites_start_nothing(local: Server, route: str, headers: dict[str, str]) -> None:
    assert local.post(route, {}, headers).status == 403


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}])
def test_other_sites_upload_nothing(local: Server, headers: dict[str, str]) -> None:
    uploads = local.workspace / "cache" / "uploads"
    before = sorted(os.listdir(uploads))
    assert local.upload("x.png", b"hello", headers).status == 403
    assert sorted(os.listdir(uploads)) == before
    assert local.upload("x.png", b"hello").status == 200


def test_preflights_of_other_sites_get_no_permission(local: Server) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = local.fetch("/gradio_api/queue/join", asked, "OPTIONS")
    assert answer.status == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
def test_websockets_of_other_sites_are_refused(local: Server, headers: dict[str, str]) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
    }
    assert local.fetch("/gradio_api/queue/join", upgrade | headers).status == 403


def test_every_answer_carries_the_security_headers(local: Server) -> None:
    for route in ("/", "/api/status", "/config", "/no/such/route"):
        headers = local.fetch(route).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'self'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "same-origin"
        assert "server" not in headers


# --- an app that lets others in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_without_the_token_every_route_is_closed(exposed: Server, route: str) -> None:
    answer = exposed.fetch(route)
    assert answer.status == 401
    assert exposed.token not in answer.text


def test_without_the_token_nothing_is_written(exposed: Server) -> None:
    assert exposed.upload("x.png", b"hello").status == 401
    assert exposed.post("/gradio_api/queue/join", {"fn_index": 0, "data": [], "session_hash": "x"}).status == 401
    assert exposed.fetch("/", method="BREW").status == 401


def test_the_token_is_printed_once_and_becomes_a_cookie(exposed: Server) -> None:
    assert len(exposed.token) >= 40
    assert "".join(exposed.output).count(exposed.token) == 1
    welcome = exposed.fetch(exposed.address)
    assert welcome.status == 303
    assert welcome.headers["location"] == "/"
    cookie, *attributes = welcome.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(attributes)
    assert exposed.token not in cookie
    page = exposed.fetch("/", {"Cookie": cookie})
    assert page.status == 200
    assert exposed.token not in page.text
    assert exposed.fetch("/api/status", {"Cookie": cookie}).status == 200
    name, _, value = cookie.partition("=")
    assert exposed.fetch("/", {"Cookie": f"{name}={value[:-1]}x"}).status == 401


def test_the_token_does_not_switch_the_other_checks_off(member: Server) -> None:
    assert member.fetch("/api/status").status == 200
    assert member.fetch("/api/status", {"Host": "evil.example"}).status == 403
    assert member.upload("x.png", b"x", {"Sec-Fetch-Site": "cross-site"}).status == 403


def test_tokens_differ_between_starts_and_the_local_app_has_none(local: Server, exposed: Server) -> None:
    assert local.token == ""
    assert local.address == "/"
    assert exposed.token not in "".join(local.output)


def test_a_request_without_host_is_refused(local: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", local.port, timeout=10)
    connection.putrequest("GET", "/", skip_host=True)
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()
