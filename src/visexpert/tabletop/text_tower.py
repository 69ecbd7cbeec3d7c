"""The text tower of the shipped CLIP, and the classes of the scenes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor

from visexpert.io.source import ZOO_PREFIX, local_path
from visexpert.tabletop.graph import with_article
from visexpert.tabletop.texts import tabletop_tokenizer
from visexpert.tabletop.world import COLOURS, SHAPES
from visexpert.tabletop.zoo.contrastive import NgramTextTower

CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Classes of zero-shot classification: colour and shape of a scene's main object."""


class TabletopTextTower:
    """The text tower that was trained with the shipped CLIP.

    Args:
        source: Source of the encoder, ``zoo:NAME``.
    """

    def __init__(self, source: str) -> None:
        folder = local_path(source)
        state = load_file(folder.with_name(f"{folder.name}_text.safetensors"))
        own = {key.removeprefix("text."): value.float() for key, value in state.items() if key.startswith("text.")}
        vocabulary, width = own["embedding.weight"].shape
        embed_dim, hidden = own["projection.weight"].shape
        self._tower = NgramTextTower(vocabulary=vocabulary, width=width, hidden=hidden, embed_dim=embed_dim)
        self._tower.load_state_dict(own, strict=True)
        self._tower.eval()
        self._tokenizer = tabletop_tokenizer()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, (N, E) float32; ids are framed by ``<bos>`` and ``<eos>`` as in training."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        rows = [[bos, *self._tokenizer.encode(text, add_special_tokens=False), eos] for text in texts]
        ids_BN = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        there_BN = torch.zeros_like(ids_BN)
        for number, row in enumerate(rows):
            ids_BN[number, : len(row)] = torch.tensor(row)
            there_BN[number, : len(row)] = 1
        embedded_BE: Tensor = self._tower(ids_BN, there_BN)
        return embedded_BE

    @staticmethod
    def class_text(name: str) -> str:
        """Return the text of a class: ``a red cube``, ``an orange cube``."""
        return with_article(name)


def text_tower(source: str | None) -> TabletopTextTower | None:
    """Return the text tower of a shipped encoder; None for any other source."""
    if source is None or not source.startswith(ZOO_PREFIX):
        return None
    folder = local_path(source)
    return TabletopTextTower(source) if folder.with_name(f"{folder.name}_text.safetensors").is_file() else None
