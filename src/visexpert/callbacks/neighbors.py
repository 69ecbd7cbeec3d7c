"""Scores of a run's encoder by nearest neighbors, where the data have classes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from tqdm.auto import tqdm

from visexpert.errors import UserError
from visexpert.methods import Method
from visexpert.methods.neighbors import Embedded, NeighborProbe
from visexpert.types import Batch


class NearestNeighbors(Callback):
    """Logs ``test/knn/student`` and ``test/knn/frozen``: top-1 of a k-nearest-neighbor vote, k = 20, in [0, 1].

    Test images are classified by training images (``evaluation.knn_images`` of them), read without augmentation; see
    :class:`~visexpert.methods.neighbors.NeighborProbe`. Data without classes have no such scores.
    """

    def __init__(self) -> None:
        self._probe: NeighborProbe | None = None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *place: Any
    ) -> None:
        if isinstance(pl_module, Method) and batch.labels and pl_module.evaluation.knn_images != 0:
            self._probe = self._probe or NeighborProbe(pl_module)
            self._probe.add(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        probe, self._probe = self._probe, None
        if isinstance(pl_module, Method) and trainer.strategy.reduce_boolean_decision(probe is not None, all=False):
            probe = probe or NeighborProbe(pl_module)  # this process had no such images, another one did
            scores = probe.scores(_train(trainer, probe))
            pl_module.log_dict({f"test/knn/{name}": score for name, score in scores.items()}, batch_size=1)


def _train(trainer: Trainer, probe: NeighborProbe) -> Embedded:
    """Embed this process's training images; none, with a warning, if they cannot be read."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "plain_batches"):
        return {}
    try:
        batches = data.plain_batches("train", most=probe.model.evaluation.knn_images)
        return probe.embedded(tqdm(batches, desc="nearest neighbors", unit="batch", delay=10.0, disable=None))
    except UserError as error:
        rank_zero_warn(f"No nearest neighbors are looked for: {error}")
        return {}
