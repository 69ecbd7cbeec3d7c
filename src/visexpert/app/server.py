"""Serves the page on this machine, and nothing but the page."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from visexpert.app.examples import write_examples
from visexpert.app.guard import Guard
from visexpert.app.page import build_page, theme
from visexpert.app.session import Session
from visexpert.errors import ConfigError


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
            raise ConfigError(
                f"The page cannot be served at {host}:{port} ({error}); take another --port or --host."
            ) from error
        try:
            yield url
        finally:
            page.close(verbose=False)


def _layers(host: str) -> list[Middleware]:
    """A page for this machine answers requests for this machine only: names that resolve to it could be anyone's."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    hosts = ["localhost", "127.0.0.1", host] if local else ["*"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(Guard)]


@contextmanager
def _uploads_in(folder: Path) -> Iterator[Path]:
    """Let gradio keep uploads in a folder of our own, which goes with the server."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before
