"""``predictions.jsonl``: the model's answer to every text item of the test images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from visexpert.callbacks.run_folder import folder_of
from visexpert.errors import ConfigError, DataError
from visexpert.methods import Method
from visexpert.methods.evaluation import Written
from visexpert.types import Batch

FILE = "predictions.jsonl"


class Predictions(Callback):
    """Writes one JSON line for each text item of the images that ``visexpert predict`` reads, in the data's order.

    Keys: ``source`` (where a run reads several, else empty), ``split``, ``row`` (of the image in the split), ``image``
    (its name in the source, null where it has none), ``kind``, ``prompt``, ``text`` (what the model wrote) and
    ``answer`` (what is accepted). The file of an earlier prediction is replaced once the new one is whole.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot predict.

        Raises:
            ConfigError: The model writes no text, the data has none or no test part, or there are several processes.
        """
        if stage != "predict":
            return
        self._part = folder_of(trainer) / f".{FILE}.part"
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        check_writes(pl_module)
        if getattr(data, "tokenizer", None) is None:
            raise ConfigError(f"predict answers text items, but {type(data).__name__} has none: give it a tokenizer.")
        own = type(data).predict_dataloader is not LightningDataModule.predict_dataloader
        if not own or data.predict_dataloader() == []:
            raise ConfigError(
                f"predict reads the test part of the data, but {type(data).__name__} has none; give it one, or name "
                "images to `visexpert caption`."
            )
        if trainer.world_size > 1:
            raise ConfigError(
                f"predict writes one file from one process, not {trainer.world_size}; add --trainer.devices 1."
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write([], mode="w")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._write([_record(batch, written) for written in outputs], mode="a")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self._part.with_name(FILE)
        self._part.replace(path)
        print(f"Predictions are in {path}", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "predict":
            self._part.unlink(missing_ok=True)

    def _write(self, records: Sequence[dict[str, Any]], *, mode: str) -> None:
        path: Path = self._part
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        except OSError as error:
            raise DataError(f"Cannot write {path} ({error.strerror}): free the disk.") from error


def check_writes(model: LightningModule) -> None:
    """Check that a model writes text, before data is read.

    Raises:
        ConfigError: It has no language model.
    """
    if not isinstance(model, Method) or not model.reads_text:
        raise ConfigError(
            f"predict needs a language model, but this {type(model).__name__} has none; score it with `visexpert test`."
        )


def _record(batch: Batch, written: Written) -> dict[str, Any]:
    item = written.item
    return {
        "source": batch.source,
        "split": batch.split,
        "row": int(batch.index_B[written.row]),
        "image": batch.keys[written.row] if batch.keys else None,
        "kind": item.kind,
        "prompt": item.prompt,
        "text": written.text,
        "answer": list(item.references) or item.answer,
    }
