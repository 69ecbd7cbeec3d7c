"""Serve the page on this machine, and nothing else."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from visexpert.app.page import build_page, theme
from visexpert.app.session import Session, write_examples
from visexpert.errors import ConfigError

API = "/gradio_api/"
CALLED = (
    "queue/",
    "upload",
    "upload_progress",
    "file=",
    "heartbeat/",
    "info",
    "startup-events",
    "app_id",
    "theme.css",
    "cancel",
    "reset",
    "user",
    "login_check",
    "run/predict",
)
"""Routes that the page calls. Gradio serves more: recordings, tools for editing the page, a proxy, files by address."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Content-Security-Policy: the browser loads from this server only."""


MAX_REQUEST = 1_000_000
"""Bytes of a request other than an upload."""


@contextmanager
def serving(session: Session, *, host: str = "127.0.0.1", port: int = 7860, max_upload_mb: int = 10) -> Iterator[str]:
    """Serve the page while the block runs; yields its address.

    Args:
        session: Answers.
        host: Address to bind to.
        port: Port to bind to.
        max_upload_mb: Largest file that is taken, in megabytes.

    Raises:
        ConfigError: The address cannot be bound.
    """
    check_address(host, port)
    with TemporaryDirectory(prefix="visexpert-") as folder, _uploads_in(Path(folder) / "uploads") as uploads:
        examples = Path(folder) / "examples"
        examples.mkdir()
        page = build_page(session, uploads=uploads, examples=write_examples(session.main.captioner, examples))
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=max_upload_mb * 1_000_000,
                allowed_paths=[str(examples)],
                theme=theme(),
                footer_links=[],
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                app_kwargs={"middleware": _layers(host), "docs_url": None, "redoc_url": None},
            )
        except OSError as error:
            raise _refused(host, port, error) from error
        try:
            yield url
        finally:
            page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Check that an address can be bound, which takes no model.

    Raises:
        ConfigError: It cannot, mostly because another program serves there.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:  # a port above 65535 overflows
        raise _refused(host, port, error) from error


def _refused(host: str, port: int, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or error
    return ConfigError(f"The page cannot be served at {host}:{port} ({reason}); take another --port or --host.")


def _layers(host: str) -> list[Middleware]:
    """Return the layers; a page for this machine refuses foreign host names, which could be made to resolve to it."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    hosts = ["localhost", "127.0.0.1", host] if local else ["*"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Guard)]


@contextmanager
def _uploads_in(folder: Path) -> Iterator[Path]:
    """Let gradio keep uploads in a folder that is deleted with the server."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


class Guard:
    """ASGI layer that refuses what the page does not call, and tells the browser to load from nowhere else."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not is_called(scope["path"]):
            await PlainTextResponse("This page does not offer that.", status_code=403)(scope, receive, send)
            return
        if scope["method"] == "POST" and not scope["path"].startswith(f"{API}upload"):
            body = await _body(scope, receive)
            if body is None or names_an_address(body):
                await PlainTextResponse("The request is too large, or names an address.", 403)(scope, receive, send)
                return
            receive = _again(body, receive)
        await self._app(scope, receive, _with_policy(send))


def names_an_address(body: bytes) -> bool:
    """Return whether a request names a file by its address, which gradio would fetch for any component.

    A request that is nested too deeply to check counts as one that does.
    """
    try:
        parts: list[Any] = [json.loads(body)]
    except RecursionError:
        return True
    except ValueError:
        return False  # gradio answers that it is not JSON
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if "://" in str(part.get("path", "")):
                return True
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return False


async def _body(scope: Any, receive: Any) -> bytes | None:
    """The whole body, or None beyond the limit."""
    body = b""
    async for chunk in Request(scope, receive).stream():
        body += chunk
        if len(body) > MAX_REQUEST:
            return None
    return body


def _again(body: bytes, receive: Any) -> Any:
    """Return a receiver that replays a body which was already read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return messages.pop() if messages else await receive()

    return receive_again


def is_called(path: str) -> bool:
    """Whether the page itself asks for a path of the server."""
    if not path.startswith(API):
        return not path.startswith("/monitoring")
    rest = path.removeprefix(API)
    return rest.startswith(CALLED) and not (rest.startswith("file=") and "://" in rest)


def _with_policy(send: Any) -> Any:
    async def send_with_policy(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
        await send(message)

    return send_with_policy
