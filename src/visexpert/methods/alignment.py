"""Text alignment of an encoder: retrieval and zero-shot classification through the text tower of its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from visexpert.errors import DataError
from visexpert.metrics.alignment import matching_texts, retrieval_recall, zero_shot_accuracy
from visexpert.metrics.records import Key, first_of_all, key_of
from visexpert.types import Batch, images_are_checked
from visexpert.vision import VisionEncoder
from visexpert.vision.text_towers import TextTower

EmbedTexts: TypeAlias = Callable[[Sequence[str]], Tensor]
"""Embeds texts into the space of the image embeddings: (N, E), of any length."""

_CHUNK = 64

Described: TypeAlias = tuple[tuple[str, ...], str]
"""Captions and class of an image; an empty string for none."""


class AlignmentProbe:
    """Embeds the images of some batches by several encoders, and scores them against one text tower.

    Captions are those that the data have: of scenes whose content is known, of caption tasks, or none. Classes are
    those of the data; the text of each is worded by the text tower.

    Args:
        encoders: Encoders by name, weights in place, all with a pooled output in the space of the text tower.
        most: Number of images, the first ones by row over all processes; None for all.
    """

    def __init__(self, encoders: Mapping[str, VisionEncoder], *, most: int | None) -> None:
        self.encoders, self.most = dict(encoders), most
        self._seen: dict[Key, tuple[Described, dict[str, Tensor]]] = {}

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Embed images that have a caption or a class; those behind the first ``most`` of a process are left out."""
        described = _described(batch)
        room = len(described) if self.most is None else self.most - len(self._seen)
        wanted = [place for place, (captions, label) in enumerate(described) if captions or label][: max(room, 0)]
        if not wanted:
            return
        with images_are_checked():
            images_BCHW = batch.images_01()[wanted]
            found = {name: encoder.embed(images_BCHW).float().cpu() for name, encoder in self.encoders.items()}
        rows = batch.index_B.tolist()
        for number, place in enumerate(wanted):
            own = {name: embedded_BE[number] for name, embedded_BE in found.items()}
            self._seen[key_of(self._seen, batch.split, rows[place])] = described[place], own

    def scores(self, tower: TextTower) -> dict[str, dict[str, float]]:
        """Return the scores of :func:`alignment_scores` by encoder, over all processes, which all must call this.

        Retrieval is among the images that have captions, zero-shot accuracy among those that have a class. Fewer than
        two different captions, or classes, say nothing and are left out; empty without either.
        """
        rows = first_of_all(self._seen, self.most)
        told = [row for row in rows if row[0][0]]
        classed = [row for row in rows if row[0][1]]
        if len({text for (captions, _), _ in told for text in captions}) < 2:
            told = []
        truth = [label for (_, label), _ in classed]
        labels = {name: tower.class_text(name) for name in sorted(set(truth))}
        scores: dict[str, dict[str, float]] = {}
        for name in self.encoders:
            if told:
                images_BE = torch.stack([found[name] for _, found in told])
                scores[name] = alignment_scores(images_BE, tower, [captions for (captions, _), _ in told])
            if len(labels) > 1:
                images_BE = torch.stack([found[name] for _, found in classed])
                own = alignment_scores(images_BE, tower, [()] * len(classed), labels, truth)
                scores[name] = scores.get(name, {}) | own
        return scores

    @property
    def num_images(self) -> int:
        """Number of images that this process has embedded."""
        return len(self._seen)


def _described(batch: Batch) -> list[Described]:
    """Return captions and class of each image of a batch."""
    if batch.truths:
        return [((truth.caption,), truth.label) for truth in batch.truths]
    labels = batch.labels or ("",) * len(batch)
    there = [True] * len(batch) if batch.has_image_B is None else batch.has_image_B.tolist()
    found: list[Described] = []
    for place, label in enumerate(labels):
        items = batch.items[place] if batch.items else ()
        captions = [text for item in items if item.task == "caption" for text in item.references or (item.answer,)]
        found.append((tuple(dict.fromkeys(captions)), label) if there[place] else ((), ""))
    return found


@torch.no_grad()
def text_alignment(
    encoder: VisionEncoder,
    text_tower: EmbedTexts,
    images_BCHW: Tensor,
    captions: Sequence[Sequence[str]],
    labels: Mapping[str, str] | None = None,
    truth: Sequence[str] = (),
) -> dict[str, float]:
    """Return how well an encoder's images and a text tower's texts find one another, in [0, 1].

    Args:
        encoder: The encoder; its pooled output is projected into the space of the texts.
        text_tower: The text tower of its source.
        images_BCHW: Images, uint8 0-255 or float in [0, 1].
        captions: Captions of each image; equal ones of several images match all of these.
        labels: Text of each class by name, for zero-shot classification; None for none.
        truth: Class of each image.

    Returns:
        ``image_to_text/R@1``, ``/R@5``, ``/R@10``, the same of ``text_to_image``, ``zero_shot`` with labels.

    Raises:
        DataError: No image, other numbers of captions or classes than of images, or a width unlike that of the texts.
        ConfigError: The encoder has no pooled output.
    """
    return alignment_scores(embed_images(encoder, images_BCHW), text_tower, captions, labels, truth)


@torch.no_grad()
def embed_images(encoder: VisionEncoder, images_BCHW: Tensor) -> Tensor:
    """Return the embeddings (B, E) of images, on the CPU, float32."""
    scale = 255.0 if images_BCHW.dtype == torch.uint8 else 1.0
    parts = [encoder.embed(part.float() / scale).float().cpu() for part in images_BCHW.split(_CHUNK)]
    return torch.cat(parts)


@torch.no_grad()
def alignment_scores(
    images_BE: Tensor,
    text_tower: EmbedTexts,
    captions: Sequence[Sequence[str]],
    labels: Mapping[str, str] | None = None,
    truth: Sequence[str] = (),
) -> dict[str, float]:
    """Return the scores of :func:`text_alignment` for embedded images; no retrieval where no image has a caption."""
    if not len(images_BE) or len(captions) != len(images_BE) or (labels and len(truth) != len(images_BE)):
        raise DataError(
            f"text_alignment: {len(images_BE)} images, captions for {len(captions)} and classes for {len(truth)}; give "
            "at least one image, captions for each, and with labels a class for each."
        )
    distinct, matches_NM = matching_texts(captions)
    scores: dict[str, float] = {}
    if distinct:
        texts_ME = _embed_texts(text_tower, distinct, width=images_BE.shape[1])
        scores = retrieval_recall(images_BE, texts_ME, matches_NM)
    if labels:
        place = {name: index for index, name in enumerate(labels)}
        unknown = next((name for name in truth if name not in place), None)
        if unknown is not None:
            raise DataError(f"text_alignment: class {unknown!r} has no text among {list(labels)[:5]}; give it one.")
        classes_CE = _embed_texts(text_tower, list(labels.values()), width=images_BE.shape[1])
        scores["zero_shot"] = zero_shot_accuracy(images_BE, classes_CE, torch.tensor([place[name] for name in truth]))
    return scores


def _embed_texts(text_tower: EmbedTexts, texts: Sequence[str], *, width: int) -> Tensor:
    parts = [text_tower(texts[start : start + _CHUNK]).float().cpu() for start in range(0, len(texts), _CHUNK)]
    texts_ME = torch.cat(parts)
    if texts_ME.shape[1] != width:
        raise DataError(
            f"text_alignment: texts have width {texts_ME.shape[1]}, images {width}; the encoder's source lacks the "
            "projection into the space of this text tower."
        )
    return texts_ME
