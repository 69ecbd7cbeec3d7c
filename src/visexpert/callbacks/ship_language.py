"""Save a trained language model as a start for other runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file

from visexpert.callbacks.run_folder import environment
from visexpert.errors import ConfigError
from visexpert.methods import Method


class ShipLanguage(Callback):
    """Writes the language model's weights (fp16 safetensors) and how they came about at the end of training.

    Args:
        out: Weights file; the facts go beside it as ``.json`` under ``cards``.
        cards: Folder of the facts.
        trained_on: One sentence for the card: which encoder, data and steps.
    """

    def __init__(self, *, out: str, cards: str, trained_on: str) -> None:
        if not out.endswith(".safetensors"):
            raise ConfigError(f"ShipLanguage: out={out!r} must end in .safetensors, the only format that is read.")
        self.out, self.cards, self.trained_on = Path(out), Path(cards), trained_on

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Method):
            raise ConfigError("ShipLanguage needs a method with a language model; remove it from this config.")
        if not trainer.is_global_zero:
            return
        state = pl_module.language.state_dict()
        tied = {key for key in state if key == "head.weight"}
        weights = {key: value.half().contiguous() for key, value in state.items() if key not in tied}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, self.out)
        self.out.chmod(0o644)  # safetensors writes files that only their owner may read
        scores = {
            k: float(v) for k, v in trainer.callback_metrics.items() if torch.is_tensor(v) and k.startswith("val/")
        }
        facts = {
            "name": self.out.stem,
            "license": "Apache-2.0",
            "trained_on": self.trained_on,
            "steps": trainer.global_step,
            "parameters": sum(value.numel() for value in weights.values()),
            "validation": {name: round(value, 4) for name, value in sorted(scores.items())},
            "seed": environment()["seed"],
        }
        self.cards.mkdir(parents=True, exist_ok=True)
        (self.cards / f"{self.out.stem}.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
