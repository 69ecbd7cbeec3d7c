"""Which figures are shown, under what names, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from visexpert.errors import ConfigError
from visexpert.report.counts import is_count

HEADLINES = {
    "vqa/accuracy": "VQA",
    "vqa/family/distance": "VQA distance",
    "vqa/family/size": "VQA size",
    "vsr/accuracy": "VSR",
    "pope/adversarial/accuracy": "POPE adversarial",
    "pope/accuracy": "POPE",
    "caption/relation": "caption relation",
    "caption/cider": "CIDEr",
    "slots/accuracy": "dense slots",
    "nll/kind/dense": "dense NLL",
    "nll/nll": "NLL",
    "probe/object_depth": "object depth probe",
}
"""Scores of the first table, by key without its split, in its order; of the two of POPE the first that is there."""

LOWER_IS_BETTER = ("nll", "loss", "nmse", "error", "unparsable", "perplexity")
"""Words in a key's last part or in its task that say so."""

NEUTRAL = ("yes_ratio",)


@dataclass(frozen=True)
class Score:
    """A figure to show.

    Args:
        key: Flat key in ``metrics.json``.
        title: Its name in tables.
        better: 1 where greater is better, -1 where less is, 0 where neither.
        percent: Shown times 100.
    """

    key: str
    title: str
    better: int = 1
    percent: bool = False

    @property
    def scale(self) -> float:
        """What values are multiplied with to be shown."""
        return 100.0 if self.percent else 1.0

    @property
    def digits(self) -> int:
        """Digits after the point."""
        return 1 if self.percent else 3


def score_of(key: str, values: Iterable[float], *, title: str = "") -> Score:
    """A score whose direction follows from its key and whose form from its values (accuracies are shown in %)."""
    split, _, rest = key.partition("/")
    if is_count(key):
        return Score(key, title or rest, better=0)
    words = rest.split("/")
    better = 1
    if any(word in NEUTRAL for word in words):
        better = 0
    elif any(mark in word for word in (words[0], words[-1]) for mark in LOWER_IS_BETTER) or words[0] == "nll":
        better = -1
    share = better >= 0 and words[-1] not in ("cider", "spice") and all(-1 <= value <= 1 for value in values)
    return Score(key, title or HEADLINES.get(rest, "") or rest, better, share)


def choose_scores(known: Sequence[str], wanted: Sequence[str], *, split: str) -> list[str]:
    """Keys of the first table: those that are wanted, else the headlines that are there, else the first eight.

    Raises:
        ConfigError: A wanted key that no run has.
    """
    if wanted:
        return [_resolved(key, known, split) for key in wanted]
    found = [f"{split}/{key}" for key in HEADLINES if f"{split}/{key}" in known]
    if f"{split}/pope/adversarial/accuracy" in found and f"{split}/pope/accuracy" in found:
        found.remove(f"{split}/pope/accuracy")
    if f"{split}/nll/kind/dense" in found and f"{split}/nll/nll" in found:
        found.remove(f"{split}/nll/nll")
    return (
        found or [key for key in known if key.startswith(f"{split}/") and key.count("/") <= 2 and not is_count(key)][:8]
    )


def choose_primary(scores: Sequence[str], wanted: str | None, known: Sequence[str], *, split: str) -> str:
    """The score of the Pareto figure and the curves: the wanted one, else the first of the table.

    Raises:
        ConfigError: No run has it.
    """
    return scores[0] if wanted is None else _resolved(wanted, known, split)


def skill_groups(known: Sequence[str], *, split: str) -> dict[str, list[str]]:
    """Keys of scores by skill, by task: ``vqa`` to ``test/vqa/family/size`` and the like, probes among them."""
    groups: dict[str, list[str]] = {}
    for key in known:
        parts = key.split("/")
        if parts[0] != split:
            continue
        if len(parts) == 4 and parts[2] in ("family", "slot"):
            groups.setdefault(parts[1], []).append(key)
        elif len(parts) == 3 and parts[1] == "probe":
            groups.setdefault("probe", []).append(key)
    return groups


def _resolved(key: str, known: Sequence[str], split: str) -> str:
    """A key as it is, or with the split put before it."""
    for candidate in (key, f"{split}/{key}"):
        if candidate in known:
            return candidate
    near = [name for name in known if key.rpartition("/")[2] in name and name.startswith(f"{split}/")][:4]
    some = near or [name for name in known if name.startswith(f"{split}/")][:6]
    raise ConfigError(f"No run has a score '{key}'; there are {', '.join(some)} and more in any metrics.json.")
