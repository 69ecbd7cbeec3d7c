"""Truth of captions, judged by the data itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visexpert.metrics.records import RecordMetric, Row


class JudgedCaptions(RecordMetric):
    """Share of captions for which each judgment of the data holds (:class:`~visexpert.types.CaptionTruth`).

    ``compute()`` gives one share in [0, 1] per name, over the captions that have a judgment of that name.
    """

    higher_is_better = True

    def update(self, judgements: Sequence[Mapping[str, bool]]) -> None:
        """Count the judgments of a batch, one mapping per caption."""
        self.add_rows([[dict(judgement)] for judgement in judgements])

    def score(self, rows: list[Row]) -> dict[str, float]:
        """Average over captions."""
        found: dict[str, list[bool]] = {}
        for (judgement,) in rows:
            for name, holds in judgement.items():
                found.setdefault(name, []).append(holds)
        return {name: sum(held) / len(held) for name, held in sorted(found.items())}
