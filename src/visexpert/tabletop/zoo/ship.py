"""The last step of a zoo run: write weights, facts and card beside each other."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from visexpert.errors import ConfigError, require_checkout
from visexpert.io.run_files import write_json, write_text
from visexpert.tabletop import TabletopData
from visexpert.tabletop.zoo.base import ZooModule

CARDS = Path(__file__).parent / "cards"
"""Folder of the shipped cards."""

PROBE_COLUMNS: Mapping[str, str] = {
    "depth": "depth R2",
    "normals": "normals R2",
    "object_depth": "object depth R2",
    "colour": "colour",
    "shape": "shape",
    "size": "size",
    "material": "material",
}
"""Columns of the linear-probe table: key and title."""


def encoder_facts(cards: Path = CARDS) -> dict[str, dict[str, Any]]:
    """Return the facts of every entry that encodes images by name, CLIP first; a language model has no grid."""
    facts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in cards.glob("*.json")}
    names = sorted((name for name in facts if "grid" in facts[name]), key=lambda name: (name != "clip", name))
    return {name: facts[name] for name in names}


def write_card(facts_path: Path) -> Path:
    """Write ``NAME.md`` beside ``NAME.json`` and return it."""
    facts = json.loads(facts_path.read_text(encoding="utf-8"))
    path = facts_path.with_suffix(".md")
    write_text(path, card_text(facts))
    return path


def card_text(facts: Mapping[str, Any]) -> str:
    """Return the card of one entry as Markdown."""
    data, grid = facts["data"], facts["grid"]
    total = sum(facts["files"].values())
    rows = {
        "Model": f"{facts['kind']}, {facts['parameters']:,} parameters",
        "Input and tokens": f"{facts['input_px']} px RGB; {grid[0]}x{grid[1]} tokens of width {facts['token_dim']}",
        "Trained on": facts["trained_on"],
        "Data": f"Tabletop world `{data['world']}`, {data['train_scenes']:,} scenes of split `{data['train_split']}`",
        "Training": f"{facts['steps']:,} steps of {facts['batch_size']} images, seed {data['seed']}, "
        f"{facts['training_seconds']} s on {facts['training_hardware']}",
        "Recipe": f"`visexpert fit --config {facts['recipe']}`",
        "Files": f"{', '.join(f'`{name}`' for name in facts['files'])} ({total / 1e6:.2f} MB, fp16)",
        "License": facts["license"],
    }
    lines = [
        f"# zoo:{facts['name']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
    ]
    lines += ["", f"## Held-out score: {facts['headline']} = {facts['score']:.2f}", ""]
    lines += [
        f"{_sentence(facts['score_definition'])} Measured on {data['held_out_scenes']:,} scenes of split "
        f"`{data['held_out_split']}`, never trained on; one seed, so no spread is known.",
        "",
    ]
    others = {name: value for name, value in facts["scores"].items() if name != facts["headline"]}
    if others:
        lines += ["Also: " + ", ".join(f"{name} {value:.2f}" for name, value in others.items()) + ".", ""]
    if "probes" in facts:
        lines += ["## Linear probes", "", *probe_lines(facts["probes"]), "", PROBE_NOTE, ""]
    return "\n".join(lines)


PROBE_NOTE = (
    "Ridge probes on tokens resampled to 8x8, fitted on other held-out scenes: R2 x100 of log-depth and normals in all "
    "cells; in cells that objects fill by more than half, R2 x100 of the objects' log-depth and accuracy (%) of "
    "colour, shape, size and material. Written by `python -m visexpert.tabletop.zoo.probe_table --write`."
)


def probe_lines(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the probe table as Markdown lines; ``rows`` maps a name to its scores."""
    lines = [f"| tokens | {' | '.join(PROBE_COLUMNS.values())} |", "|---" * (len(PROBE_COLUMNS) + 1) + "|"]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{scores[column]:.1f}" for column in PROBE_COLUMNS) + " |")
    return lines


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


class ShipWeights(Callback):
    """Write a trained zoo entry: weights (fp16 safetensors), ``NAME.json`` and the card ``NAME.md``.

    Args:
        name: Name of the entry; it loads as ``zoo:NAME`` once its files lie in the package.
        out_dir: Folder of the weights.
        cards_dir: Folder of the facts and cards.
        recipe: Config that trains it, for the card.
    """

    def __init__(
        self,
        *,
        name: str,
        out_dir: str = "src/visexpert/tabletop/zoo/weights",
        cards_dir: str = "src/visexpert/tabletop/zoo/cards",
        recipe: str | None = None,
    ) -> None:
        if not name.isidentifier():
            raise ConfigError(f"ShipWeights: name={name!r} must be one word, such as depth; it becomes a file name.")
        require_checkout("ShipWeights", out_dir, cards_dir)
        self.name = name
        self.out_dir = Path(out_dir)
        self.cards_dir = Path(cards_dir)
        self.recipe = recipe or f"configs/zoo/{name}.yaml"
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything; the held-out scores are those of the last validation.

        Raises:
            ConfigError: The model is not a zoo module, the data is not Tabletop, or no validation ran.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, ZooModule) or not isinstance(data, TabletopData):
            raise ConfigError("ShipWeights ships ZooModules trained on TabletopData; remove it from this config.")
        scores = {key[4:]: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if pl_module.headline not in scores:
            raise ConfigError(
                "ShipWeights needs a validation at the last step; let val_check_interval divide max_steps."
            )
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._started
        files = pl_module.ship(self.out_dir, self.name)
        facts: dict[str, Any] = {
            "name": self.name,
            **pl_module.facts(),
            "headline": pl_module.headline,
            "score": round(scores[pl_module.headline], 3),
            "score_definition": pl_module.score_definition,
            "scores": {name: round(value, 3) for name, value in sorted(scores.items())},
            "data": data_facts(data),
            "steps": trainer.global_step,
            "batch_size": data.division().batch_size,
            "training_seconds": round(seconds),
            "training_hardware": f"{torch.get_num_threads()} CPU thread(s)",
            "recipe": self.recipe,
            "files": {str(path.relative_to(self.out_dir)): path.stat().st_size for path in files},
        }
        path = self.cards_dir / f"{self.name}.json"
        write_json(path, facts)
        write_card(path)


def data_facts(data: TabletopData) -> dict[str, Any]:
    """Return the facts about the scenes: world, splits, counts, seed."""
    return {
        "world": data.world.fingerprint(),
        "train_split": data.train_split,
        "train_scenes": data.sizes[data.train_split],
        "held_out_split": "val",
        "held_out_scenes": data.sizes["val"],
        "seed": data.seed,
    }
