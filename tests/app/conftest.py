"""A session of tiny random models: with three experts, with one detached, and merged."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from PIL import Image

from tests.captioners import captioner, lively
from tests.methods.helpers import tiny_tove
from visexpert.app.session import Model, Session


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Of a whole run, beside which a detached and a merged one lie."""
    return Session(
        [
            Model("ToVE", captioner(tmp_path), 0.5),
            Model("detached", captioner(tmp_path, model=lively(tiny_tove(use=["semantic", "edges"]))), 0.25),
            Model("merged", captioner(tmp_path, model=lively(tiny_tove(use=[]))), None),
        ]
    )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """An image file of its own size."""
    path = tmp_path / "picture.png"
    image = Image.new("RGB", (80, 50), "navy")
    image.paste("orange", (10, 10, 40, 45))
    image.save(path)
    return path


@pytest.fixture
def port() -> int:
    """A port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
