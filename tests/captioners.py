"""Captioners of tiny random models whose answers depend on the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.methods.helpers import shake, tiny_tove
from visexpert.captioning import Captioner
from visexpert.methods import ToVE
from visexpert.runs import SavedRun
from visexpert.tabletop import TabletopData


def lively(model: ToVE) -> ToVE:
    """Give a model weights with which unlike images get unlike texts."""
    generator = torch.Generator().manual_seed(3)
    shake(model)
    for part in (model.projector, model.adapters, model.language):
        for name, parameter in part.named_parameters():
            if "norm" in name:
                nn.init.constant_(parameter, float(name.endswith("weight")))
            else:
                nn.init.normal_(parameter, std=0.3 if "embed" in name else 1.0, generator=generator)
    return model


def captioner(tmp_path: Path, *, model: ToVE | None = None, **options: Any) -> Captioner:
    """A captioner of a tiny random model on Tabletop's tokenizer."""
    model = lively(tiny_tove()) if model is None else model
    config = {"data": {"class_path": "visexpert.tabletop.TabletopData"}}
    return Captioner(SavedRun(tmp_path, config, model.eval(), TabletopData(root=str(tmp_path)), 0), **options)
