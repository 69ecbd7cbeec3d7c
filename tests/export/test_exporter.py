"""An export is whole and proved, or not there."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.export.helpers import tiny_source
from visexpert.errors import ConfigError, WeightsError
from visexpert.export import FORMATS, ExportSource, export
from visexpert.export import reload as reload_script


def use_writer(monkeypatch: pytest.MonkeyPatch, write: Callable[[ExportSource, Path], object]) -> None:
    """Let another writer stand for onnx's, whose reload is the quickest."""
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=write))  # type: ignore[arg-type]


def test_an_export_that_differs_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FORMATS["onnx"].write

    def perturbed(source: ExportSource, folder: Path) -> None:
        clip = copy.deepcopy(source.clip)
        with torch.no_grad():
            clip.model.get_parameter("encoder.layers.1.mlp.fc1.weight")[0, 0] += 0.5
        whole(replace(source, clip=clip), folder)

    use_writer(monkeypatch, perturbed)
    with pytest.raises(WeightsError, match=r"onnx export differs after reloading: the error of layer_minus_2 is .* of"):
        export({"onnx": tiny_source()}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("read_afresh")
def test_an_export_that_does_not_load_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_writer(monkeypatch, lambda source, folder: (folder / "model.onnx").write_bytes(b"half a graph"))
    with pytest.raises(WeightsError, match=r"onnx export does not load in a fresh process \(.*model.onnx.*\); nothing"):
        export({"onnx": tiny_source()}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: ExportSource, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    use_writer(monkeypatch, interrupted)
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export({"onnx": tiny_source()}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not any((tmp_path / "out").iterdir())


def killed(source: ExportSource, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_export_leaves_nothing_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_writer(monkeypatch, killed)
    process = multiprocessing.get_context("fork").Process(
        target=export, args=({"onnx": tiny_source()}, tmp_path / "out")
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.suffix == ".part" and not (left / "fidelity.json").exists()


def test_bad_targets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"full' is not empty; name a new or an empty one"):
        export({"hf": tiny_source()}, tmp_path / "full")
    with pytest.raises(ConfigError, match=r"mine.txt' is a file"):
        export({"hf": tiny_source()}, tmp_path / "full" / "mine.txt")
    with pytest.raises(ConfigError, match=r"^format 'coreml' is unknown.* hf, open_clip, onnx"):
        export({"coreml": tiny_source()}, tmp_path / "out")
    assert (tmp_path / "full" / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], packages=("no_such_package", "json")))
    with pytest.raises(ConfigError, match=r"needs no_such_package; install it with: pip install 'visexpert\[export\]'"):
        export({"onnx": tiny_source()}, tmp_path / "out")


def test_the_fresh_process_can_import_nothing_that_is_refused() -> None:
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('reload', {reload_script.__file__!r})\n"
        "reload = importlib.util.module_from_spec(spec); spec.loader.exec_module(reload)\n"
        "assert 'visexpert' not in sys.modules\n"
        "reload.forbid(('visexpert', 'wave'))\n"
        "import colorsys\n"
        "for name in ('visexpert', 'visexpert.vision', 'wave'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "visexpert is kept out of this process",
        "visexpert is kept out of this process",
        "wave is kept out of this process",
    ]


def test_what_is_imported_already_is_noticed() -> None:
    with pytest.raises(SystemExit, match="torch was imported before"):
        try:
            reload_script.forbid(("torch",))
        finally:
            del sys.meta_path[0]
