"""Scores of a split, from one packed forward pass per batch, generated captions and linear probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visexpert.errors import ConfigError
from visexpert.language import LanguageModel
from visexpert.metrics import (
    CaptionScores,
    JudgedCaptions,
    POPEScores,
    SlotAccuracy,
    TokenNLL,
    VQAAccuracy,
    VSRAccuracy,
)
from visexpert.metrics.records import Key, first_of_all, gathered, key_of
from visexpert.metrics.smooth import WeightedMeans
from visexpert.metrics.tokens import TokenProbes
from visexpert.types import Batch, CaptionTruth, FrameTokens, TextBatch, TextItem, VisionTokens

CAPTION = "caption"
"""Task of a text that is a caption."""

WRITE_AT_ONCE = 64
"""Most answers to generate in one call; an image may have many questions."""


@dataclass(frozen=True)
class Answer:
    """A text item with the model's answer.

    Args:
        item: The item.
        predicted: The answer up to <eos>. If it was not generated, it is the most likely token at each position given
            the true ones before it, so it is correct exactly if greedy decoding is.
    """

    item: TextItem
    predicted: str


@dataclass(frozen=True)
class Caption:
    """A generated caption of one image.

    Args:
        row: Image in its batch.
        item: The text item, with accepted texts.
        text: What the model wrote.
        correct: Whether it is true of the image; None if the data cannot judge it.
    """

    row: int
    item: TextItem
    text: str
    correct: bool | None


@dataclass(frozen=True)
class Written:
    """What the model wrote for one text item.

    Args:
        row: Image in its batch.
        item: The text item, with accepted texts.
        text: What the model wrote.
    """

    row: int
    item: TextItem
    text: str


@dataclass(frozen=True)
class EvalOutput:
    """Output of an evaluation step, for callbacks.

    Args:
        vision: Tokens that the language model read, with gates.
        captions: Generated captions of the first images of the batch; empty beyond the quota.
    """

    vision: VisionTokens
    captions: tuple[Caption, ...] = ()


class SourceScores:
    """The scores of one source of a split.

    Args:
        meteor: Also score captions by METEOR; None: if Java is installed.
        captions: Number of images to caption, over all processes; None for all.
    """

    def __init__(self, *, meteor: bool | None, captions: int | None) -> None:
        self.nll = TokenNLL()
        self.vqa, self.vsr, self.pope, self.slots = VQAAccuracy(), VSRAccuracy(), POPEScores(), SlotAccuracy()
        self.captions = CaptionScores(meteor=meteor, sync_on_compute=False)  # every process computes the scores of all
        self.judged = JudgedCaptions(sync_on_compute=False)
        self._limit = captions
        self._written: dict[Key, tuple[str, TextItem, CaptionTruth | None]] = {}
        self._to_caption: dict[Key, None] = {}
        self._answers: dict[str, dict[Key, tuple[int, int]]] = {}
        self._by_kind: dict[str, Callable[[list[Answer]], None]] = {
            "vqa": self._update_vqa,
            "vsr": self._update_vsr,
            "pope": self._update_pope,
            "slots": self._update_slots,
        }

    def scores(self, kind: str) -> bool:
        """Return whether answers of this kind are scored."""
        return kind in self._by_kind

    def update(self, kind: str, rows: list[Answer]) -> None:
        """Score answers of one kind; kinds without a score are ignored."""
        if kind in self._by_kind:
            self._by_kind[kind](rows)

    def count_captions(self, rows: Iterable[int], *, split: str) -> None:
        """Count images that could be captioned."""
        for row in rows:
            self._to_caption[key_of(self._to_caption, split, row)] = None

    def count_answers(self, kind: str, *, written: int, of: int, split: str, row: int) -> None:
        """Count the answers that the model wrote for an image, of those to write."""
        known = self._answers.setdefault(kind, {})
        known[key_of(known, split, row)] = written, of

    def add_caption(self, text: str, item: TextItem, truth: CaptionTruth | None, *, split: str, row: int) -> None:
        """Keep a written caption; those of the first rows over all processes are scored."""
        self._written[key_of(self._written, split, row)] = text, item, truth

    def compute(self) -> dict[str, dict[str, float]]:
        """Return all scores by part."""
        everyone = gathered(self._answers)
        scores = {
            "nll": self.nll.compute(),
            "vqa": self.vqa.compute(),
            "vsr": self.vsr.compute(),
            "pope": self.pope.compute(),
            "slots": self.slots.compute(),
            "caption": self._caption_scores(),
        }
        return {part: {**values, **self._written_of(part, everyone)} for part, values in scores.items()}

    @staticmethod
    def _written_of(kind: str, everyone: Sequence[Mapping[str, Mapping[Key, tuple[int, int]]]]) -> dict[str, float]:
        """Return the number of written answers, of those to write; a row seen by two processes counts once."""
        counts = {key: pair for known in everyone for key, pair in known.get(kind, {}).items()}
        if not counts:
            return {}
        written, of = (sum(part) for part in zip(*counts.values(), strict=True))
        return {"answers": written, "answers_of": of}

    def _caption_scores(self) -> dict[str, float]:
        """Return the scores of captions against their references and, if the data can judge them, its judgment."""
        written = first_of_all(self._written, self._limit)
        possible = len({key for known in gathered(list(self._to_caption)) for key in known})
        self.captions.reset()
        self.judged.reset()
        if not written:
            return {}
        families = [item.family for _, item, _ in written]
        references = [item.references or (item.answer,) for _, item, _ in written]
        self.captions.update([text for text, _, _ in written], references, families)
        self.judged.update([truth.judge(text) for text, _, truth in written if truth is not None])
        counts = {"images": float(len(written)), "images_of": float(possible)}
        return {**self.captions.compute(), **self.judged.compute(), **counts}

    def _update_vqa(self, rows: list[Answer]) -> None:
        families = [row.item.family for row in rows]
        truths = [row.item.references or row.item.answer for row in rows]
        self.vqa.update([row.predicted for row in rows], truths, families)

    def _update_vsr(self, rows: list[Answer]) -> None:
        families = [row.item.family for row in rows]
        self.vsr.update([row.predicted for row in rows], [row.item.answer for row in rows], families)

    def _update_pope(self, rows: list[Answer]) -> None:
        families = [row.item.family for row in rows]
        self.pope.update([row.predicted for row in rows], [row.item.answer for row in rows], families)

    def _update_slots(self, rows: list[Answer]) -> None:
        self.slots.update([row.predicted for row in rows], [row.item.answer for row in rows])


class Evaluator:
    """Collects the scores of one split, for each of its sources.

    Args:
        captions: Number of images of each source to caption, the first over all processes; None for all. At 0 nothing
            is generated: answers come from the packed forward pass instead, which is fast and close.
        probe: Collect tokens for linear probes if a batch has dense targets.
        meteor: Also score captions by METEOR; None: if Java is installed.
    """

    def __init__(self, *, captions: int | None, probe: bool = False, meteor: bool | None = None) -> None:
        self._captions, self._meteor = captions, meteor
        self._captioned: dict[str, int] = {}
        self._sources: dict[str, SourceScores] = {}
        self._probes = TokenProbes() if probe else None
        self._means = WeightedMeans()

    def update_text(self, batch: Batch, *, predicted_M: Tensor, nll_M: Tensor, tokenizer: Any) -> None:
        """Score the packed items.

        Args:
            batch: With items.
            predicted_M: Most likely token at each supervised position.
            nll_M: Negative log-likelihood of the true token.
            tokenizer: Decodes tokens.
        """
        assert batch.text is not None
        scores = self._of(batch.source)
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
            if not self._is_written(item):
                answers.setdefault(item.task, []).append(Answer(item, decode(ids, tokenizer)))
        scores.nll.update(nll_M, torch.ones_like(nll_M), kinds)
        for kind, rows in answers.items():
            scores.update(kind, rows)

    def write_answers(self, batch: Batch, vision: VisionTokens, language: LanguageModel, tokenizer: Any) -> None:
        """Generate the answers that must not be judged token by token, and score them."""
        scores = self._of(batch.source)
        places = [
            (image, number)
            for image, items in enumerate(batch.items)
            for number, item in enumerate(items)
            if self._is_written(item) and scores.scores(item.task)
        ]
        self._count_answers(batch, scores)
        answers: dict[str, list[Answer]] = {}
        for start in range(0, len(places), WRITE_AT_ONCE):
            part = places[start : start + WRITE_AT_ONCE]
            for (image, number), text in zip(part, _write(batch, part, vision, language, tokenizer), strict=True):
                item = batch.items[image][number]
                answers.setdefault(item.task, []).append(Answer(item, text))
        for kind, rows in answers.items():
            scores.update(kind, rows)

    def generate_captions(
        self, batch: Batch, vision: VisionTokens, language: LanguageModel, tokenizer: Any
    ) -> tuple[Caption, ...]:
        """Caption images whose texts include a caption, up to the quota of their source."""
        places = [
            next((image, number) for number, item in enumerate(items) if item.task == CAPTION)
            for image, items in enumerate(batch.items)
            if any(item.task == CAPTION for item in items)
        ]
        scores = self._of(batch.source)
        scores.count_captions([int(batch.index_B[image]) for image, _ in places], split=batch.split)
        done = self._captioned.get(batch.source, 0)
        if self._captions is not None:
            places = places[: self._captions - done]
        if not places:
            return ()
        self._captioned[batch.source] = done + len(places)
        texts = _write(batch, places, vision, language, tokenizer)
        items = [batch.items[image][number] for image, number in places]
        for (image, _), item, text in zip(places, items, texts, strict=True):
            truth = batch.truths[image] if batch.truths else None
            scores.add_caption(text, item, truth, split=batch.split, row=int(batch.index_B[image]))
        return tuple(
            Caption(image, item, text, all(batch.truths[image].judge(text).values()) if batch.truths else None)
            for (image, _), item, text in zip(places, items, texts, strict=True)
        )

    def collect_tokens(self, batch: Batch, vision: VisionTokens) -> None:
        """Collect tokens and dense targets for the probes."""
        if self._probes is not None and batch.targets:
            rows = batch.index_B.tolist()
            self._probes.update(vision.tokens_BTD, vision.grid_hw, batch.targets, split=batch.split, rows=rows)

    def add_means(self, values: Mapping[str, Tensor | float], *, images: int) -> None:
        """Add means over the images of a batch, such as a loss, to those over the split."""
        self._means.update(values, images)

    def compute(self) -> dict[str, float]:
        """Return all scores by name: ``vqa/accuracy``, ``pope/adversarial/f1``, ``dense/nll``, ``probe/depth``, ...

        Scores of a named source (``coco``) start with its name: ``coco/caption/cider``.
        """
        parts: dict[str, dict[str, float]] = {}
        for source in _of_all_processes(self._sources):
            prefix = f"{source}/" if source else ""
            parts |= {f"{prefix}{part}": scores for part, scores in self._of(source).compute().items()}
        parts["probe"] = {} if self._probes is None else self._probes.compute()
        flat = {f"{part}/{name}": float(value) for part, scores in parts.items() for name, value in scores.items()}
        return flat | self._means.compute()

    def _of(self, source: str) -> SourceScores:
        if source not in self._sources:
            self._sources[source] = SourceScores(meteor=self._meteor, captions=self._captions)
        return self._sources[source]

    def _is_written(self, item: TextItem) -> bool:
        return item.generate and self._captions != 0

    def _count_answers(self, batch: Batch, scores: SourceScores) -> None:
        for image, items in enumerate(batch.items):
            wanted = [item for item in items if item.generate and scores.scores(item.task)]
            for task in sorted({item.task for item in wanted}):
                of = sum(item.task == task for item in wanted)
                written = sum(item.task == task and self._is_written(item) for item in wanted)
                scores.count_answers(task, written=written, of=of, split=batch.split, row=int(batch.index_B[image]))


def _write(
    batch: Batch, places: list[tuple[int, int]], vision: VisionTokens, language: LanguageModel, tokenizer: Any
) -> list[str]:
    """Generate answers to items, given by image and number."""
    if not batch.prompts:
        raise ConfigError(
            "The data gives texts to generate (Batch.items) without their prompts (Batch.prompts); fill both."
        )
    prompts = [batch.prompts[image][number] for image, number in places]
    eos = FrameTokens.of(tokenizer, purpose="end answers").eos
    written = language.generate(vision.rows([image for image, _ in places]), prompts, eos_id=eos)
    return [decode(ids, tokenizer) for ids in written]


def write_all(batch: Batch, vision: VisionTokens, language: LanguageModel, tokenizer: Any) -> tuple[Written, ...]:
    """Generate an answer to every text item of a batch, image by image."""
    places = [(image, number) for image, items in enumerate(batch.items) for number in range(len(items))]
    parts = [places[start : start + WRITE_AT_ONCE] for start in range(0, len(places), WRITE_AT_ONCE)]
    texts = [text for part in parts for text in _write(batch, part, vision, language, tokenizer)]
    return tuple(
        Written(image, batch.items[image][number], text) for (image, number), text in zip(places, texts, strict=True)
    )


def _of_all_processes(names: Iterable[str]) -> list[str]:
    """Return the names that any process knows, sorted, so that all processes compute the same metrics in turn."""
    return sorted({name for known in gathered(list(names)) for name in known} or {""})


def item_of_supervised(text: TextBatch) -> tuple[Tensor, Tensor]:
    """Return the image and item number (from 0) of each supervised token, in order."""
    places_M = text.facts.places_M
    return places_M // text.ids_BN.shape[1], text.segments_BN.flatten()[places_M] - 1


def decode(ids: list[int], tokenizer: Any) -> str:
    """Decode tokens up to <eos>."""
    eos = FrameTokens.of(tokenizer, purpose="end answers").eos
    if eos in ids:
        ids = ids[: ids.index(eos)]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
