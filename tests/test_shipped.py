"""Shipped configurations: found by name from any folder, behind files of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_configs import CONFIGS
from visexpert import shipped
from visexpert.cli import main
from visexpert.commands.data import build_data
from visexpert.errors import ConfigError
from visexpert.planning.read import read_configs
from visexpert.tabletop import TabletopData
from visexpert.training import build_cli

ROOT = CONFIGS.parent
FORMS = ["tove/tabletop", "tove/tabletop.yaml", "configs/tove/tabletop.yaml", "configs/tove/tabletop"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["visexpert"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def test_names_are_those_of_the_files() -> None:
    names = shipped.names()
    assert names == sorted(path.relative_to(CONFIGS).as_posix()[:-5] for path in CONFIGS.rglob("*.yaml"))
    assert {"tove/tabletop", "hubs/movekd-v1.0", "tove/ablations/top1", "scales/smoke"} <= set(names)


@pytest.mark.parametrize("form", FORMS)
def test_a_name_is_found_from_any_folder(form: str, tmp_path: Path) -> None:
    assert shipped.find(form).samefile(CONFIGS / "tove" / "tabletop.yaml")
    (tmp_path / "tove" / "tabletop").mkdir(parents=True)  # a folder of that name is no configuration
    assert shipped.find(form).samefile(CONFIGS / "tove" / "tabletop.yaml")


@pytest.mark.parametrize("form", FORMS)
def test_a_file_at_the_path_wins(form: str, tmp_path: Path) -> None:
    own = tmp_path / (form if form.endswith(".yaml") else f"{form}.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("trainer: {max_steps: 1}\n", encoding="utf-8")
    assert shipped.find(form).samefile(own)
    assert shipped.find(own) == own


@pytest.mark.parametrize(
    ("given", "closest"),
    [
        ("tove/tabletob", "tove/tabletop"),
        ("top1.yaml", "tove/ablations/top1"),
        ("movekd/one_stage", "movekd/one-stage"),
    ],
)
def test_an_unknown_name_is_refused_with_the_closest(given: str, closest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shipped.find(given)
    message = str(caught.value)
    assert f"'{given}'" in message and "visexpert configs list" in message
    assert closest in re.split(r"[ ,)]+", message)


@pytest.mark.parametrize("given", ["", ".", "..", "/", "~", "qqqq.yaml", "../configs", "\0"])
def test_what_is_nothing_is_refused_in_one_sentence(given: str) -> None:
    with pytest.raises((ConfigError, SystemExit)):
        main(["fit", "--config", given])


def test_each_form_of_the_option_is_resolved_and_nothing_else() -> None:
    smoke, top = (str(shipped.folder() / name) for name in ("tove/smoke.yaml", "tove/ablations/top1.yaml"))
    given = ["fit", "--config", "tove/smoke", "-c", "tove/ablations/top1", "--config=tove/smoke", "--run", "tove/smoke"]
    assert shipped.in_arguments(given) == ["fit", "--config", smoke, "-c", top, f"--config={smoke}", *given[-2:]]
    assert shipped.in_arguments(["fit", "--run", "--config", "tove/smoke"])[-1] == smoke
    assert shipped.in_arguments(["fit", "--config"]) == ["fit", "--config"]


def test_every_command_that_takes_configurations_takes_names(capsys: pytest.CaptureFixture[str]) -> None:
    cli = build_cli(["--config", "tove/smoke", "--config=tove/ablations/top1.yaml"], run=False)
    assert isinstance(cli.datamodule, TabletopData) and cli.model.gate.top_k == 1
    planned = read_configs(["movekd/smoke", "scales/smoke"])
    assert planned.trainer["max_steps"] == 3 and type(planned.method).__name__ == "MoVEKD"
    main(["data", "check", "tove/smoke", "configs/scales/smoke.yaml", "--no_weights"])
    assert "Done: nothing is missing." in capsys.readouterr().out
    assert isinstance(build_data([shipped.find("tove/smoke")]), TabletopData)


def test_every_configuration_that_a_text_names_is_shipped() -> None:
    named = {
        name
        for path in [*CONFIGS.rglob("*.yaml"), *(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("cards/*")]
        for name in re.findall(r"configs/([a-z][a-z\d./-]*\.yaml)", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20 and {name.removesuffix(".yaml") for name in named} <= set(shipped.names())


def test_an_installation_finds_its_own_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "visexpert"
    monkeypatch.setattr(shipped, "__file__", str(package / "shipped.py"))
    for place in (tmp_path / "configs", package / "configs"):
        place.mkdir(parents=True)
        (place / f"{place.parent.name}.yaml").touch()
    assert shipped.folder() == package / "configs" and shipped.names() == ["visexpert"]
    (package / "configs" / "visexpert.yaml").unlink()
    (package / "configs").rmdir()
    assert shipped.folder() == tmp_path / "configs"
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "lib" / "visexpert" / "shipped.py"))
    with pytest.raises(ConfigError, match="install the package again"):  # not the configs of anyone's working folder
        shipped.folder()
