"""The templates for clusters: a shell and YAML read them, and `visexpert fit` knows what they ask for."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import blocks_of
from visexpert.planning.read import parse_configs

ROOT = Path(__file__).parents[2]
BLOCKS = blocks_of(ROOT / "docs/clusters.md")
SKY = yaml.safe_load(next(block.text for block in BLOCKS if block.file == "sky.yaml"))
SCRIPTS = [block.text for block in BLOCKS if block.text.startswith("#!/bin/bash")] + [SKY["run"]]


def fit_of(script: str) -> list[str]:
    """Return the arguments of the fit in a script, with 2 for each of its variables."""
    joined = re.sub(r"\$\w+", "2", re.sub(r"\$\(.*?\)\"", '2"', script.replace("\\\n", " ")))
    (words,) = (shlex.split(line) for line in joined.splitlines() if " fit " in line)
    return words[words.index("fit") + 1 :]


def test_there_is_a_template_for_each_launcher() -> None:
    assert [sum(word in script for script in SCRIPTS) for word in ("srun ", "torchrun ", "SKYPILOT_NODE_RANK")] == [
        1,
        2,
        1,
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_templates_are_scripts_that_start_or_continue_a_fit(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    config, run, *options = fit_of(script)[1::2][:2] + fit_of(script)[4:]
    assert config == "mine.yaml" and run.endswith("runs/mine")
    parsed = parse_configs(["configs/tove/smoke.yaml"], options, command="plan")
    assert parsed["ckpt_path"] == "last"
    trainer = parsed["trainer"]
    assert int(trainer["num_nodes"]) == 2 and int(trainer["devices"]) in (2, 8) and trainer["strategy"] == "ddp"


def test_the_job_of_slurm_is_requeued_after_the_signal_it_asks_for() -> None:
    (script,) = (script for script in SCRIPTS if "srun" in script)
    asked = dict(re.findall(r"#SBATCH --([\w-]+)(?:=(.*))?", script))
    assert asked["signal"].startswith("TERM@") and "requeue" in asked
    after = script[script.index("code=$?") :].replace("scontrol requeue", "echo again")
    for code, told in ((143, "again 7\n"), (0, ""), (1, "")):
        shell = f"(exit {code})\n{after}"
        done = subprocess.run(["bash"], input=shell, text=True, capture_output=True, env={"SLURM_JOB_ID": "7"})
        assert (done.returncode, done.stdout) == (code, told)


def test_the_task_of_skypilot_has_what_its_schema_asks_for() -> None:
    assert set(SKY) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run", "envs"}
    assert fit_of(SKY["run"])[3].startswith(next(iter(SKY["file_mounts"])))  # the run outlives its machines
