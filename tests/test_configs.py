"""Every file under configs/ parses against the real signatures, builds, and finds the weights that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from visexpert.methods import Method, ToVE
from visexpert.training import VisexpertCLI, build_cli

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
BASE = "tove/tabletop.yaml"
"""What a file that names no method is laid over."""


def loaded(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict), name
    return content


def is_overlay(name: str) -> bool:
    return "class_path" not in loaded(name).get("model", {})


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisexpertCLI]:
    """One parser for all files: building it takes longer than using it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # which the command line sets
        patch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("sys.argv", ["visexpert"])
        yield build_cli(["--config", str(CONFIGS / "tove" / "smoke.yaml")], run=False)


@pytest.fixture(scope="module")
def base(cli: VisexpertCLI) -> dict[str, Any]:
    """What the base says on its own."""
    config = cli.parser.parse_args(["--config", str(CONFIGS / BASE)])
    config.pop("config")
    settings: dict[str, Any] = config.as_dict()
    return settings


def test_there_are_files() -> None:
    assert {BASE, "tove/smoke.yaml"} <= set(FILES)
    assert not is_overlay(BASE)


@pytest.mark.parametrize("name", FILES)
def test_every_file_builds(name: str, cli: VisexpertCLI, base: dict[str, Any]) -> None:
    files = [BASE, name] if is_overlay(name) else [name]
    config = cli.parser.parse_args([part for file in files for part in ("--config", str(CONFIGS / file))])
    built = cli.parser.instantiate_classes(config)
    assert isinstance(built.model, L.LightningModule) and isinstance(built.data, L.LightningDataModule)
    assert config.trainer.max_steps > 0
    config.pop("config")
    assert name == BASE or config.as_dict() != base  # an overlay changes something
    if isinstance(built.model, Method):
        if isinstance(built.model, ToVE):
            built.model.init_from = None  # another run's checkpoint, which nothing here has trained
        built.model.load_weights()
        assert built.model.trained_groups()


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is_for(name: str) -> None:
    first = (CONFIGS / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 20
