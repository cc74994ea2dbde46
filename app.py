"""K5 Studio: `python app.py` serves the page on this machine; see --help for the rest."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import K5Error, UserError
from backend.files import write_problem
from k5ui.guard import LOOPBACK_NAMES, Guard, Policy, split_host

if TYPE_CHECKING:
    from k5ui.services import Services

DEFAULT_PORT = 7860
_PORTS_TO_TRY = 50
_BACKLOG = 128
_UPLOAD_LIMIT = "8gb"
_CLEAN_EVERY_SECONDS = 3600
_CLEAN_OLDER_SECONDS = 24 * 3600
_SHUTDOWN_SECONDS = 2
_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with, and refused without --listen


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; returns the exit code: 0 after an ordinary end, 2 for a mistake in the request."""
    options = _parser().parse_args(arguments)
    try:
        serve(options)
    except K5Error as error:
        print(f"K5 Studio cannot start: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print()
    print("K5 Studio has ended. Jobs that run go on; start it again to see them.", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="app.py", description="K5 Studio, a web app for Kandinsky 5.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; other machines can reach it only with --listen")
    add("--port", type=int, default=DEFAULT_PORT, help="port (default: %(default)s; 0 takes any free one)")
    add(
        "--workspace",
        default="workspace",
        metavar="FOLDER",
        help="folder of runs, settings, caches (default: ./workspace)",
    )
    add("--listen", action="store_true", help="let other machines in, with a token that is printed at the start")
    add("--allow-host", action="append", default=[], metavar="NAME", help="further name of this app, as behind a proxy")
    add("--root", action="append", default=[], metavar="FOLDER", help="folder that may be read when others are let in")
    add("--root-path", default="", metavar="/PATH", help="path under which a proxy shows the app")
    return parser


def serve(options: argparse.Namespace) -> None:
    """Start the server and stay until it ends.

    The port is taken before the slow imports: a mistake shows at once, and a browser that is early waits for the page.

    Raises:
        UserError: the address, the port or the workspace cannot be used.
    """
    root_path = _root_path(options.root_path)
    exposed = _check_exposure(options)
    listener = open_port(options.host, options.port)
    with listener:
        host, port = listener.getsockname()[:2]
        workspace = prepare_workspace(options.workspace)
        signal.signal(signal.SIGTERM, _end)
        prepare_environment(workspace)
        token = secrets.token_urlsafe(32) if exposed else None
        policy = make_policy(options.host, options.allow_host, token, port, root_path)
        address = f"http://{_shown_host(host)}:{port}{root_path}/" + (f"?token={token}" if token else "")
        services, application = build(workspace, options.root, exposed, policy)
        services.start()
        try:
            run_server(application, listener, f"K5 Studio is ready: {address}")
        finally:
            services.close()


def _end(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


# --- before the slow imports --------------------------------------------------------------------------------------


def _root_path(text: str) -> str:
    path = "/" + text.strip("/") if text.strip("/") else ""
    if not all(letter.isalnum() or letter in "/-_.~" for letter in path) or "//" in path or ".." in path:
        raise UserError(f"--root-path {text!r} is not a path. Write it like /k5.")
    return path


def _check_exposure(options: argparse.Namespace) -> bool:
    """Whether other machines may reach the app; they may only if that was said plainly."""
    if options.listen:
        return True
    if options.host.strip("[]").lower() not in LOOPBACK_NAMES:
        raise UserError(
            f"--host {options.host} lets other machines reach this app. Add --listen if you mean it: "
            "it then asks for a token that is printed at the start."
        )
    if options.allow_host:
        raise UserError("--allow-host is for an app that others reach. Add --listen if you mean it.")
    return False


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the port is taken (with the next free one), may not be used, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port} is not a port. Choose one from 1024 to 65535.")
    try:
        return _listen(host, port)
    except socket.gaierror:
        raise UserError(
            f"--host {host} is not an address of this machine. Leave it out to serve on 127.0.0.1."
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _next_free_port(host, port)
            advice = f"Use --port {free}, which is free" if free else "Choose another with --port"
            raise UserError(
                f"Port {port} of {host} is taken by another program, perhaps by K5 Studio itself. {advice}."
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"Port {port} may not be used without special rights. Choose one from 1024 on.") from None
        raise UserError(f"{host}, port {port}, cannot be used: {error.strerror}. Check --host and --port.") from None


def _listen(host: str, port: int) -> socket.socket:
    name = host.strip("[]")
    family, kind, protocol, _, address = socket.getaddrinfo(
        name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name != "nt":  # on Windows this would let two programs share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and name == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _next_free_port(host: str, port: int) -> int | None:
    for candidate in range(port + 1, min(port + _PORTS_TO_TRY, 65535) + 1):
        try:
            _listen(host, candidate).close()
        except OSError:
            continue
        return candidate
    return None


def prepare_workspace(folder: str) -> Path:
    """The absolute path of a workspace that exists and can be written.

    Raises:
        UserError: it cannot.
    """
    workspace = Path(folder).expanduser().absolute()
    probe = workspace / f".probe-{secrets.token_hex(4)}"
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        problem = write_problem(error, workspace)
        detail = f"{workspace} cannot be used: {error.strerror}." if problem is error else str(problem)
        raise UserError(f"{detail} Name another folder with --workspace.") from None
    return workspace


def prepare_environment(workspace: Path) -> None:
    """What Gradio reads when it is imported: no statistics, uploads inside the workspace."""
    from k5ui.services import upload_folder

    uploads = upload_folder(workspace)
    uploads.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = os.fspath(uploads)


def make_policy(host: str, names: Sequence[str], token: str | None, port: int, root_path: str) -> Policy:
    """Who may talk to the app: this machine, the address that it listens on, and the names that were given."""
    hosts = set(LOOPBACK_NAMES)
    for name in (host, *names):
        parsed = split_host(f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name)
        if parsed is None:
            raise UserError(f"{name!r} is not the name of a host. Write it like studio.example.")
        hosts.add(parsed[0])
    everywhere = host.strip("[]") in _EVERYWHERE
    if everywhere:
        hosts.add(socket.gethostname().lower())
    return Policy(frozenset(hosts), everywhere, token, f"k5_studio_{port}", root_path)


def _shown_host(host: str) -> str:
    """What to type into a browser for an address that the app listens on."""
    if host in _EVERYWHERE:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


# --- the server ---------------------------------------------------------------------------------------------------


def build(workspace: Path, roots: Sequence[str], exposed: bool, policy: Policy) -> tuple[Services, Guard]:
    """The services of a workspace, and the guarded application: own routes first, Gradio's page for everything else."""
    from k5ui.services import Services

    services = Services(workspace, roots, exposed)
    gradio = _import_gradio()
    from fastapi import FastAPI

    from k5ui import api, ui

    application = FastAPI(title="K5 Studio", docs_url=None, redoc_url=None, openapi_url=None)
    application.include_router(api.router(services))
    page = ui.build(services)
    page.delete_cache = (_CLEAN_EVERY_SECONDS, _CLEAN_OLDER_SECONDS)
    gradio.mount_gradio_app(
        application,
        page,
        path="/",
        root_path=policy.root_path or None,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        show_error=True,
        max_file_size=_UPLOAD_LIMIT,
        **ui.launch_options(services),
    )
    # Without this Gradio 6.31 takes any path of this machine that a request calls an upload, copies and serves it: the
    # check looks at this mark, which only Blocks.launch sets.
    page.has_launched = True
    return services, Guard(application, policy)


def _import_gradio() -> Any:
    """Import Gradio without network: the hub's client reads HF_HUB_OFFLINE once; jobs get the person's own value."""
    own = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    gc.disable()  # a tenth faster: everything that is imported stays anyway
    try:
        import gradio
    finally:
        gc.enable()
        del os.environ["HF_HUB_OFFLINE"]
        if own is not None:
            os.environ["HF_HUB_OFFLINE"] = own
    return gradio


def run_server(application: Any, listener: socket.socket, ready: str) -> None:
    """Serve on `listener` until Ctrl-C or SIGTERM; prints `ready` as soon as requests are answered."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                print(ready, flush=True)

    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    Server(config).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
