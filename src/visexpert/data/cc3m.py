"""CC3M as img2dataset packs it."""

from __future__ import annotations

from typing import Any

from visexpert.data.image_shards import ImageShards
from visexpert.typed import typed


@typed
class CC3M(ImageShards):
    """Conceptual Captions (3.3 M images) in tar shards of ``KEY.jpg``, ``KEY.txt`` and ``KEY.json``.

    Args:
        train: See :class:`~visexpert.data.image_shards.ImageShards`; by default all shards as img2dataset names them.
        kwargs: See :class:`~visexpert.data.image_shards.ImageShards`.
    """

    made_of = "CC3M"
    url = (
        "https://github.com/rom1504/img2dataset/blob/main/dataset_examples/cc3m.md, or ready-made by  "
        "hf download --repo-type dataset pixparse/cc3m-wds"
    )
    size = "3.3 M images, tens of GB at 256 px"

    def __init__(self, *, train: str = "{00000..00331}.tar", **kwargs: Any) -> None:
        super().__init__(train=train, **kwargs)
