"""The guard as a bare ASGI call: tables of hosts, origins, tokens and routes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from k5ui.guard import CLOSED_ROUTES, HEADERS, LOOPBACK_NAMES, Guard, Policy, split_host

LOCAL = Policy()
TOKEN = "a-token-of-the-test"
EXPOSED = Policy(hosts=LOOPBACK_NAMES | {"studio.example"}, token=TOKEN, cookie_name="k5_studio_7860")


class Answer:
    """What a guarded application answered."""

    def __init__(self) -> None:
        self.reached = False
        self.path = ""
        self.messages: list[dict[str, Any]] = []

    @property
    def status(self) -> int:
        return next(m["status"] for m in self.messages if m["type"] == "http.response.start")

    @property
    def headers(self) -> dict[str, str]:
        start = next(m for m in self.messages if m["type"] == "http.response.start")
        return {name.decode(): value.decode() for name, value in start["headers"]}

    @property
    def body(self) -> str:
        return b"".join(m.get("body", b"") for m in self.messages if m["type"] == "http.response.body").decode()


def ask(
    policy: Policy = LOCAL,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    *,
    method: str = "GET",
    path: str = "/",
    query: str = "",
    kind: str = "http",
    scheme: str = "http",
) -> Answer:
    """Send one request through a guard; headers get `Host: localhost:7860` unless they name one."""
    answer = Answer()
    pairs = list(headers.items()) if isinstance(headers, dict) else list(headers or [])
    if not any(name.lower() == "host" for name, _ in pairs):
        pairs.append(("Host", "localhost:7860"))

    async def application(scope, receive, send) -> None:
        answer.reached = True
        answer.path = scope.get("path", "")
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"DENY")]})
            await send({"type": "http.response.body", "body": b"inside"})

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message) -> None:
        answer.messages.append(dict(message))

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs]
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": raw, "scheme": scheme}
    if kind == "http":
        scope["method"] = method
    asyncio.run(Guard(application, policy)(scope, receive, send))
    return answer


# --- hosts --------------------------------------------------------------------------------------------------------

GOOD_HOSTS = ["localhost", "localhost:7860", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:7860", "[::1]", "[::1]:7860"]
BAD_HOSTS = [
    *("evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.2", "0.0.0.0"),
    *("192.168.1.5:7860", "[::2]:7860", "2130706433", "0x7f.1", "localhost@evil.example", "evil.example#localhost"),
]
MALFORMED_HOSTS = [
    *("", ":7860", "localhost:", "localhost:abc", "localhost:7860:1", "::1", "[::1", "::1]", "[localhost]:7860"),
    *("localhost:7860, evil.example", "localhost:99999999", "localhost:٣"),
]


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_our_own_names_pass(host: str) -> None:
    """IPv6 with and without a port too, which a middleware that splits at the first colon never matches."""
    assert ask(headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_other_names_are_refused(host: str) -> None:
    """DNS rebinding: the browser believes that evil.example is us, but it still says its name."""
    answer = ask(headers={"Host": host})
    assert answer.status in (400, 403)
    assert not answer.reached


@pytest.mark.parametrize("host", MALFORMED_HOSTS)
def test_malformed_hosts_are_refused(host: str) -> None:
    raw = host.encode("utf-8").decode("latin-1")
    answer = ask(headers={"Host": raw})
    assert answer.status == 400
    assert not answer.reached


def test_exactly_one_host_is_needed() -> None:
    assert ask(headers=[("Host", "localhost"), ("Host", "localhost")]).status == 400
    answer = Answer()

    async def send(message) -> None:
        answer.messages.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    asyncio.run(Guard(None, LOCAL)(scope, None, send))
    assert answer.status == 400


def test_an_app_on_all_interfaces_takes_any_address_but_no_name() -> None:
    """An address cannot be rebound; a name can."""
    everywhere = Policy(any_address=True)
    assert ask(everywhere, {"Host": "192.168.1.5:7860"}).status == 200
    assert ask(everywhere, {"Host": "[fe80::1]:7860"}).status == 200
    assert ask(everywhere, {"Host": "evil.example"}).status == 403


def test_split_host() -> None:
    assert split_host("[::1]:7860") == ("::1", "7860")
    assert split_host("Localhost") == ("localhost", "")
    assert split_host("[::1]7860") is None


# --- origins ------------------------------------------------------------------------------------------------------

SAME = {"Sec-Fetch-Site": "same-origin"}
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
ORIGIN_CASES = [
    # method, path, headers, passes
    ("GET", "/", {}, True),
    ("POST", "/gradio_api/queue/join", {}, True),  # curl, Python: no browser
    ("POST", "/gradio_api/queue/join", SAME, True),
    ("POST", "/gradio_api/queue/join", SAME | {"Origin": "http://localhost:7860"}, True),
    ("POST", "/gradio_api/queue/join", {"Origin": "http://localhost:7860"}, True),  # a browser without Sec-Fetch
    ("POST", "/gradio_api/queue/join", {"Origin": "https://localhost:7860"}, True),  # TLS ended by a proxy
    ("GET", "/", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, True),
    ("GET", "/", LINK, True),
    ("HEAD", "/", LINK, True),
    ("POST", "/", LINK, False),  # a form on another site
    ("GET", "/", LINK | {"Sec-Fetch-Dest": "iframe"}, False),
    ("GET", "/", LINK | {"Sec-Fetch-Mode": "no-cors"}, False),
    ("GET", "/api/status", LINK, False),
    ("GET", "/gradio_api/queue/data", LINK, False),
    ("GET", "/config", LINK, False),
    ("POST", "/gradio_api/upload", {"Sec-Fetch-Site": "cross-site"}, False),
    ("POST", "/gradio_api/upload", {"Sec-Fetch-Site": "same-site"}, False),  # another port of localhost
    ("POST", "/gradio_api/upload", {"Sec-Fetch-Site": "CROSS-SITE"}, False),
    ("POST", "/gradio_api/upload", {"Sec-Fetch-Site": "nonsense"}, False),
    ("GET", "/gradio_api/queue/data", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "empty"}, False),
    ("GET", "/api/media/x", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "video"}, False),
    ("POST", "/gradio_api/upload", {"Origin": "http://evil.example"}, False),
    ("POST", "/gradio_api/upload", {"Origin": "null"}, False),
    ("POST", "/gradio_api/upload", {"Origin": "http://localhost:7861"}, False),
    ("POST", "/gradio_api/upload", {"Origin": "http://localhost"}, False),
    ("POST", "/gradio_api/upload", {"Origin": "http://localhost:7860.evil.example"}, False),
    ("POST", "/gradio_api/upload", {"Origin": "http://evil.example@localhost:7860"}, False),
    ("POST", "/gradio_api/upload", {"Origin": "file://localhost:7860"}, False),
    ("POST", "/gradio_api/upload", SAME | {"Origin": "http://evil.example"}, False),
    ("GET", "/api/status", {"Origin": "http://evil.example"}, False),
    ("OPTIONS", "/gradio_api/upload", {"Origin": "http://evil.example"}, False),
    ("PUT", "/x", {"Sec-Fetch-Site": "cross-site"}, False),
    ("DELETE", "/x", {"Origin": "http://evil.example"}, False),
]


@pytest.mark.parametrize(("method", "path", "headers", "passes"), ORIGIN_CASES)
def test_where_requests_may_come_from(method: str, path: str, headers: dict[str, str], passes: bool) -> None:
    answer = ask(headers=headers, method=method, path=path)
    assert answer.reached is passes
    assert answer.status == (200 if passes else 403)


def test_two_origins_are_refused() -> None:
    headers = [("Origin", "http://localhost:7860"), ("Origin", "http://localhost:7860")]
    assert ask(headers=headers, method="POST").status == 403


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"Origin": "http://localhost:7860"}, True),
        ({}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "websocket"}, False),
        ({"Sec-Fetch-Site": "same-origin"}, False),
        ({"Host": "evil.example"}, False),
    ],
)
def test_websockets(headers: dict[str, str], passes: bool) -> None:
    """No same-origin policy holds a WebSocket back, so the server must look."""
    answer = ask(headers=headers, kind="websocket")
    assert answer.reached is passes
    if not passes:
        assert answer.messages[-1]["type"] == "websocket.close"
        assert answer.messages[-1]["code"] == 1008


def test_an_unknown_kind_of_connection_is_not_let_through() -> None:
    assert not ask(headers={"Host": "evil.example"}, kind="http", method="BREW").reached


# --- routes and headers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", CLOSED_ROUTES)
@pytest.mark.parametrize("spelling", ["{}", "/{}", "{}x/y", "/\\{}"])
def test_routes_that_the_app_never_uses_do_not_exist(route: str, spelling: str) -> None:
    answer = ask(path=spelling.format(route))
    assert answer.status == 404
    assert not answer.reached


def test_closed_routes_below_a_root_path() -> None:
    below = Policy(root_path="/k5")
    assert ask(below, path="/k5/gradio_api/proxy=http://x").status == 404
    assert ask(below, path="/k5/api/status", headers=LINK).status == 403
    assert ask(below, path="/k5").status == 200


@pytest.mark.parametrize(("path", "seen"), [("/k5/a b", "/a b"), ("/k5", "/"), ("/a", "/a"), ("/k55/a", "/k55/a")])
def test_a_proxy_may_hand_the_root_path_on_or_cut_it_off(path: str, seen: str) -> None:
    assert ask(Policy(root_path="/k5"), path=path).path == seen
    assert ask(path=path).path == path


def test_every_answer_carries_the_security_headers() -> None:
    for answer in (ask(), ask(headers={"Host": "evil.example"}), ask(EXPOSED), ask(EXPOSED, query=f"token={TOKEN}")):
        assert {name.decode() for name, _ in HEADERS} <= set(answer.headers)
        assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert ask().headers["x-frame-options"] == "DENY", "what the application says itself stays"


def test_the_servers_own_start_and_end_pass() -> None:
    assert ask(EXPOSED, kind="lifespan").reached


# --- the token ----------------------------------------------------------------------------------------------------


def cookie_of(answer: Answer) -> str:
    return answer.headers["set-cookie"].split(";")[0]


def test_without_the_token_nothing_is_served() -> None:
    for path in ("/", "/api/status", "/config", "/gradio_api/upload", "/assets/x.js", "/no/such/thing"):
        answer = ask(EXPOSED, path=path)
        assert answer.status == 401
        assert not answer.reached
    assert TOKEN not in answer.body
    assert not ask(EXPOSED, kind="websocket").reached


def test_the_token_becomes_a_cookie_and_leaves_the_address() -> None:
    answer = ask(EXPOSED, path="/", query=f"a=1&token={TOKEN}&b=%2F")
    assert answer.status == 303
    assert answer.headers["location"] == "/?a=1&b=%2F"
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert TOKEN not in cookie
    assert "Secure" not in cookie
    assert ask(EXPOSED, {"Cookie": f"other=1; {cookie_of(answer)}; more=2"}).status == 200
    assert "Secure" in ask(EXPOSED, query=f"token={TOKEN}", scheme="https").headers["set-cookie"].split("; ")


def test_after_a_link_on_another_site_our_own_page_moves_on() -> None:
    """A redirect would count as the other site's request, and a strict cookie would not be sent with it."""
    answer = ask(EXPOSED, LINK, query=f'token={TOKEN}&x="><script>')
    assert answer.status == 200
    assert 'url=/?x=%22%3E%3Cscript%3E"' in answer.body
    assert "<script" not in answer.body


@pytest.mark.parametrize(
    "headers",
    [
        {"Cookie": "k5_studio_7860="},
        {"Cookie": f"k5_studio_7860={TOKEN}"},
        {"Cookie": "k5_studio_7860=ünknown"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {TOKEN}"},
    ],
)
def test_wrong_secrets(headers: dict[str, str]) -> None:
    assert ask(EXPOSED, headers).status == 401


@pytest.mark.parametrize("query", ["token=", "token=wrong", f"token={TOKEN}x", f"token={TOKEN}&token=x", "token=%00"])
def test_wrong_tokens_in_the_address(query: str) -> None:
    assert ask(EXPOSED, query=query).status == 401


def test_the_token_in_the_address_is_for_reading_only() -> None:
    assert ask(EXPOSED, method="POST", query=f"token={TOKEN}").status == 401


def test_a_script_may_send_the_token_as_a_bearer() -> None:
    assert ask(EXPOSED, {"Authorization": f"Bearer {TOKEN}"}, method="POST").status == 200


def test_the_token_does_not_open_other_hosts_or_origins() -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert ask(EXPOSED, bearer | {"Host": "evil.example"}).status == 403
    assert ask(EXPOSED, bearer | {"Origin": "http://evil.example"}, method="POST").status == 403
    assert ask(EXPOSED, bearer | {"Host": "studio.example"}).status == 200


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "\\\\evil.example", "/\r\nSet-Cookie: x=1"])
def test_the_redirect_stays_here(path: str) -> None:
    location = ask(EXPOSED, path=path, query=f"token={TOKEN}").headers["location"]
    assert location.startswith("/")
    assert not location.startswith(("//", "/\\"))
    assert "\n" not in location
    assert (
        ask(Policy(token=TOKEN, root_path="/k5"), path="/k5/x", query=f"token={TOKEN}").headers["location"] == "/k5/x"
    )


def test_the_token_is_not_shown_by_repr() -> None:
    assert TOKEN not in repr(EXPOSED)
