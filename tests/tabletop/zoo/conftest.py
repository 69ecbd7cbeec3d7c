"""A few held-out scenes with their dense truth: the first ones of those that the cards were scored on."""

from __future__ import annotations

import pytest

from visexpert.tabletop import TabletopData
from visexpert.tabletop.datamodule import RenderSettings, TextSettings
from visexpert.types import Batch

HELD_OUT = 128
CHUNK = 16


@pytest.fixture(scope="session")
def zoo_data(tmp_path_factory: pytest.TempPathFactory) -> TabletopData:
    """Tabletop with 64 training and 128 held-out scenes; other texts and sizes are the zoo configs'."""
    return TabletopData(
        root=str(tmp_path_factory.mktemp("cache")),
        train_split="zoo",
        num_train=64,
        num_val=HELD_OUT,
        batch_size=32,
        eval_batch_size=CHUNK,
        texts=TextSettings(train={"objects": 1}, eval={"objects": 1}),
        with_targets=True,
        rendering=RenderSettings(workers=1, progress=False),
    )


@pytest.fixture(scope="session")
def held_out(zoo_data: TabletopData) -> list[Batch]:
    """The held-out scenes in chunks of 16, images and dense truth."""
    return list(zoo_data.image_dataloader("val"))
