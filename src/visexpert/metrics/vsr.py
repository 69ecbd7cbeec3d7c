"""Accuracy of true/false and yes/no answers (VSR), and how such answers are parsed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from visexpert.errors import DataError
from visexpert.metrics.records import RecordMetric, Row, check_lengths, families_or_blank, mean_by_family


class VSRAccuracy(RecordMetric):
    """Accuracy of statements judged true or false (VSR, https://arxiv.org/abs/2205.00363), overall and by family.

    Answers are read by :func:`parse_truth`; one that is neither true nor false counts as wrong.
    ``compute()``: ``accuracy``, ``family/<name>`` per family, and ``unparsable``, the share of answers that are
    neither; all in [0, 1].
    """

    higher_is_better = True

    def update(
        self, predictions: Sequence[str], references: Sequence[str], families: Sequence[str] | None = None
    ) -> None:
        """Score a batch.

        Args:
            predictions: What the model wrote.
            references: The truth: ``yes``/``no``, ``true``/``false`` or ``1``/``0``.
            families: Subcategory of each statement, for the report.

        Raises:
            DataError: A reference is neither true nor false.
        """
        families = families_or_blank(families, len(predictions))
        check_lengths(predictions=predictions, references=references, families=families)
        rows = zip(predictions, references, families, strict=True)
        self.add_rows([family, parse_truth(answer), reference_truth(truth)] for answer, truth, family in rows)

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Average over statements."""
        scores = mean_by_family((family, float(answer == truth)) for family, answer, truth in rows)
        scores["unparsable"] = sum(answer is None for _, answer, _ in rows) / len(rows)
        return scores


def parse_truth(text: str) -> bool | None:
    """Read an answer by its first decisive word, ignoring case.

    Returns:
        True for ``yes``, ``true``, ``1``; False for ``no``, ``not``, ``false``, ``0`` (so ``not true`` is False);
        None if there is no such word.
    """
    for word in _WORD.findall(text.lower()):
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    return None


def reference_truth(text: str) -> bool:
    """Read a reference, which must be decisive.

    Raises:
        DataError: It is not.
    """
    truth = parse_truth(text)
    if truth is None:
        allowed = ", ".join(sorted(_TRUE | _FALSE))
        raise DataError(f"the reference {text!r} is neither true nor false: use one of {allowed} in the annotations")
    return truth


_WORD = re.compile(r"[a-z]+|\d+")
_TRUE = frozenset({"yes", "true", "1"})
_FALSE = frozenset({"no", "not", "false", "0"})
