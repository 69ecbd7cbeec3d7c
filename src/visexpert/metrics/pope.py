"""POPE: does the model claim objects that are not there?"""

from __future__ import annotations

from collections.abc import Sequence

from visexpert.metrics.records import RecordMetric, Row, check_lengths, families_or_blank
from visexpert.metrics.vsr import parse_truth, reference_truth


class POPEScores(RecordMetric):
    """Accuracy, precision, recall, F1 and yes-ratio of existence probes (https://arxiv.org/abs/2305.10355).

    Answers are read as the official script reads them (:func:`parse_pope`), so anything that is not a denial counts as
    "yes", even an empty answer. ``unparsable`` reveals this: the share of answers that neither deny nor say ``yes`` or
    ``true``.

    ``compute()``: ``accuracy``, ``precision``, ``recall``, ``f1``, ``yes_ratio``, ``unparsable`` over all probes, and
    ``<kind>/<score>`` for each kind (``random``, ``popular``, ``adversarial``); all in [0, 1]. "Yes" is the positive
    class. A ratio without cases (precision without a yes) is 0; the official script divides by zero there.
    """

    higher_is_better = True

    def update(self, predictions: Sequence[str], references: Sequence[str], kinds: Sequence[str] | None = None) -> None:
        """Score a batch.

        Args:
            predictions: What the model wrote.
            references: ``yes`` or ``no``.
            kinds: How the object was drawn (``random``, ``popular``, ``adversarial``), for the report.

        Raises:
            DataError: A reference is neither yes nor no.
        """
        kinds = families_or_blank(kinds, len(predictions))
        check_lengths(predictions=predictions, references=references, kinds=kinds)
        self.add_rows(
            [kind, parse_pope(answer), reference_truth(truth), parse_pope(answer) and parse_truth(answer) is not True]
            for answer, truth, kind in zip(predictions, references, kinds, strict=True)
        )

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Score all probes together, then each kind."""
        scores = _binary_scores(rows)
        for kind in sorted({kind for kind, *_ in rows if kind}):
            of_kind = _binary_scores([row for row in rows if row[0] == kind])
            scores.update({f"{kind}/{name}": value for name, value in of_kind.items()})
        return scores


def parse_pope(text: str) -> bool:
    """Read an answer by the official rule (https://github.com/AoiDragon/POPE, ``evaluate.py``).

    Take the text before the first full stop, remove commas and split at spaces: False if one of the words is ``No``,
    ``no`` or ``not``, else True. Surrounding whitespace is ignored.
    """
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.intersection(words)


def _binary_scores(rows: list[Row]) -> dict[str, float]:
    count = len(rows)
    hits = sum(said and true for _, said, true, _ in rows)
    said_yes = sum(said for _, said, _, _ in rows)
    true_yes = sum(true for _, _, true, _ in rows)
    return {
        "accuracy": sum(said == true for _, said, true, _ in rows) / count,
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / true_yes if true_yes else 0.0,
        "f1": 2 * hits / (said_yes + true_yes) if said_yes + true_yes else 0.0,
        "yes_ratio": said_yes / count,
        "unparsable": sum(unparsable for *_, unparsable in rows) / count,
    }
