"""The guard before every route of the app, Gradio's own included: Host, cross-site requests, token, headers.

A page of any web site can send requests to a server on this machine. Four attacks follow from that, and each has its
answer here:

* DNS rebinding: a site points its own name at 127.0.0.1 and is then same-origin with us. The browser still sends that
  name as Host, so a Host that is not ours is refused. An address cannot be rebound, only a name can; when the app
  listens on all interfaces, any address is therefore accepted as Host.
* Cross-site requests: browsers say in Sec-Fetch-Site where a request comes from. Only `same-origin` and `none` (typed,
  bookmarked) pass; from elsewhere only a link that opens our page as a whole passes, and not for the routes that
  answer with data. Browsers without that header send Origin on unsafe methods, WebSockets and CORS reads: it must name
  our Host. A request with neither is no browser's, and a program on this machine needs no browser to reach us. These
  are the rules of the W3C's Fetch Metadata draft ("resource isolation policy") and of Go's CrossOriginProtection.
  `same-site` is refused too: another port of localhost is the same site, but not the same program.
* Framing (clickjacking): frame-ancestors 'self'.
* Strangers on the network, when the app is exposed: a random token, given once in the URL and then kept in a cookie
  that scripts cannot read and other sites cannot send. Comparisons take constant time.

Pure ASGI, so that it wraps the whole server, streams included, and can be tested without one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
DATA_ROUTES = ("/api/", "/gradio_api/", "/config", "/monitoring")
#: Gradio's routes that this app never uses: other sites, recordings, shared links, calls by name, dashboards.
CLOSED_ROUTES = (
    "/gradio_api/proxy=",
    "/gradio_api/file=http:",
    "/gradio_api/file=https:",
    "/gradio_api/process_recording",
    "/gradio_api/deep_link",
    "/gradio_api/dev/",
    "/gradio_api/run-history",
    "/gradio_api/profiling",
    "/gradio_api/vibe-",
    "/gradio_api/undo-vibe-edit",
    "/gradio_api/mcp",
    "/gradio_api/call/",
    "/gradio_api/api/",
    "/gradio_api/startup-events",
    "/gradio_api/openapi.json",
    "/openapi.json",
    "/monitoring",
    "/login",
)
#: Everything that the page loads comes from this server; Gradio's front end needs inline styles, scripts and eval.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
_COOKIE_SECONDS = 30 * 24 * 3600
_HOW_TO_ENTER = (
    "This K5 Studio is protected by a token. Open the address that the terminal printed when the app started; "
    "it ends with ?token=..."
)


@dataclass(frozen=True)
class Policy:
    """Who may talk to the app.

    `hosts` are host names without port, lower case; `any_address` accepts every IP address as Host (an app that listens
    on all interfaces). `token` None means that the app is not exposed; `cookie_name` must differ between apps of one
    host, because cookies do not know ports. `root_path` is the path under which a proxy shows the app ("" or "/k5").
    """

    hosts: frozenset[str] = LOOPBACK_NAMES
    any_address: bool = False
    token: str | None = field(default=None, repr=False)
    cookie_name: str = "k5_studio"
    root_path: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not served: the HTTP status and one sentence."""

    status: int
    reason: str


def split_host(value: str) -> tuple[str, str] | None:
    """(name, port or "") of a Host header or of an Origin's authority, brackets of IPv6 removed; None if malformed."""
    name, bracket, rest = value.strip().lower().partition("]")
    if name.startswith("["):
        if not bracket or not _address(name[1:]):
            return None
        name, port = name[1:], rest
    else:
        name, colon, digits = value.strip().lower().partition(":")
        port = colon + digits
    if port and not (port[0] == ":" and port[1:].isascii() and port[1:].isdigit() and len(port) <= 6):
        return None
    return (name, port[1:]) if name else None


def _address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI application: refuses what `policy` does not allow, hands the rest to `app`, adds security headers."""

    def __init__(self, app: Application, policy: Policy) -> None:
        self.app = app
        self.policy = policy
        self._cookie_value = _derive(policy.token) if policy.token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; only the server's own `lifespan` passes unchecked."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = _Headers(scope["headers"])
        refusal = check_host(headers, self.policy) or check_origin(scope, headers, self.policy)
        refusal = refusal or check_route(scope, self.policy)
        if refusal is None and self.policy.token:
            if scope["type"] == "http" and scope["method"] == "GET" and self._token_in_query(scope):
                await self._welcome(scope, headers, send)
                return
            refusal = self._check_token(headers)
        if refusal is not None:
            await _refuse(scope, receive, send, refusal)
            return
        if self.policy.root_path:  # a proxy may hand the root path on or cut it off; the application knows it cut off
            path = _path(scope, self.policy)
            scope = {**scope, "path": path, "raw_path": quote(path).encode()}
        await self.app(scope, receive, _with_headers(send))

    def _token_in_query(self, scope: Scope) -> bool:
        given = [value for key, value in _query(scope) if key == "token"]
        return len(given) == 1 and _equal(given[0], self.policy.token or "")

    def _check_token(self, headers: _Headers) -> Refusal | None:
        """The cookie of a browser, or `Authorization: Bearer <token>` of a script."""
        scheme, _, bearer = headers.one("authorization").partition(" ")
        if scheme.lower() == "bearer" and _equal(bearer.strip(), self.policy.token or ""):
            return None
        name = f"{self.policy.cookie_name}="
        cookies = [part.strip() for value in headers.all("cookie") for part in value.split(";")]
        if any(_equal(part[len(name) :], self._cookie_value) for part in cookies if part.startswith(name)):
            return None
        return Refusal(401, _HOW_TO_ENTER)

    async def _welcome(self, scope: Scope, headers: _Headers, send: Send) -> None:
        """Put the token into a cookie and out of the address bar (history, screenshots, Referer).

        After a link on another site a redirect would still count as that site's, and a SameSite=Strict cookie would not
        be sent; there a page of our own moves on instead.
        """
        rest = urlencode([(key, value) for key, value in _query(scope) if key != "token"])
        # A path of our own only: "//host" would leave this server.
        location = self.policy.root_path + quote(_path(scope, self.policy)) + ("?" + rest if rest else "")
        cookie = (
            f"{self.policy.cookie_name}={self._cookie_value}; Path={self.policy.root_path or '/'}; "
            f"Max-Age={_COOKIE_SECONDS}; HttpOnly; SameSite=Strict"
        )
        if scope.get("scheme") == "https":
            cookie += "; Secure"
        answer = [(b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
        if headers.one("sec-fetch-site") in ("cross-site", "same-site"):
            page = f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(location, quote=True)}">'
            answer.append((b"content-type", b"text/html; charset=utf-8"))
            await _answer(_with_headers(send), 200, answer, page.encode())
        else:
            await _answer(_with_headers(send), 303, [(b"location", location.encode()), *answer], b"")


def check_host(headers: _Headers, policy: Policy) -> Refusal | None:
    """Exactly one Host header, and it names this app (DNS rebinding)."""
    values = headers.all("host")
    parsed = split_host(values[0]) if len(values) == 1 else None
    if parsed is None:
        return Refusal(400, "The request has no valid Host header.")
    if parsed[0] in policy.hosts or (policy.any_address and _address(parsed[0])):
        return None
    return Refusal(403, "This name is not one of this app's. Start it with --listen --allow-host NAME to allow it.")


def check_origin(scope: Scope, headers: _Headers, policy: Policy) -> Refusal | None:
    """The request comes from our own page, from the address bar, from a link to our page, or from no browser at all."""
    websocket = scope["type"] == "websocket"
    site = headers.one("sec-fetch-site").lower()
    origins = headers.all("origin")
    if site and site not in ("same-origin", "none") and not _opens_the_page(scope, headers, policy):
        return Refusal(403, "Requests from other sites are refused.")
    if len(origins) > 1 or (origins and not _same_origin(origins[0], headers.one("host"))):
        return Refusal(403, "Requests from other origins are refused.")
    if websocket and site and not origins:
        return Refusal(403, "A browser's WebSocket must say its origin.")
    return None


def _opens_the_page(scope: Scope, headers: _Headers, policy: Policy) -> bool:
    """A link on another site that opens our page as a whole tab: nothing of the answer reaches that site."""
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and headers.one("sec-fetch-mode") == "navigate"
        and headers.one("sec-fetch-dest") == "document"
        and not headers.one("origin")
        and not _path(scope, policy).startswith(DATA_ROUTES)
    )


def _same_origin(origin: str, host: str) -> bool:
    """Whether an Origin names the same host and port as the Host header.

    The scheme is left out: behind a proxy that ends TLS we see http where the browser sees https. A missing port is the
    default one of the Origin's scheme.
    """
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return False
    default = {"http": "80", "https": "443"}[parts.scheme]
    named, ours = split_host(parts.netloc), split_host(host)
    return named is not None and ours is not None and (named[0], named[1] or default) == (ours[0], ours[1] or default)


def check_route(scope: Scope, policy: Policy) -> Refusal | None:
    """Routes of Gradio that this app never uses do not exist."""
    closed = _path(scope, policy).lower().startswith(CLOSED_ROUTES)
    return Refusal(404, "There is nothing here.") if closed else None


# --- small parts --------------------------------------------------------------------------------------------------


def _path(scope: Scope, policy: Policy) -> str:
    """The request's path below the root path, with exactly one slash at its start."""
    path = scope["path"]
    if policy.root_path and (path + "/").startswith(policy.root_path + "/"):
        path = path[len(policy.root_path) :]
    return "/" + path.lstrip("/\\")


class _Headers:
    """Header values of a request by lower-case name."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._raw = [(name.lower(), value) for name, value in raw]

    def all(self, name: str) -> list[str]:
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._raw if key == wanted]

    def one(self, name: str) -> str:
        """The only value; empty if it is missing, the values joined if there are several (which then match nothing)."""
        return ", ".join(self.all(name)).strip()


def _query(scope: Scope) -> list[tuple[str, str]]:
    try:
        return parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True, max_num_fields=50)
    except ValueError:
        return []


def _derive(token: str) -> str:
    """The cookie's value: a stolen cookie does not give away the token."""
    return hmac.new(token.encode(), b"k5 studio cookie", hashlib.sha256).hexdigest()


def _equal(given: str, expected: str) -> bool:
    return bool(expected) and hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _with_headers(send: Send) -> Send:
    """Add the security headers that the application has not set itself."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", ())}
            extra = [(name, value) for name, value in HEADERS if name not in present]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return sender


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    body = b"" if scope["method"] == "HEAD" else (refusal.reason + "\n").encode()
    await _answer(_with_headers(send), refusal.status, headers, body)
