"""``visexpert serve RUN``: a page to drop images on, ask, and watch the experts."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from threading import Event

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.errors import ConfigError, require_package

EPILOG = """\
RUN/detached and RUN/merged, where they exist, answer beside it. The page loads nothing from the network and keeps
uploads in a temporary folder until it stops, for an hour at most.
"""

log = logging.getLogger(__name__)


def run(arguments: list[str]) -> Ending:
    """Serve until Ctrl-C.

    Raises:
        ConfigError: Gradio is missing, RUN is not a run, or the address cannot be bound.
    """
    options = parser().parse_args(arguments)
    for name in ("port", "max_upload_mb", "max_pixels"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}, but must be at least 1.")
    require_package("gradio", extra="app", what="visexpert serve")
    from visexpert.app.server import check_address, serving
    from visexpert.app.session import open_session

    check_address(options.host, options.port)  # before the model is read, which takes longer
    session = open_session(options.run, device=options.device, max_pixels=options.max_pixels)
    with serving(session, host=options.host, port=options.port, max_upload_mb=options.max_upload_mb) as url:
        log.info("'%s' is served at %s (Ctrl-C stops it).", options.run, url)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: uploads are removed
        try:
            Event().wait()
        except KeyboardInterrupt:
            pass
    return Ending("the page is closed, and its uploads are gone.", (("caption", options.run, "IMAGE"),))


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(prog="visexpert serve", description="Serve a page to try a finished run.", epilog=EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to bind to (default: 7860)")
    parser.add_argument("--max_upload_mb", type=int, default=10, metavar="MB", help="largest upload (default: 10)")
    parser.add_argument("--max_pixels", type=int, default=16_000_000, help="largest image (default: 16000000)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU where there is one)")
    return parser
