"""Order rows so that a batch holds texts of similar length, either all with images or none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visexpert.data.packing import BoolArray, IntArray


def grouped_order(
    lengths: IntArray, has_image: BoolArray, *, group: int, seed: Sequence[int], groups_sorted: int = 50
) -> IntArray:
    """Order rows as LLaVA does (``group_by_modality_length``): random, but with little padding and one modality a step.

    Rows of each modality are shuffled and sorted by length within stretches of ``groups_sorted`` groups; the groups of
    both then come in random order, with the leftovers of both at the end.

    Args:
        lengths: int64 (rows,) length of each row's text, in any unit.
        has_image: bool (rows,).
        group: Rows of one step: batch size times processes.
        seed: Seed of the order.
        groups_sorted: Groups sorted together; more groups mean less padding and less randomness.
    """
    rng = np.random.default_rng(list(seed))
    groups: list[IntArray] = []
    rest: list[IntArray] = []
    for wanted in (True, False):
        rows = rng.permutation(np.flatnonzero(has_image == wanted))
        full = len(rows) // group * group
        rest.append(rows[full:])
        for start in range(0, full, group * groups_sorted):
            stretch = rows[start : min(start + group * groups_sorted, full)]
            stretch = stretch[np.argsort(-lengths[stretch], kind="stable")]
            groups += [rng.permutation(part) for part in np.split(stretch, len(stretch) // group)]
    ordered = [groups[index] for index in rng.permutation(len(groups))]
    return np.concatenate([*ordered, *rest])
