"""The last step of a zoo run: weights, facts and card written beside each other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from visexpert.errors import ConfigError
from visexpert.tabletop import TabletopData
from visexpert.tabletop.zoo.base import ZooModule
from visexpert.tabletop.zoo.cards import write_card


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
            ConfigError: The model is no zoo module, the data is not Tabletop, or no validation ran.
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
        for folder in (self.out_dir, self.cards_dir):
            folder.mkdir(parents=True, exist_ok=True)
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
            "batch_size": data.batch_size,
            "training_seconds": round(seconds),
            "training_hardware": f"{torch.get_num_threads()} CPU thread(s)",
            "recipe": self.recipe,
            "files": {str(path.relative_to(self.out_dir)): path.stat().st_size for path in files},
        }
        path = self.cards_dir / f"{self.name}.json"
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        write_card(path)


def data_facts(data: TabletopData) -> dict[str, Any]:
    """Return where the scenes come from: world, splits, counts, seed."""
    return {
        "world": data.world.fingerprint(),
        "train_split": data.train_split,
        "train_scenes": data.sizes[data.train_split],
        "held_out_split": "val",
        "held_out_scenes": data.sizes["val"],
        "seed": data.seed,
    }
