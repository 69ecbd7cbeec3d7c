"""A cache of the Hugging Face Hub on disk, as huggingface_hub lays it out."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    repo: str,
    files: Path,
    *,
    commit: str = COMMIT,
    refs: Sequence[str] = ("main",),
) -> Path:
    """Copy a folder into a Hugging Face Hub cache at ``cache`` as a commit of ``repo``, and use that cache.

    Args:
        monkeypatch: Of the test.
        cache: The cache; it may hold others.
        repo: Id of the repository.
        files: Folder to copy.
        commit: Hash of the commit.
        refs: Branches, tags and pull requests (``refs/pr/1``) that point to the commit.

    Returns:
        The snapshot's folder.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in sorted(path for path in files.rglob("*") if path.is_file()):
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (path := home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="utf-8")
    return snapshot
