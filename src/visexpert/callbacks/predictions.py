"""``predictions.jsonl``: the model's answer to every text item of the test images."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from visexpert.callbacks.run_folder import folder_of
from visexpert.errors import ConfigError, DataError
from visexpert.io.reading import parse_json
from visexpert.io.run_files import read_object, write_json
from visexpert.methods import Method
from visexpert.types import Batch, TextItem

log = logging.getLogger(__name__)

FILE = "predictions.jsonl"
PART = f".{FILE}.part"
"""Lines of a prediction that is under way or was stopped."""

WEIGHTS = "the model's weights (SHA-256)"


class Predictions(Callback):
    """Writes one JSON line for each text item of the images that ``visexpert predict`` reads, in the data's order.

    Keys: ``source`` (where a run reads several, else empty), ``split``, ``row`` (of the image in the split), ``image``
    (its name in the source, null where it has none), ``kind``, ``prompt``, ``text`` (what the model wrote) and
    ``answer`` (what is accepted). The file of an earlier prediction is replaced once the new one is whole.

    Lines go to a hidden file first. After :meth:`go_on`, a prediction that was stopped goes on from the lines that it
    left there, if weights, settings and texts are the same.
    """

    def __init__(self) -> None:
        self._settings: Mapping[str, str] | None = None
        self._anew = False
        self._part: Path | None = None
        self._kept: list[dict[str, Any]] = []
        self._ends = [0]  # byte after each kept line
        self._passed = 0  # texts of the batches so far

    def go_on(self, run: Path, settings: Mapping[str, str], *, anew: bool) -> None:
        """Let the next prediction go on from one that was stopped.

        Args:
            run: The run's folder.
            settings: What decides the answers beside weights and texts, by key.
            anew: Whether to throw away what the stopped one left.

        Raises:
            ConfigError: The stopped one had other settings.
        """
        self._settings, self._anew = settings, anew
        part = run / PART
        if not anew and part.is_file() and _facts_of(part).is_file():
            earlier = read_object(_facts_of(part))
            _check_same(part, earlier, {**settings, WEIGHTS: earlier.get(WEIGHTS, "")})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot predict.

        Raises:
            ConfigError: The model writes no text, the data has none or no test part, or there are several processes.
        """
        if stage != "predict":
            return
        self._part = folder_of(trainer) / PART
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
                f"predict writes one file from one process, not {trainer.world_size}; set trainer.devices to 1."
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the lines of a stopped prediction, or begin.

        Raises:
            ConfigError: It had other weights or settings.
        """
        part = self._file
        facts = None if self._settings is None else {**self._settings, WEIGHTS: _digest(pl_module)}
        self._kept, self._ends, self._passed = [], [0], 0
        if facts is not None and not self._anew and part.is_file() and _facts_of(part).is_file():
            _check_same(part, read_object(_facts_of(part)), facts)
            self._kept, self._ends = _whole_lines(part)
            _cut(part, self._ends[-1])
            log.info("Going on from %d predictions of a call that was stopped.", len(self._kept))
            return
        part.unlink(missing_ok=True)  # before its facts change: they must never describe another call's lines
        if facts is not None:
            write_json(_facts_of(part), facts)
        self._write([], mode="w")

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the model pass over a batch whose answers are all there.

        Raises:
            ConfigError: The data are not those of the call that was stopped.
        """
        asked = [_asked(batch, image, item) for image, items in enumerate(batch.items) for item in items]
        kept = self._kept[self._passed : self._passed + len(asked)]
        for line, (have, expected) in enumerate(zip(kept, asked, strict=False), start=self._passed + 1):
            for key, value in expected.items():
                if key != "text" and have.get(key) != json.loads(json.dumps(value)):
                    raise _differs(f"{key} of line {line}", have.get(key), value, self._file)
        assert isinstance(pl_module, Method)
        pl_module.answered = bool(asked) and len(kept) == len(asked)
        if kept and not pl_module.answered:
            _cut(self._file, self._ends[self._passed])  # this batch is answered as a whole
            self._kept = self._kept[: self._passed]
        self._passed += len(asked)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._write([{**_asked(batch, each.row, each.item), "text": each.text} for each in outputs], mode="a")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = self._file
        if self._passed < len(self._kept):
            raise _differs("the number of texts", f"at least {len(self._kept)}", self._passed, part)
        path = part.with_name(FILE)
        part.replace(path)
        _facts_of(part).unlink(missing_ok=True)
        print(f"Predictions are in {path}", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what the next call can go on from."""
        part = self._part
        if trainer.state.fn != "predict" or part is None or not part.is_file():
            return
        if self._settings is None or not part.stat().st_size:
            part.unlink()
            _facts_of(part).unlink(missing_ok=True)
        elif not isinstance(exception, ConfigError):
            log.info("The predictions so far are kept; the same command goes on from them.")

    @property
    def _file(self) -> Path:
        assert self._part is not None, "setup comes first"
        return self._part

    def _write(self, records: Sequence[dict[str, Any]], *, mode: str) -> None:
        path = self._file
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


def check_replaces(run: Path, *, overwrite: bool) -> None:
    """Check that no predictions are replaced unasked; whoever was stopped while replacing them has asked.

    Raises:
        ConfigError: The run's folder has some.
    """
    if (run / FILE).is_file() and not (run / PART).is_file() and not overwrite:
        raise ConfigError(
            f"'{run / FILE}' is there already; keep it under another name, or replace it by `visexpert predict {run} "
            "--overwrite`."
        )


def _asked(batch: Batch, image: int, item: TextItem) -> dict[str, Any]:
    """Return the line of a text item without the answer."""
    return {
        "source": batch.source,
        "split": batch.split,
        "row": int(batch.index_B[image]),
        "image": batch.keys[image] if batch.keys else None,
        "kind": item.kind,
        "prompt": item.prompt,
        "text": None,
        "answer": list(item.references) or item.answer,
    }


def _facts_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _digest(model: LightningModule) -> str:
    """Return what tells a model's weights from others."""
    digest = sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_same(part: Path, earlier: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    for key in sorted({*earlier, *facts}):
        if earlier.get(key) != facts.get(key):
            raise _differs(key, earlier.get(key), facts.get(key), part)


def _differs(key: str, earlier: object, now: object, part: Path) -> ConfigError:
    have, want = (repr(str(value)[:80]) for value in (earlier, now))
    return ConfigError(
        f"'{part}' is of a call that was stopped, in which {key} was {have}, not {want}; give the same again to go "
        f"on from it, or begin anew by `visexpert predict {part.parent} --overwrite`."
    )


def _whole_lines(part: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the lines before the first that is cut or broken, and where each ends, in bytes."""
    lines: list[dict[str, Any]] = []
    ends = [0]
    with part.open("rb") as file:
        for raw in file:
            try:
                line = parse_json(raw) if raw.endswith(b"\n") else None
            except ValueError:  # such as zeros that a crashed machine left
                line = None
            if not isinstance(line, dict):
                break
            lines.append(line)
            ends.append(ends[-1] + len(raw))
    return lines, ends


def _cut(part: Path, size: int) -> None:
    try:
        os.truncate(part, size)
    except OSError as error:
        raise DataError(f"Cannot write {part} ({error.strerror}): make it writable.") from error
