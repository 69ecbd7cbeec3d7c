"""``visexpert configs``: what is shipped, listed, shown and copied so that the copy runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from benchmarks.ablations import MATRIX, base_of, names, overlays
from tests.tiny_configs import CONFIGS
from visexpert import shipped
from visexpert.cli import main
from visexpert.commands.configs import GROUPS, copy
from visexpert.errors import ConfigError, DataError
from visexpert.planning.read import read_configs
from visexpert.training import build_cli


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def content(path: Path) -> object:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_configuration_is_listed_once_with_its_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "list"])
    lines = capsys.readouterr().out.splitlines()
    entries = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert set(entries) == set(shipped.names()) and len(entries) == sum(line.startswith("  ") for line in lines)
    assert [line.partition("/:")[0] for line in lines if line[:1].isalpha()] == list(GROUPS)
    assert entries["tove/smoke"].endswith("a handful of scenes, CPU")
    assert entries["tove/ablations/noisy-gate"].count("(") == entries["tove/ablations/noisy-gate"].count(")")
    assert all(len(text) > 10 and "Over configs" not in text for text in entries.values())


def test_one_folder_is_listed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "list", "hubs"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == ["hubs/movekd-v1.0", "hubs/movekd-v1.1", "hubs/tove"]
    with pytest.raises(SystemExit):
        main(["configs", "list", "hub"])
    assert "'hub'" in capsys.readouterr().err


def test_what_is_shown_is_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "show", "movekd/tabletop.yaml"])
    assert capsys.readouterr().out == (CONFIGS / "movekd" / "tabletop.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["mine", "my configs"])
def test_a_copy_brings_what_it_needs_and_names_it(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "copy", "hybrid/from-merged", folder])
    *files, made, command = capsys.readouterr().out.splitlines()
    assert made.startswith("Done: 3 copies")
    expected = ["hybrid/from-merged.yaml", "tove/tabletop.yaml", "movekd/tabletop-stage2.yaml"]
    assert files == [f"{folder}/{name}" for name in expected]
    own = f"runs/{folder.replace(' ', '-')}"
    texts = {name: Path(folder, name).read_text(encoding="utf-8").replace(f"{own}/", "runs/") for name in expected}
    assert all(yaml.safe_load(texts[name]) == content(CONFIGS / name) for name in expected)
    given = shlex.split(command)[3:]
    assert given == ["--config", files[2], "--config", files[0], "--run", f"{own}/hybrid-merged"]
    layers = given[1:4:2]
    assert shipped.layers_of(Path(files[0])) == [[files[1]], layers]  # the commands in its header, too
    planned = read_configs(layers)
    assert type(planned.method).__name__ == "MoVEKD"
    assert planned.config["model"]["init_args"]["init_from"] == f"{own}/tove/merged/checkpoints/last.ckpt"


def test_no_copy_writes_a_run_of_a_shipped_configuration() -> None:
    """Nor reads one that a command of its header writes elsewhere now; runs of what is not copied stay."""
    shipped_runs = {content(shipped.shipped(name)).get("run") for name in shipped.names()} - {None}  # type: ignore[attr-defined]
    for name in shipped.names():
        for path in copy(name, Path("mine"), overwrite=True):
            assert content(path).get("run") not in shipped_runs, path  # type: ignore[attr-defined]
        for words in shipped.commands_of(Path("mine", f"{name}.yaml")):
            files = shipped.configs_in(words)
            run = words[words.index("--run") + 1] if "--run" in words else None
            if run and files and all(file.startswith("mine/") for file in files):
                assert run.startswith("runs/mine/"), (name, words)
    stage2 = Path("mine/movekd/tabletop-stage2.yaml")
    for name, start in (
        ("hybrid/from-merged", "runs/movekd-stage1"),
        ("movekd/tabletop-stage2", "runs/mine/movekd-stage1"),
    ):
        copy(name, Path("mine"), overwrite=True)
        assert f"init_from: {start}/" in stage2.read_text(encoding="utf-8")


def test_an_edited_copy_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["visexpert"])
    copies = copy("tove/smoke-merge", Path("mine"))
    base = Path("mine/tove/smoke.yaml")
    assert copies == [Path("mine/tove/smoke-merge.yaml"), base]
    base.write_text(base.read_text(encoding="utf-8").replace("seed_everything: 0", "seed_everything: 7"), "utf-8")
    with pytest.raises(ConfigError) as caught:  # an overlay names the base that was copied, not the shipped one
        build_cli(["fit", "--config", str(copies[0])])
    *_, first, _, second = str(caught.value).rstrip(".").split()
    assert (first, second) == (str(base), str(copies[0]))
    assert read_configs([first, second]).config["seed_everything"] == 7


def test_nothing_is_overwritten_unasked() -> None:
    own = Path("mine/tove/tabletop.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("trainer: {max_steps: 1}\n", encoding="utf-8")
    with pytest.raises(DataError, match="--overwrite"):
        copy("tove/ablations/top1", Path("mine"))
    assert list(Path("mine").rglob("*.yaml")) == [own] and "max_steps: 1}" in own.read_text(encoding="utf-8")
    assert own in copy("tove/ablations/top1", Path("mine"), overwrite=True)
    assert own.read_text(encoding="utf-8").count("max_steps: 1}") == 0 and "model" in yaml.safe_load(own.read_bytes())


@pytest.mark.parametrize("method", ["tove", "movekd"])
def test_an_ablation_says_what_it_is_laid_over(method: str) -> None:
    """In its header, as the matrix of the benchmarks has it."""
    for name in set(names(method)) - {"base"}:
        *before, own = [*base_of(method), *overlays(method, name)]
        (layers,) = shipped.layers_of(CONFIGS.parent / own)
        assert layers == [*map(str, before), str(CONFIGS.parent / own)], name
    assert MATRIX[method]["after"]


def test_every_overlay_leads_to_a_configuration_with_model_and_data() -> None:
    """By its header alone, so that whoever has the wheel needs nothing else; scales go over anything."""
    for name in shipped.names():
        if name.startswith("scales/"):
            continue
        layers = next(
            (
                files
                for files in shipped.layers_of(shipped.shipped(name))
                if name in {*map(shipped.name_of, files)} or str(shipped.shipped(name)) in files
            ),
            [name],
        )
        loaded = [yaml.safe_load(shipped.find(file).read_text(encoding="utf-8")) for file in layers]
        for part in ("model", "data"):
            assert any("class_path" in each.get(part, {}) for each in loaded), (name, layers)
