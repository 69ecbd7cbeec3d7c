"""Scores of a split: by one packed forward per batch, generated captions and linear probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visexpert.language import LanguageSide
from visexpert.metrics import (
    CaptionScores,
    POPEScores,
    SceneCaptionAccuracy,
    SlotAccuracy,
    TokenNLL,
    VQAAccuracy,
    VSRAccuracy,
    caption_holds,
)
from visexpert.metrics.token_probes import TokenProbes
from visexpert.types import IGNORE_INDEX, Batch, TextBatch, TextItem, VisionTokens


@dataclass(frozen=True)
class Answer:
    """One text item with what the model would write.

    Args:
        item: The item.
        predicted: Predicted tokens as text, up to <eos>. They are the most likely token at each position given the
            true ones before it, hence right exactly where greedy decoding is right.
    """

    item: TextItem
    predicted: str


@dataclass(frozen=True)
class Caption:
    """A generated caption of one image.

    Args:
        row: Image in its batch.
        item: What was asked, with the accepted texts.
        text: What the model wrote.
        correct: Whether it is true of the scene; None where the data has no scene graph.
    """

    row: int
    item: TextItem
    text: str
    correct: bool | None


@dataclass(frozen=True)
class EvalOutput:
    """What an evaluation step hands to callbacks.

    Args:
        vision: Tokens that the language side read, gates included.
        captions: Generated captions of the first images of the batch (empty past the quota).
    """

    vision: VisionTokens
    captions: tuple[Caption, ...] = ()


class Evaluator:
    """Collects the scores of one split.

    Args:
        captions: Number of images to caption.
        probe: Collect tokens for linear probes where a batch has dense targets.
        meteor: Score captions by METEOR, too; None where Java is installed.
    """

    def __init__(self, *, captions: int, probe: bool = False, meteor: bool | None = None) -> None:
        self._quota = captions
        self._nll = TokenNLL()
        self._vqa, self._vsr, self._pope, self._slots = VQAAccuracy(), VSRAccuracy(), POPEScores(), SlotAccuracy()
        self._caption_scores, self._scene = CaptionScores(meteor=meteor), SceneCaptionAccuracy()
        self._probes = TokenProbes() if probe else None
        self._by_kind: dict[str, Callable[[list[Answer]], None]] = {
            "vqa": self._update_vqa,
            "vsr": self._update_vsr,
            "pope": self._update_pope,
            "dense": self._update_slots,
        }

    def update_text(self, batch: Batch, *, predicted_M: Tensor, nll_M: Tensor, tokenizer: Any) -> None:
        """Score the packed items.

        Args:
            batch: With items.
            predicted_M: Most likely token at each supervised position.
            nll_M: Negative log-likelihood of the true one.
            tokenizer: To turn tokens into words.
        """
        assert batch.text is not None
        image_M, item_M = item_of_supervised(batch.text)
        answers: dict[str, list[Answer]] = {}
        kinds: list[str] = []
        predicted, images, numbers = predicted_M.tolist(), image_M.tolist(), item_M.tolist()
        tokens: dict[tuple[int, int], list[int]] = {}
        for token, image, number in zip(predicted, images, numbers, strict=True):
            tokens.setdefault((image, number), []).append(token)
            kinds.append(batch.items[image][number].kind)
        for (image, number), ids in tokens.items():
            item = batch.items[image][number]
            answers.setdefault(item.kind, []).append(Answer(item, decode(ids, tokenizer)))
        self._nll.update(nll_M, torch.ones_like(nll_M), kinds)
        for kind, rows in answers.items():
            if kind in self._by_kind:
                self._by_kind[kind](rows)

    def generate_captions(
        self, batch: Batch, vision: VisionTokens, language: LanguageSide, tokenizer: Any
    ) -> tuple[Caption, ...]:
        """Caption images that have a relation caption, up to the quota."""
        rows = [index for index, items in enumerate(batch.items) if any(item.kind == "relation" for item in items)]
        rows = rows[: self._quota]
        if not rows:
            return ()
        self._quota -= len(rows)
        items = [next(item for item in batch.items[row] if item.kind == "relation") for row in rows]
        prompts = [
            [tokenizer.bos_token_id, *tokenizer(item.prompt, add_special_tokens=False)["input_ids"]] for item in items
        ]
        chosen = VisionTokens(vision.tokens_BTD[rows], vision.grid_hw)
        written = language.generate(chosen, prompts, eos_id=tokenizer.eos_token_id)
        texts = [decode(ids, tokenizer) for ids in written]
        self._caption_scores.update(texts, [item.references or (item.answer,) for item in items])
        if batch.graphs:
            self._scene.update(texts, [batch.graphs[row] for row in rows])
        return tuple(
            Caption(row, item, text, caption_holds(text, batch.graphs[row]) if batch.graphs else None)
            for row, item, text in zip(rows, items, texts, strict=True)
        )

    def collect_tokens(self, batch: Batch, vision: VisionTokens) -> None:
        """Keep tokens and dense truth for the probes."""
        if self._probes is not None and batch.targets:
            self._probes.update(vision.tokens_BTD, vision.grid_hw, batch.targets)

    def compute(self) -> dict[str, float]:
        """All scores, flat: ``vqa/accuracy``, ``pope/adversarial/f1``, ``dense/nll``, ``probe/depth``, ..."""
        parts = {
            "nll": self._nll.compute(),
            "vqa": self._vqa.compute(),
            "vsr": self._vsr.compute(),
            "pope": self._pope.compute(),
            "slots": self._slots.compute(),
            "caption": {**self._caption_scores.compute(), **self._scene.compute()},
            "probe": {} if self._probes is None else self._probes.compute(),
        }
        return {f"{part}/{name}": float(value) for part, scores in parts.items() for name, value in scores.items()}

    def _update_vqa(self, rows: list[Answer]) -> None:
        families = [row.item.family for row in rows]
        self._vqa.update([row.predicted for row in rows], [row.item.answer for row in rows], families)

    def _update_vsr(self, rows: list[Answer]) -> None:
        families = [row.item.family for row in rows]
        self._vsr.update([row.predicted for row in rows], [row.item.answer for row in rows], families)

    def _update_pope(self, rows: list[Answer]) -> None:
        families = [row.item.family for row in rows]
        self._pope.update([row.predicted for row in rows], [row.item.answer for row in rows], families)

    def _update_slots(self, rows: list[Answer]) -> None:
        self._slots.update([row.predicted for row in rows], [row.item.answer for row in rows])


def item_of_supervised(text: TextBatch) -> tuple[Tensor, Tensor]:
    """Image and item number (from 0) of each supervised token, in their order."""
    wanted_BN = text.labels_BN != IGNORE_INDEX
    image_M = wanted_BN.nonzero()[:, 0]
    return image_M, text.segments_BN[wanted_BN] - 1


def decode(ids: list[int], tokenizer: Any) -> str:
    """Tokens up to <eos> as text."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
