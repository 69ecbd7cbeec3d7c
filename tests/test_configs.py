"""Every file under configs/ parses against the real signatures, builds, and finds the weights that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from benchmarks.ablations import MATRIX, overlays
from visexpert.methods import Method, MoVEKD, ToVE
from visexpert.training import VisexpertCLI, build_cli

CONFIGS = Path(__file__).parents[1] / "configs"
AT_SCALE = ("hubs/", "movekd/llava/", "tove/paper/", "tove/siglip2-", "distill/dinov3-")
FILES = sorted(
    name
    for name in (path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
    if not name.startswith(AT_SCALE)  # at scale: tests/test_configs_at_scale.py
)
BASE = ("tove/tabletop.yaml",)
STAGE_2 = "movekd/tabletop-stage2.yaml"
BASES = {
    "tove": BASE,
    "movekd": (STAGE_2,),
    "movekd/ablations": (STAGE_2, "movekd/one-stage.yaml"),
    "hybrid": (STAGE_2,),
    "distill": ("distill/tabletop.yaml",),
}
BASES["hybrid/merge-into-mole.yaml"] = BASE
"""What a file that names no method is laid over, by its folder or by its own name."""


def loaded(name: str) -> dict[str, Any]:
    content = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict), name
    return content


def is_overlay(name: str) -> bool:
    return "class_path" not in loaded(name).get("model", {})


def base_of(name: str) -> tuple[str, ...]:
    keys = (name, name.rsplit("/", 1)[0], name.split("/")[0])
    return next((BASES[key] for key in keys if key in BASES), BASE)


def before(name: str) -> list[str]:
    """The overlays that a file is to be laid over, beside the base."""
    folder, _, stem = name.removesuffix(".yaml").rpartition("/")
    owners = [method for method, rows in MATRIX.items() if rows["folder"] == folder]
    return [path.relative_to("configs").as_posix() for path in overlays(owners[0], stem)[:-1]] if owners else []


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisexpertCLI]:
    """One parser for all files: building it takes longer than using it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")  # which the command line sets
        patch.setenv("VISEXPERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("sys.argv", ["visexpert"])
        yield build_cli(["--config", str(CONFIGS / "tove" / "smoke.yaml")], run=False)


def test_there_are_files() -> None:
    assert {*(name for names in BASES.values() for name in names), "tove/smoke.yaml", "movekd/smoke.yaml"} <= set(FILES)
    assert not any(is_overlay(names[0]) for names in BASES.values())


@pytest.mark.parametrize("name", [name for name in FILES if not is_overlay(name)])
def test_every_file_builds(name: str, cli: VisexpertCLI) -> None:
    """At its own size; test_configs_train.py parses, builds and trains overlays."""
    config = cli.parser.parse_args(["--config", str(CONFIGS / name)])
    built = cli.parser.instantiate_classes(config)
    assert isinstance(built.model, L.LightningModule) and isinstance(built.data, L.LightningDataModule)
    if isinstance(built.model, Method):
        if isinstance(built.model, ToVE | MoVEKD):
            built.model.init_from = None  # another run's checkpoint, which nothing here has trained
        built.model.load_weights()
        assert built.model.trained_groups()


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is_for(name: str) -> None:
    first = (CONFIGS / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


def test_the_recommended_student_of_movekd_is_the_row_that_was_measured(cli: VisexpertCLI) -> None:
    def parsed(*names: str) -> dict[str, Any]:
        config = cli.parser.parse_args([part for name in names for part in ("--config", str(CONFIGS / name))])
        return config.as_dict()

    last = "movekd/ablations/recipe-attention-tokens.yaml"
    chain = [*BASES["movekd/ablations"], *before(last), last]
    row, recommended = parsed(*chain, "scales/full.yaml"), parsed("movekd/tabletop.yaml")
    settings, ours = row["model"]["init_args"], recommended["model"]["init_args"]
    assert {name: settings["experts"][name] for name in settings["use"]} == ours["experts"]
    assert settings["clip"]["init_args"]["mole"] is None and not ours["clip"]["init_args"].get("mole")
    for one in (settings, ours):
        one["optimizer"] = {k: v for k, v in one["optimizer"].items() if k != "mole_lr"}  # there is no MoLE to train
    without = {"experts", "use", "clip", "auxiliary"}  # or to balance
    assert {k: v for k, v in settings.items() if k not in without} == {
        k: v for k, v in ours.items() if k not in without
    }
    assert row["data"] == recommended["data"] and row["trainer"] == recommended["trainer"]
