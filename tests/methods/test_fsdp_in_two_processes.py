"""FSDP over two processes on a CPU: losses and saved weights of one process with batches twice as large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.methods.helpers import bare_trainer
from tests.methods.test_fits_in_two_processes import Watch, compared, movekd, tove
from tests.methods.test_in_two_processes import LLAMA
from tests.methods.uneven import ListData, batches_of
from tests.two_processes import in_two_processes
from visexpert.language import PrefixLM
from visexpert.methods import Method

KINDS = {"tove": tove, "movekd": movekd}
Fit = tuple[list[dict[str, float]], dict[str, Tensor]]


class OnCpu(FSDPStrategy):
    """Lightning takes FSDP for GPUs alone by its class, and torch needs the device named."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=self.root_device, **self.kwargs)


def with_llama(kind: str) -> Method:
    model = KINDS[kind](weight_decay=0.5)
    torch.manual_seed(0)
    model.language = PrefixLM(config=LLAMA)
    return model


def fitted(folder: Path, kind: str, *, size: int, rank: int = 0, world: int = 1, **options: Any) -> Fit:
    """What is logged at each step, and the weights that are saved at the end."""
    watch, file = Watch(), folder / f"{kind}.ckpt"
    trainer = bare_trainer(
        folder,
        steps=3,
        callbacks=[watch],
        enable_checkpointing=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(with_llama(kind), datamodule=ListData(batches_of(size, rank=rank, world=world)))
    trainer.save_checkpoint(file)
    rows = [{name: value for name, value in row.items() if compared(name)} for row in watch.rows]
    state = torch.load(file, weights_only=True)["state_dict"]
    return rows, {key: value for key, value in state.items() if compared(key)}


def fit_all(rank: int, folder: Path) -> dict[str, Fit]:
    return {kind: fitted(folder, kind, size=2, rank=rank, world=2, devices=2, strategy=OnCpu()) for kind in KINDS}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Fit]]:
    return in_two_processes(fit_all, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_train_as_those_of_one_process(
    tmp_path: Path, together: list[dict[str, Fit]], kind: str
) -> None:
    rows, weights = fitted(tmp_path, kind, size=4)
    for found_rows, found in (fit[kind] for fit in together):
        for row, found_row in zip(rows, found_rows, strict=True):
            assert found_row == pytest.approx(row, rel=1e-5, abs=1e-6)
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=key)
