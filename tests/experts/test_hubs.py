"""The papers' hubs of experts, built on ``meta`` from their YAML, and a user's own expert from the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

from visexpert.errors import WeightsError
from visexpert.experts import ExpertHub, VisionExpert
from visexpert.types import Batch

ROOT = Path(__file__).parents[2]
HUBS = ROOT / "configs" / "hubs"

FACTS: dict[str, dict[str, tuple[int, int]]] = {
    "tove.yaml": {
        "eva": (1024, 576),
        "dino": (1024, 1369),
        "depth": (1, 9216),
        "normals": (3, 9216),
        "edges": (1, 9216),
    },
    "movekd-v1.0.yaml": {"eva": (1024, 4096), "convnext": (3072, 1024)},
    "movekd-v1.1.yaml": {"eva": (1024, 4096), "convnext": (3072, 1024), "sam": (256, 4096)},
}
"""Width and number of tokens; of MoVE-KD those of its adapters (methods B1), of ToVE ours."""

PARAMETERS = {"eva": 303.4, "convnext": 843.4, "sam": 308.3, "dino": 304.4}
"""Millions (methods C1). timm's EVA-02 of 448 px has 4097 learned positions, the released encoder fewer."""

built: dict[str, VisionExpert] = {}


def experts_of(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["model"]["init_args"]["experts"]
    return found


def build(experts: dict[str, Any]) -> dict[str, VisionExpert]:
    parser = ArgumentParser()
    parser.add_argument("--experts", type=dict[str, VisionExpert])
    config = parser.parse_object({"experts": experts})
    found: dict[str, VisionExpert] = parser.instantiate_classes(config).experts
    return found


def built_once(name: str, settings: dict[str, Any]) -> VisionExpert:
    """The expert on ``meta``; files that say the same share it, for a large one takes seconds."""
    key = yaml.safe_dump(settings)
    if key not in built:
        with torch.device("meta"):
            built[key] = build({name: settings})[name]
    return built[key]


def test_every_hub_is_looked_at() -> None:
    assert {path.name for path in HUBS.glob("*.yaml")} == set(FACTS)


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, facts in FACTS.items() for name in facts])
def test_experts_have_the_papers_widths_and_grids(
    file: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    experts = experts_of(yaml.safe_load((HUBS / file).read_text(encoding="utf-8")))
    assert list(experts) == list(FACTS[file])
    expert = built_once(name, experts[name])
    assert (expert.token_dim, expert.grid_hw[0] * expert.grid_hw[1]) == FACTS[file][name]
    assert expert.license not in ("", "not stated")
    if name in PARAMETERS:
        count = sum(parameter.numel() for parameter in expert.parameters()) / 1e6
        assert count == pytest.approx(PARAMETERS[name], rel=0.015)
    if name != "edges":
        with pytest.raises(WeightsError, match="is not in the cache .* `hf dow"):
            expert.load_weights()


def test_each_file_says_where_its_numbers_come_from() -> None:
    for path in HUBS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ") and "arXiv" in text and "unconfirmed" in text


def test_the_documented_expert_of_ones_own_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code and the YAML of docs/own-expert.md, as they stand there."""
    text = (ROOT / "docs" / "own-expert.md").read_text(encoding="utf-8")
    code, settings = (re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)[0] for kind in ("python", "yaml"))
    assert sum(bool(line.strip()) for line in code.split("class ")[1].splitlines()) <= 10
    (tmp_path / "my_experts.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_file({"weight": torch.ones(32, 3, 8, 8), "bias": torch.zeros(32)}, tmp_path / "mine.safetensors")
    hub = ExpertHub(build(experts_of(yaml.safe_load(settings))))
    hub.load_weights()
    tokens = hub(Batch(torch.ones(2, 3, 100, 80), torch.arange(2), split=""))["mine"]
    assert tokens.grid_hw == (8, 8) and hub["mine"].license == "MIT"
    torch.testing.assert_close(tokens.tokens_BSE, torch.full((2, 64, 32), 3.0 * 64))
