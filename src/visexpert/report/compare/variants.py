"""Group runs into variants: seeds of one setting belong together, and each variant gets a short name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visexpert.errors import ConfigError
from visexpert.report.compare.record import RunRecord, differences, is_run, natural, shown

SEED_FOLDER = re.compile(r"(seed|s)?[-_]?\d+", re.IGNORECASE)
"""Name of a folder that stands for a seed."""

_SEED_AT_END = re.compile(r"[-_.](seed|s)?[-_]?\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed only.

    Args:
        name: What it is called in the report.
        runs: By seed.
    """

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Seeds in the order of the runs."""
        return tuple(run.seed for run in self.runs)

    def values(self, key: str) -> list[float]:
        """Return a metric of every run that has it."""
        return [run.metrics[key] for run in self.runs if key in run.metrics]

    def by_seed(self, key: str) -> dict[int | None, float]:
        """Return a metric by seed."""
        return {run.seed: run.metrics[key] for run in self.runs if key in run.metrics}


def group_runs(runs: Sequence[RunRecord], named: Mapping[Path, str] | None = None) -> list[Variant]:
    """Group runs into variants, in the order in which they are given.

    A run that ``named`` has belongs to the variant of that name. Runs in folders VARIANT/seedN belong to VARIANT. The
    others belong together when nothing but seeds and places differs in their configurations.

    Raises:
        ConfigError: Two runs of a variant have the same seed.
    """
    groups: dict[str, list[RunRecord]] = {}
    names = {run.folder: (named or {}).get(run.folder, "") for run in runs}
    by_folder = _folder_names([run.folder for run in runs if not names[run.folder]])
    loose: list[list[RunRecord]] = []
    order: list[str | list[RunRecord]] = []
    for run in runs:
        name = names[run.folder] or by_folder.get(run.folder, "")
        if name:
            if name not in groups:
                order.append(name)
            groups.setdefault(name, []).append(run)
            continue
        same = next((group for group in loose if not differences([group[0].settings, run.settings])), None)
        if same is None:
            loose.append(same := [])
            order.append(same)
        same.append(run)
    loose_names = iter(_loose_names(loose, taken=set(groups)))
    variants = [
        Variant(key, tuple(groups[key])) if isinstance(key, str) else Variant(next(loose_names), tuple(key))
        for key in order
    ]
    return [_by_seed(variant) for variant in variants]


def _by_seed(variant: Variant) -> Variant:
    """The variant with its runs in order of their seeds, each seed once."""
    runs = sorted(variant.runs, key=lambda run: (run.seed is None, run.seed or 0, natural(run.folder)))
    seen: dict[int, RunRecord] = {}
    for run in runs:
        if run.seed is not None and run.seed in seen:
            raise ConfigError(
                f"'{seen[run.seed].folder}' and '{run.folder}' are both '{variant.name}' with seed {run.seed}; give "
                "one of them, or give them separate names by a group (NAME=GLOB)."
            )
        if run.seed is not None:
            seen[run.seed] = run
    return Variant(variant.name, tuple(runs))


def _folder_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Names of runs in folders VARIANT/seedN: the end of the path without seeds, as long as needed to tell them apart.

    RUN/merged and the like keep the run's own name before theirs.
    """
    stems = {}
    for folder in folders:
        parts = folder.absolute().parts
        kept = tuple(part for part in parts if not SEED_FOLDER.fullmatch(part))
        if len(kept) < len(parts):
            stems[folder] = kept
    names = {}
    for folder, stem in stems.items():
        others = {other for other in stems.values() if other != stem}
        length = 2 if is_run(folder.parent) else 1
        while length < len(stem) and any(other[-length:] == stem[-length:] for other in others):
            length += 1
        names[folder] = "/".join(stem[-length:])
    return names


def _loose_names(groups: Sequence[Sequence[RunRecord]], *, taken: set[str]) -> list[str]:
    """Folder names where they tell the groups apart, else the settings in which they differ."""
    stems = [{_SEED_AT_END.sub("", run.folder.name) or run.folder.name for run in group} for group in groups]
    plain = [next(iter(stem)) if len(stem) == 1 else "" for stem in stems]
    apart = differences([group[0].settings for group in groups])
    names: list[str] = []
    for index, name in enumerate(plain):
        if not name or plain.count(name) > 1:
            name = _told_apart(apart, index) or groups[index][0].folder.name
        while name in taken or name in names:
            name += "'"
        names.append(name)
    return names


def _told_apart(apart: Mapping[str, Sequence[object]], index: int) -> str:
    """Up to three settings of one group among those that differ, the rarer values first."""
    told = []
    for key, values in apart.items():
        words = [shown(value) for value in values]
        told.append((words.count(words[index]), f"{key.rpartition('.')[2]}={words[index]}"))
    return ", ".join(text for _, text in sorted(told, key=lambda item: item[0])[:3])
