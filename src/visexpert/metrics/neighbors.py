"""How well embeddings separate classes: the vote of the nearest training images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBORS = 20
"""Number of nearest images that vote."""

TEMPERATURE = 0.07
"""A vote weighs exp(cosine / this)."""

_CHUNK = 1024


def knn_accuracy(
    embeddings_ND: Tensor,
    labels: Sequence[str],
    *,
    train_MD: Tensor,
    train_labels: Sequence[str],
    neighbors: int = NEIGHBORS,
) -> float:
    """Return the top-1 accuracy, in [0, 1], of a weighted vote of the nearest training images by cosine.

    As Wu et al. (arXiv 1805.01978) and DINO (arXiv 2104.14294): each of the nearest images votes for its class with
    weight exp(cosine / 0.07). Classes that the training images lack count as wrong.

    Args:
        embeddings_ND: Embeddings to classify, N >= 1.
        labels: Their classes.
        train_MD: Embeddings of the training images, M >= 1.
        train_labels: Their classes.
        neighbors: Number of images that vote; all if there are fewer.
    """
    names = sorted(set(train_labels))
    number = {name: index for index, name in enumerate(names)}
    class_M = torch.tensor([number[label] for label in train_labels], device=train_MD.device)
    true_N = torch.tensor([number.get(label, -1) for label in labels], device=train_MD.device)
    train_MD = F.normalize(train_MD.float(), dim=1)
    right = 0
    for start in range(0, len(embeddings_ND), _CHUNK):
        part_BD = F.normalize(embeddings_ND[start : start + _CHUNK].float(), dim=1)
        near = (part_BD @ train_MD.T).topk(min(neighbors, len(train_MD)), dim=1)
        votes_BC = part_BD.new_zeros(len(part_BD), len(names))
        votes_BC.scatter_add_(1, class_M[near.indices], ((near.values - 1) / TEMPERATURE).exp())
        right += int((votes_BC.argmax(1) == true_N[start : start + _CHUNK]).sum())
    return right / len(embeddings_ND)
