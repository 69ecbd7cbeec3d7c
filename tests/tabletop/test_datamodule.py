"""TabletopData: what its batches hold, and that the same settings give the same batches however they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from tests.tabletop.quiet import QUIET
from visexpert.errors import ConfigError
from visexpert.tabletop import TabletopData
from visexpert.tabletop.cache import NORMAL_SCALE
from visexpert.tabletop.datamodule import EVAL_MIXTURE, TRAIN_MIXTURE, TextSettings
from visexpert.tabletop.render import class_masks
from visexpert.tabletop.world import TabletopWorld
from visexpert.types import Batch

SMALL: dict[str, Any] = {
    "num_train": 26,
    "num_val": 6,
    "num_test": 7,
    "batch_size": 4,
    "eval_batch_size": 4,
    "world": TabletopWorld(image_size=16),
    "rendering": QUIET,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    TabletopData(root=str(folder), **SMALL).prepare_data()
    return folder


def ready(root: Path, stage: str | None = None, **changes: Any) -> TabletopData:
    data = TabletopData(root=str(root), **(SMALL | {"order_seed": 0} | changes))
    data.prepare_data()
    data.setup(stage)
    return data


def same(one: Batch, two: Batch) -> bool:
    assert one.text is not None and two.text is not None
    return torch.equal(one.images_BCHW, two.images_BCHW) and torch.equal(one.text.ids_BN, two.text.ids_BN)


def test_a_training_batch_has_images_and_packed_text_only(root: Path) -> None:
    data = ready(root)
    batch = next(iter(data.train_dataloader()))
    assert batch.images_BCHW.shape == (4, 3, 16, 16) and batch.images_BCHW.dtype == torch.uint8
    assert batch.split == "train" and batch.items == () and batch.truths == () and batch.targets == {}
    cache = data.split_cache("train")
    assert torch.equal(batch.images_BCHW.permute(0, 2, 3, 1), torch.from_numpy(cache.rgb[batch.index_B.numpy()]))
    assert batch.text is not None
    assert 1 < batch.text.segments_BN.max() <= sum(TRAIN_MIXTURE.values())


def test_an_evaluation_batch_has_strings_in_segment_order_and_graphs(root: Path) -> None:
    data = ready(root)
    for batch in data.val_dataloader():
        assert batch.split == "val" and batch.text is not None
        assert batch.truths == tuple(data.split_cache("val").graphs[row] for row in batch.index_B.tolist())
        for row, items in enumerate(batch.items):
            kinds = [item.kind for item in items]
            assert kinds == sorted(kinds, key=list(EVAL_MIXTURE).index)
            assert batch.text.segments_BN[row].max() == len(items)
            for segment, item in enumerate(items, start=1):
                ids = batch.text.ids_BN[row][batch.text.segments_BN[row] == segment]
                text = data.tokenizer.decode(ids, skip_special_tokens=True)
                assert text == f"{item.prompt} {item.answer}"


def test_evaluation_covers_the_split_in_order_and_never_changes(root: Path) -> None:
    data = ready(root)
    loader = data.test_dataloader()
    first = list(loader)
    loader.set_epoch(3)
    second = list(loader)
    assert [row for batch in first for row in batch.index_B.tolist()] == list(range(7))
    assert all(same(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_training_batches_do_not_depend_on_the_workers(root: Path, num_workers: int) -> None:
    here, there = ready(root).train_dataloader(), ready(root, num_workers=num_workers).train_dataloader()
    here.set_epoch(1)
    there.set_epoch(1)
    assert all(same(*pair) for pair in zip(here, there, strict=True))


def test_texts_and_order_change_with_the_epoch_and_the_order_seed(root: Path) -> None:
    def texts(epoch: int, **changes: Any) -> dict[int, list[int]]:
        loader = ready(root, batch_size=26, **changes).train_dataloader()
        loader.set_epoch(epoch)
        (batch,) = loader
        assert batch.text is not None
        rows = zip(batch.index_B.tolist(), batch.text.ids_BN, strict=True)
        return {row: ids[ids != 0].tolist() for row, ids in rows}

    assert texts(0) == texts(0)
    for other in (texts(1), texts(0, order_seed=1)):
        assert list(other) != list(texts(0))
        assert any(other[row] != ids for row, ids in texts(0).items())


def test_targets_are_the_truth_of_the_render(root: Path) -> None:
    data = ready(root, with_targets=True)
    cache = data.split_cache("train")
    batch = next(iter(data.train_dataloader()))
    rows = batch.index_B.numpy()
    targets = batch.targets
    assert torch.equal(targets["depth_BHW"], torch.from_numpy(cache.depth[rows]).float())
    assert torch.equal(targets["instance_BHW"], torch.from_numpy(cache.instance[rows]).long())
    assert torch.equal(targets["edges_BHW"], torch.from_numpy(cache.edges[rows]).float())
    normals = torch.from_numpy(cache.normals[rows]).permute(0, 3, 1, 2) / NORMAL_SCALE
    assert (targets["normals_B3HW"] - normals).abs().max() < 0.01
    assert torch.allclose(targets["normals_B3HW"].norm(dim=1), torch.ones(4, 16, 16))
    attributes = {name: torch.from_numpy(np.asarray(values[rows])) for name, values in cache.attributes.items()}
    for name, mask in class_masks(targets["instance_BHW"], attributes).items():
        assert torch.equal(targets[f"{name}_BHW"], mask.long())
        assert targets[f"{name}_BHW"].dtype == torch.int64


def test_a_share_of_the_training_scenes_is_a_prefix(root: Path) -> None:
    def rows(share: float) -> set[int]:
        loader = ready(root, train_fraction=share, batch_size=1).train_dataloader()
        return {int(batch.index_B) for batch in loader}

    assert rows(0.5) == set(range(13))
    assert rows(0.1) == set(range(3))


def test_splits_share_no_scene(root: Path) -> None:
    data = ready(root)
    images = [image.tobytes() for split in ("train", "val", "test") for image in data.split_cache(split).rgb]
    assert len(set(images)) == len(images) == 26 + 6 + 7


def test_the_zoo_has_scenes_of_its_own(root: Path) -> None:
    zoo = ready(root, train_split="zoo", texts=TextSettings(train={"objects": 2}))
    batch = next(iter(zoo.train_dataloader()))
    assert batch.split == "zoo" and batch.text is not None and batch.text.segments_BN.max() == 2
    assert not np.array_equal(zoo.split_cache("zoo").rgb[0], ready(root).split_cache("train").rgb[0])


def test_without_a_mixture_there_is_no_text(root: Path) -> None:
    assert next(iter(ready(root, texts=TextSettings(train={})).train_dataloader())).text is None


def test_images_alone_come_in_order(root: Path) -> None:
    data = ready(root)
    batches = list(data.image_dataloader("train", batch_size=10))
    assert [len(batch) for batch in batches] == [10, 10, 6]
    assert all(batch.text is None and batch.split == "train" for batch in batches)
    assert torch.cat([batch.index_B for batch in batches]).tolist() == list(range(26))
    with pytest.raises(ConfigError, match="'other' .* train, val, test"):
        data.image_dataloader("other")


def test_only_the_splits_of_the_stage_are_rendered(tmp_path: Path) -> None:
    data = TabletopData(root=str(tmp_path), **SMALL)
    data.setup("validate")
    assert {path.name.split("-")[0] for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"val"}


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path))
    assert TabletopData().root == tmp_path
    monkeypatch.delenv("VISEXPERT_CACHE")
    assert TabletopData().root == Path.home() / ".cache" / "visexpert"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"texts": TextSettings(train={"haiku": 1})},
            "texts.train names 'haiku', but the kinds are dense, relation, vsr, vqa, pope, objects",
        ),
        ({"texts": TextSettings(eval={"vqa": 9})}, "texts.eval .* 9 x vqa, .* 0 to 8"),
        ({"train_fraction": 0.0}, "train_fraction is 0.0"),
        ({"train_split": "test"}, "train_split is 'test'"),
        ({"num_train": 0}, "num_train is 0, but must be at least 1"),
        ({"num_workers": -1}, "num_workers is -1, but must be at least 0"),
    ],
)
def test_impossible_settings_are_told(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TabletopData(**setting)


class Recorder(LightningModule):
    """Notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown: list[tuple[list[int], list[list[int]]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert batch.text is not None
        self.shown.append((batch.index_B.tolist(), batch.text.ids_BN.tolist()))
        return self.weight**2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch.items

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("stop", [6, 9])
def test_a_run_that_is_continued_in_mid_epoch_sees_the_same_batches(root: Path, tmp_path: Path, stop: int) -> None:
    def fit(steps: int, module: Recorder, ckpt_path: Path | None = None) -> Trainer:
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_epochs=-1,
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TabletopData(root=str(root), order_seed=0, **SMALL)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return trainer

    whole, first, second = Recorder(), Recorder(), Recorder()
    fit(15, whole)
    fit(stop, first).save_checkpoint(tmp_path / "last.ckpt")
    fit(15, second, tmp_path / "last.ckpt")
    assert first.shown + second.shown == whole.shown
    epochs = [sorted(row for rows, _ in whole.shown[k : k + 6] for row in rows) for k in (0, 6)]
    assert all(len(set(rows)) == 24 for rows in epochs)  # 26 scenes in batches of 4
    assert whole.shown[:6] != whole.shown[6:12]
