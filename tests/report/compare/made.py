"""Run folders as runs leave them, with chosen scores."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "run": "runs/x",
    "trainer": {"max_steps": 10, "accumulate_grad_batches": 1, "logger": None},
    "model": {
        "class_path": "visexpert.methods.ToVE",
        "init_args": {
            "experts": {"depth": {"class_path": "visexpert.tabletop.TinyExpert", "init_args": {"source": "zoo:depth"}}},
            "language": {"class_path": "visexpert.language.CrossAttentionDecoder", "init_args": {"width": 64}},
            "use": None,
            "top_k": None,
            "init_from": None,
            "evaluation": {"caption_images": 8},
        },
    },
    "data": {
        "class_path": "visexpert.tabletop.TabletopData",
        "init_args": {"seed": 0, "num_test": 16, "batch_size": 4, "train_fraction": 1.0},
    },
}


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    vqa: float = 0.5,
    nll: float = 0.4,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    test: dict[str, Any] | None = None,
    gates: bool = False,
) -> Path:
    """Write the folder of a finished run of ten steps; the arguments change its settings, scores and environment."""
    config = copy.deepcopy(CONFIG)
    config["seed_everything"], config["run"] = seed, str(folder)
    config["model"]["init_args"] |= model or {}
    config["data"]["init_args"] |= data or {}
    config["trainer"] |= trainer or {}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    figures: dict[str, Any] = {
        "test/vqa/accuracy": vqa,
        "test/vqa/family/size": vqa - 0.1,
        "test/vqa/family/side": vqa - 0.2,
        "test/nll/nll": nll,
        "train/text_loss": nll,
        "cost/steps": 10.0,
        "cost/gflop_vision": 0.1,
        "cost/gflop_language": 0.05,
        "cost/images_per_s": 500.0,
        "cost/parameters_trained": 2e6,
        "cost/parameters_inference": 3e6,
        "cost/train_seconds": 1800.0,
    }
    figures |= metrics or {}
    (folder / "metrics.json").write_text(json.dumps(figures), encoding="utf-8")
    rows = "".join(f"{step},{nll + 1 / (step + 1)}\n" for step in range(10))
    (folder / "metrics.csv").write_text(f"step,train/text_loss\n{rows}", encoding="utf-8")
    stage = {"time": "2026-01-02T03:04:05+00:00", "seed": seed, "machine": {"cpu": "A", "cores": 2}}
    write_environment(folder, fit=stage, test={**stage, **(test or {})})
    if gates:
        (folder / "figures").mkdir()
        pixels = np.full((20, 30, 3), 40 * (seed + 1), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "figures" / "gate_maps.png")
    return folder


def write_environment(folder: Path, **stages: Any) -> None:
    """Write ``environment.json``."""
    (folder / "environment.json").write_text(json.dumps(stages), encoding="utf-8")
