"""Score a guesser that reads the questions but never sees an image; it must stay at chance.

Usage: ``python -m visexpert.tabletop.audit --help``.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from visexpert.tabletop.datamodule import TabletopData
from visexpert.tabletop.questions import CHANCE as VQA_CHANCE
from visexpert.tabletop.texts import Pools
from visexpert.tabletop.world import COLOURS
from visexpert.types import TextItem


@dataclass(frozen=True)
class AuditRow:
    """The guesser's result in one family.

    Args:
        kind: ``vqa``, ``vsr`` or ``pope``.
        family: Family of that kind.
        train_items: Items that the guesser was fitted on.
        test_items: Items that it was scored on.
        exact: Accuracy in [0, 1] when it answers each exact prompt with the majority answer in training.
        template: The same with colours removed from prompts, which leaves more items per prompt.
        chance: 1 / number of possible answers.
    """

    kind: str
    family: str
    train_items: int
    test_items: int
    exact: float
    template: float
    chance: float

    @property
    def sampling_error(self) -> float:
        """Standard deviation of a random guesser's score on this many test items."""
        return float((self.chance * (1 - self.chance) / max(self.test_items, 1)) ** 0.5)


def audit(train: Pools, test: Pools) -> list[AuditRow]:
    """Fit the text-only guesser on one split and score it on another, per family.

    Args:
        train: Pools of the split from which it learns the majority answers.
        test: Pools of the split on which it is scored.
    """
    fitted, scored = _by_family(train), _by_family(test)
    return [
        AuditRow(
            kind=kind,
            family=family,
            train_items=len(fitted[kind, family]),
            test_items=len(items),
            exact=_accuracy(fitted[kind, family], items, lambda prompt: prompt),
            template=_accuracy(fitted[kind, family], items, without_colours),
            chance=VQA_CHANCE[family] if kind == "vqa" else 0.5,
        )
        for (kind, family), items in sorted(scored.items())
    ]


def without_colours(prompt: str) -> str:
    """Return a prompt with each colour word replaced by ``*``."""
    return " ".join("*" if word in COLOURS else word for word in prompt.split())


def report(rows: Iterable[AuditRow]) -> str:
    """Return the rows as a table in Markdown, in percent."""
    lines = [
        "| kind | family | train | test | text-only guesser | without colours | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.kind} | {row.family} | {row.train_items} | {row.test_items} | {100 * row.exact:.1f} | "
            f"{100 * row.template:.1f} | {100 * row.chance:.1f} ± {100 * row.sampling_error:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Render (or read) the splits and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=None, help="folder of the cache (default: as TabletopData)")
    parser.add_argument("--num_train", type=int, default=10_000, help="scenes that the guesser is fitted on")
    parser.add_argument("--num_test", type=int, default=1000, help="scenes that it is scored on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world")
    arguments = parser.parse_args()
    data = TabletopData(
        root=arguments.root, num_train=arguments.num_train, num_test=arguments.num_test, seed=arguments.seed
    )
    print(report(audit(data.pools("train"), data.pools("test"))))


def _by_family(pools: Pools) -> dict[tuple[str, str], list[TextItem]]:
    grouped: dict[tuple[str, str], list[TextItem]] = defaultdict(list)
    for pool in pools:
        for item in pool:
            if item.kind in ("vqa", "vsr", "pope"):
                grouped[item.kind, item.family].append(item)
    return grouped


def _accuracy(train: list[TextItem], test: list[TextItem], view: Callable[[str], str]) -> float:
    """Score the majority answer per view of the prompt; an unknown prompt gets the family's majority answer."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for item in train:
        counts[view(item.prompt)][item.answer] += 1
        overall[item.answer] += 1
    right = 0
    for item in test:
        known = counts.get(view(item.prompt), overall)
        right += bool(known) and known.most_common(1)[0][0] == item.answer
    return right / max(len(test), 1)


if __name__ == "__main__":
    main()
