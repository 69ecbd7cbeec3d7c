"""What every command asks of a method: the example of docs/method.md walks through all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from visexpert.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "method.md"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's files and a finished run of its method."""
    folder = tmp_path_factory.mktemp("house")
    for block in re.findall(r"```(?:python|yaml)\n(# (\S+)\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        (folder / block[1]).write_text(block[0], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        main(["fit", "--config", "adapter_tuning.yaml"])
        yield folder


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_third_method_trains(house: Path) -> None:
    metrics = json.loads((house / "runs/adapter/metrics.json").read_text(encoding="utf-8"))
    assert metrics["cost/steps"] == 2 and "test/vqa/accuracy" in metrics


def test_a_third_method_is_planned(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", "adapter_tuning.yaml", "--json"])
    plan = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in plan["parts"]}
    assert {name: row["role"] for name, row in rows.items()} == {
        "CLIP": "student", "projector": "transfer", "adapter": "transfer", "language model": "language",
    }  # fmt: skip
    assert rows["CLIP"]["trained"] == 0
    assert rows["adapter"]["trained"] == 2 * 32 * 16 + 16 + 32
    assert rows["adapter"]["forward"] == pytest.approx(16 * 2 * 2 * 32 * 16 / 1e9)


def test_a_third_method_writes(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(house / "photo.png")
    main(["caption", "photo.png", "--run", "runs/adapter", "--json", "--trust", "adapter_tuning"])
    record = json.loads(capsys.readouterr().out)[0]
    assert record["error"] is None and record["text"] is not None and not record["experts"]


def test_a_third_method_is_exported_and_what_stays_behind_is_named(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", "runs/adapter", "--format", "hf", "--out", "hf", "--trust", "adapter_tuning"])
    facts = json.loads((house / "hf/fidelity.json").read_text(encoding="utf-8"))
    assert facts["licences"].keys() == {"clip"}
    assert facts["origin"]["not exported"] == "adapter"


def test_a_third_method_is_compared(house: Path) -> None:
    main(["compare", "runs/adapter", "--out", "report"])
    assert "adapter" in (house / "report/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["merge", "detach"])
def test_phases_refuse_a_method_without_fusion(command: str, house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "runs/adapter", "--trust", "adapter_tuning", *(["--keep=1"] if command == "detach" else [])])
    assert end.value.code == 2
    said = last_line(capsys)
    assert "AdapterTuning" in said and "FusingMethod" in said
