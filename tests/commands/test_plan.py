"""``visexpert plan``: tables, JSON, several configurations, arguments of a fit, errors in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from visexpert.commands.plan import run
from visexpert.errors import ConfigError, WeightsError

SMOKE = "configs/tove/smoke.yaml"


def test_later_configurations_and_arguments_lie_over_earlier_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer: {max_steps: 5, devices: 3}\nmodel: {init_args: {use: [semantic]}}\n")
    arguments = ["--config", SMOKE, "--config", str(overlay), "--data.init_args.batch_size", "4", "--json"]
    run([*arguments, "--gpu", "v100", "--mfu", "0.5"])
    found = json.loads(capsys.readouterr().out)
    counts = {"batch_size": 4, "rows": 32, "samples": 4 * 3 * 5, "steps": 5}
    assert found["amount"] == counts | {"per_step": 4 * 3, "by_steps": True, "epochs": None}
    assert [part["name"] for part in found["parts"] if part["role"] == "teachers"] == ["expert semantic"]
    assert found["asked"]["gpus"] == 3 and found["gpu"]["label"].startswith("NVIDIA V100")
    parts = sum(part["forward"] + part["backward"] for part in found["parts"])
    assert found["gflop_per_sample"]["live"] == pytest.approx(parts)
    assert found["memory_per_gpu"]["total"] > found["memory_per_gpu"]["overhead"] > 0 and found["fits"]


def test_the_tables_name_the_parts_and_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--config", "configs/movekd/smoke.yaml", "--gpus", "2", "--mfu", "0.3", "--trainer.devices", "4"])
    shown = capsys.readouterr().out
    assert "asks for 4 GPUs" in shown
    for words in ("MoLE", "KD heads", "expert edges", "frozen encoder", "language model", "memory per GPU", "teachers"):
        assert words in shown
    assert "reaches 30% of the peak" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration was given"),
        (["--config", SMOKE, "--gpu", "abacus"], "use one of h200, h100"),
        (["--config", SMOKE, "--trainer.stratgy", "ddp"], "no setting 'trainer.stratgy'"),
        (["--config", SMOKE, "--trainer.strategy", "xla"], "trainer.strategy='xla'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_is_not_on_this_machine_is_named_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overlay = tmp_path / "overlay.yaml"
    side = {"class_path": "visexpert.language.PrefixLM", "init_args": {"source": "nobody/nothing"}}
    overlay.write_text(json.dumps({"model": {"init_args": {"language": side}}}))
    with pytest.raises(WeightsError, match="config.json of 'nobody/nothing' is not in the cache"):
        run(["--config", SMOKE, "--config", str(overlay)])


def test_help_teaches_without_importing_torch() -> None:
    code = "import sys; from visexpert.commands.plan import run\n"
    code += "try: run(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--mfu" in done.stdout and "examples:" in done.stdout
