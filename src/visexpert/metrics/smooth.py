"""Smooth metrics that separate models long before accuracy does: NLL per token, slots of dense captions."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from visexpert.metrics.records import RecordMetric, Row, check_lengths
from visexpert.typed import typed


@typed
class TokenNLL(RecordMetric):
    """Mean negative log-likelihood per answer token, in nats, overall and by kind of text.

    ``compute()``: ``nll`` over all tokens and ``kind/<kind>``; a mean over tokens, not over answers.
    """

    higher_is_better = False

    def update(self, nll: Tensor, counts: Tensor, kinds: Sequence[str]) -> None:
        """Add a batch.

        Args:
            nll: Sum over the answer's tokens of each item, shape (items,), float.
            counts: Tokens of each answer, shape (items,).
            kinds: Kind of each item (``dense``, ``vqa``, ...).
        """
        sums, tokens = nll.detach().double().cpu().tolist(), counts.cpu().tolist()
        check_lengths(nll=sums, counts=tokens, kinds=kinds)
        totals: dict[str, Row] = {kind: [kind, 0.0, 0] for kind in kinds}
        for kind, value, count in zip(kinds, sums, tokens, strict=True):
            totals[kind][1] += value
            totals[kind][2] += int(count)
        self.add_rows(totals.values())

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Divide sums by counts; kinds without a token are left out."""
        totals: dict[str, list[float]] = {"nll": [0.0, 0.0]}
        for kind, value, count in sorted(rows):
            for name in ("nll", f"kind/{kind}"):
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += count
        return {name: value / count for name, (value, count) in totals.items() if count}


class WeightedMeans(RecordMetric):
    """Weighted means by name; the weight is, for example, the number of images behind a value."""

    def update(self, values: Mapping[str, Tensor | float], weight: float) -> None:
        """Add a batch.

        Args:
            values: Scalars by name.
            weight: Weight of these values; 0 leaves them out.
        """
        if weight:
            self.add_rows([name, float(value) * weight, weight] for name, value in values.items())

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Divide sums by weights."""
        totals: dict[str, list[float]] = {}
        for name, value, weight in rows:
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += weight
        return {name: value / weight for name, (value, weight) in totals.items()}


class SlotAccuracy(RecordMetric):
    """Accuracy of dense captions slot by slot (``medium red cube far small blue sphere near``).

    A dense caption names the objects from left to right, with one word per slot. Word n of the prediction is compared
    with word n of the reference, as with argmax words under teacher forcing; a missing word is wrong. Surplus words
    affect ``exact`` only.

    ``compute()``: ``accuracy`` over all slots, ``slot/<name>``, and ``exact``, the share of captions without an error;
    all in [0, 1].

    Args:
        slots: Names of an object's words, in order.
    """

    higher_is_better = True

    def __init__(self, *, slots: Sequence[str] = ("size", "colour", "shape", "distance"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slots = tuple(slots)

    def update(self, predictions: Sequence[str | Sequence[int]], references: Sequence[str | Sequence[int]]) -> None:
        """Score a batch.

        Args:
            predictions: Captions, as text or as the ids of a word-level tokenizer without <bos> and <eos>.
            references: True captions, in the same form.

        Raises:
            ValueError: A reference does not fill every slot of its last object.
        """
        check_lengths(predictions=predictions, references=references)
        self.add_rows(self._row(said, true) for said, true in zip(predictions, references, strict=True))

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Divide hits by slots."""
        hits = [sum(row[1][slot] for row in rows) for slot in range(len(self.slots))]
        objects = sum(row[2] for row in rows)
        scores = {"accuracy": sum(hits) / (objects * len(self.slots)), "exact": sum(row[0] for row in rows) / len(rows)}
        scores.update({f"slot/{name}": count / objects for name, count in zip(self.slots, hits, strict=True)})
        return scores

    def _row(self, said: str | Sequence[int], true: str | Sequence[int]) -> Row:
        said_words, true_words = _words(said), _words(true)
        objects, rest = divmod(len(true_words), len(self.slots))
        if rest or not objects:
            raise ValueError(f"a dense caption has {len(self.slots)} words per object {self.slots}, got {true!r}")
        hits = [0] * len(self.slots)
        for place, (guess, truth) in enumerate(zip(said_words, true_words, strict=False)):
            hits[place % len(self.slots)] += guess == truth
        return [said_words == true_words, hits, objects]


def _words(caption: str | Sequence[int]) -> list[Hashable]:
    return list(re.findall(r"[\w-]+", caption.lower())) if isinstance(caption, str) else list(caption)
