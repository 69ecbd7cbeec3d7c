"""``import visexpert as vx``: quick, complete, and seen by type checkers as it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from inspect import getdoc, isclass, isfunction
from pathlib import Path
from typing import Any

import pytest
import torch

import visexpert as vx
from visexpert.experts import hub


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, visexpert; print(*{'torch', 'numpy', 'lightning', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_every_name_is_what_its_own_module_has_and_a_type_checker_sees() -> None:
    source = Path(vx.__file__).read_text(encoding="utf-8")
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(seen) | {"__version__"} == set(vx.__all__)
    for name, module in seen.items():
        assert getattr(vx, name) is getattr(sys.modules[str(module)], name)
    assert (
        set(vx.__all__) <= set(dir(vx)) and vx.ExpertHub is hub.ExpertHub and vx.metrics.VQAAccuracy is vx.VQAAccuracy
    )
    with pytest.raises(AttributeError, match="ToVEE"):
        vx.ToVEE  # noqa: B018


def test_every_name_says_what_it_is() -> None:
    named = {name: getattr(vx, name) for name in vx.__all__ if name != "__version__"}
    assert not [name for name, value in named.items() if (isclass(value) or isfunction(value)) and not getdoc(value)]


def test_an_encoder_is_exported_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reload is that of `visexpert export`, which tests/export is about."""
    monkeypatch.setattr("visexpert.export.exporter.verify", lambda source, *rest, **options: source)
    monkeypatch.setattr("visexpert.export.exporter.write_reports", lambda *given: None)
    mole = vx.MoLESettings(rank=2)
    clip = vx.ClipEncoder(source="zoo:clip", mole=mole)
    clip.load_weights()
    with pytest.raises(vx.ConfigError, match="MoLE"):
        vx.export_encoder(clip, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    made: Any = vx.export_encoder(clip, tmp_path / "student", format="visexpert", licenses={"clip": "MIT"})
    assert made.layers == (clip.layer, -1) and made.licenses == {"clip": "MIT"} and made.mole.treatment == "exact"
    assert all(parameter.requires_grad for parameter in clip.model.parameters())
    again = vx.ClipEncoder(source=str(tmp_path / "student"), mole=mole)
    again.load_weights()
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images).tokens_BTD, clip.eval()(images).tokens_BTD)
