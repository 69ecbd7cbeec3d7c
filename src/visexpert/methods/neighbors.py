"""Nearest-neighbor probe of a method's encoder and of the frozen one that it started from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from visexpert.methods.base import Method
from visexpert.metrics.neighbors import knn_accuracy
from visexpert.metrics.records import Key, first_of_all, key_of
from visexpert.types import Batch, images_are_checked

STUDENT, FROZEN = "student", "frozen"

Embedded: TypeAlias = dict[Key, tuple[str, dict[str, Tensor]]]
"""Class and mean token by encoder of each image."""


class NeighborProbe:
    """Embeds images as the mean of their patch tokens, and classifies some by others.

    The tokens are those that the method trains, and those of its encoder before training, which is left out if its
    weights were random and no teacher keeps them.

    Args:
        model: The method.
    """

    def __init__(self, model: Method) -> None:
        self.model = model
        self._frozen = model.frozen_encoder()
        self._test: Embedded = {}

    def add(self, batch: Batch) -> None:
        """Embed test images; those without a class are left out."""
        self._embed(batch, self._test)

    def embedded(self, batches: Iterable[Batch]) -> Embedded:
        """Embed training images."""
        found: Embedded = {}
        for batch in batches:
            self._embed(batch.to(self.model.device), found)
        return found

    def scores(self, train: Embedded) -> dict[str, float]:
        """Return the top-1 accuracy in [0, 1] by encoder, over the images of all processes, which all must call this.

        Args:
            train: This process's training images; the result is empty if no process has any.
        """
        labels, test = _everywhere(self._test)
        train_labels, known = _everywhere(train)
        if not labels or not train_labels:
            return {}
        return {
            name: knn_accuracy(found, labels, train_MD=known[name], train_labels=train_labels)
            for name, found in test.items()
        }

    @torch.no_grad()
    def _embed(self, batch: Batch, into: Embedded) -> None:
        if not batch.labels:
            return
        with images_are_checked():
            seen = self.model.see(batch)
            tokens = {STUDENT: seen.views.whole(seen.tokens).tokens_BTD}
            if self._frozen is not None:
                tokens[FROZEN] = self._frozen(batch.images_01()).tokens_BTD
        means = {name: tokens_BTD.float().mean(1).cpu() for name, tokens_BTD in tokens.items()}
        for place, (row, label) in enumerate(zip(batch.index_B.tolist(), batch.labels, strict=True)):
            if label:
                own = {name: mean_BD[place] for name, mean_BD in means.items()}
                into[key_of(into, batch.split, row)] = label, own


def _everywhere(own: Embedded) -> tuple[list[str], Mapping[str, Tensor]]:
    """Return classes and embeddings by encoder of the images of all processes."""
    rows = first_of_all(own, None)
    names = rows[0][1] if rows else {}
    return [label for label, _ in rows], {name: torch.stack([found[name] for _, found in rows]) for name in names}
