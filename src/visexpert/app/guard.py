"""What a browser, or anybody else, may ask of the page's server."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse

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
"""What the page itself calls. Gradio serves more: recordings, tools for editing the page, a proxy, files by address."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Content-Security-Policy: the browser loads from this server only."""


MAX_REQUEST = 1_000_000
"""Bytes of a request other than an upload."""


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
    """Whether a request names a file by its address: gradio would fetch it, whatever component it is meant for.

    What is nested too deeply to tell counts as one that does.
    """
    try:
        parts: list[Any] = [json.loads(body)]
    except RecursionError:
        return True
    except ValueError:
        return False  # gradio answers that it is no JSON
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
    """Hand a body that was read on as if it had not been."""
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
