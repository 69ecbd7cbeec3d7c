"""Online balancing of answers, so that a guesser that reads only the text stays at chance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class Balancer:
    """Counts answers per key and says which answer may still be used.

    A candidate is allowed while its answer is less than ``slack`` ahead of the rarest of its possible answers under
    each of its keys (the exact prompt, its template, its family). So the rarest answer sets the pace, common ones are
    subsampled, and every beginning of a split is as balanced as the whole (shares of a split stay fair).

    Args:
        slack: Largest lead of an answer over the rarest one.
    """

    def __init__(self, *, slack: int = 1) -> None:
        self.slack = slack
        self._counts: dict[Hashable, dict[str, int]] = {}

    def lead(self, key: Hashable, answer: str, options: Sequence[str]) -> int:
        """Return how far ``answer`` is ahead of the rarest of ``options`` under ``key``.

        Args:
            key: Where the answer counts; always with the same options.
            answer: One of ``options``.
            options: All answers that the prompt can have.
        """
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = dict.fromkeys(options, 0)
        return counts[answer] - min(counts.values())

    def allows(self, keys: Sequence[Hashable], answer: str, options: Sequence[str]) -> bool:
        """Return whether using ``answer`` keeps each of ``keys`` within the slack."""
        for key in keys:
            if self.lead(key, answer, options) >= self.slack:
                return False
        return True

    def use(self, keys: Sequence[Hashable], answer: str) -> None:
        """Count ``answer`` under each of ``keys``, which :meth:`allows` or :meth:`lead` has seen."""
        for key in keys:
            self._counts[key][answer] += 1
