"""FSDP over two processes on a CPU: losses and saved weights of one process with larger batches, resumed, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

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
from visexpert.io.checkpoints import load_checkpoint
from visexpert.language import PrefixLM
from visexpert.methods import Method

KINDS = {"tove": tove, "movekd": movekd}
Saved = Literal["full", "sharded"]
SAVED: tuple[Saved, ...] = get_args(Saved)
"""A file of whole tensors, or a folder with a file for each process."""

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


def fitted(folder: Path, kind: str, *, size: int, strategy: Saved | None = None, rank: int = 0, world: int = 1) -> Fit:
    """What is logged at each step of an epoch and of a second one by a new process, and the weights that they save."""
    rows, start = [], None
    for steps in (3, 6):
        watch, file = Watch(), folder / f"{kind}-{steps}.ckpt"
        options: dict[str, Any] = {} if strategy is None else {"strategy": OnCpu(state_dict_type=strategy)}
        trainer = bare_trainer(
            folder,
            steps=steps,
            callbacks=[watch],
            enable_checkpointing=False,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            devices=world,
            **options,
        )
        data = ListData(batches_of(size, rank=rank, world=world))
        trainer.fit(with_llama(kind), datamodule=data, ckpt_path=start, weights_only=True)
        trainer.save_checkpoint(file, weights_only=False)
        rows += [{name: value for name, value in row.items() if compared(name)} for row in watch.rows]
        start = file
    assert len(rows) == 6
    return rows, load_checkpoint(file, owner="a test")["state_dict"]


def fit_all(rank: int, folder: Path) -> dict[str, Fit]:
    return {
        f"{kind}, {how}": fitted(folder / how, kind, size=2, strategy=how, rank=rank, world=2)
        for kind in KINDS
        for how in SAVED
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Fit]]:
    return in_two_processes(fit_all, tmp_path_factory.mktemp("together"))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_train_as_those_of_one_process(
    tmp_path: Path, together: list[dict[str, Fit]], kind: str
) -> None:
    rows, weights = fitted(tmp_path, kind, size=4)
    for fit in together:
        # On a CPU torch gathers the state of Adam into a file through one buffer, which keeps the last of them for all.
        whole_rows, _ = fit[f"{kind}, full"]
        found_rows, found = fit[f"{kind}, sharded"]
        for row, found_row in [*zip(rows, whole_rows[:4], strict=False), *zip(rows, found_rows, strict=True)]:
            assert found_row == pytest.approx(row, rel=1e-5, abs=1e-6)
        for key, value in weights.items():
            if compared(key):
                torch.testing.assert_close(found[key], value, atol=1e-5, rtol=0, msg=key)
