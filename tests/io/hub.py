"""A hub cache on disk, as huggingface_hub lays it out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants


def put_in_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, repo: str, files: Path) -> Path:
    """Copy a folder into a hub cache at ``cache`` as the main branch of ``repo``, and make that cache the one in use.

    Returns:
        The snapshot's folder.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(files, snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
    return snapshot
