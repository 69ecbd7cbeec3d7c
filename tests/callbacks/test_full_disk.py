"""A disk that fills up while a run writes: figures are spared, everything else is told, and nothing is lost."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from matplotlib.figure import Figure

from visexpert.callbacks.run_folder import RunLogger
from visexpert.cli import main
from visexpert.errors import DataError
from visexpert.io.run_files import write_bytes, write_text
from visexpert.report.palette import canvas, save, spared

SMOKE = Path(__file__).parents[2] / "configs" / "tove" / "smoke.yaml"
NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EACCES)


def failing(number: int) -> Callable[..., Any]:
    """A method of ``pathlib.Path`` that fails."""

    def fail(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), str(self))

    return fail


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(("write", "content"), [(write_text, "new"), (write_bytes, b"new")])
def test_an_earlier_file_stays_where_the_new_one_does_not_fit(
    write: Callable[..., None], content: Any, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old", encoding="utf-8")
    with monkeypatch.context() as patch:
        for name in ("write_text", "write_bytes", "unlink"):  # what tidies up fails as well
            patch.setattr(Path, name, failing(number))
        with pytest.raises(DataError, match=f"{path.name}.*{os.strerror(number)}"):
            write(path, content)
    assert path.read_text(encoding="utf-8") == "old"


def test_a_figure_that_does_not_fit_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures" / "a.png"
    save(canvas(1, 1), path)
    earlier = path.read_bytes()
    assert earlier.startswith(b"\x89PNG")
    monkeypatch.setattr(Path, "write_bytes", failing(errno.ENOSPC))
    with pytest.raises(DataError, match="No space left"):
        save(canvas(2, 2), path)
    assert path.read_bytes() == earlier


@pytest.mark.parametrize(
    ("error", "fragment"),
    [(DataError("Cannot write x."), "write x"), (MemoryError(), "memory"), (TypeError("odd\nmore"), "TypeError: odd")],
)
def test_what_spoils_a_figure_is_one_warning(error: Exception, fragment: str, caplog: pytest.LogCaptureFixture) -> None:

    def draw() -> None:
        raise error

    with spared("gate_maps"):
        draw()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "gate_maps" in record.getMessage() and fragment in record.getMessage()
    assert "\n" not in record.getMessage()


def logged(logger: RunLogger, step: int, **metrics: float) -> None:
    logger.log_metrics(dict(metrics), step)
    logger.save()


@pytest.mark.parametrize("new_column", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
def test_no_row_of_the_log_is_lost_or_half_written(
    new_column: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = RunLogger(str(tmp_path))
    logged(logger, 1, loss=0.5)
    path = tmp_path / "metrics.csv"
    earlier = path.read_text(encoding="utf-8")
    with monkeypatch.context() as patch:

        def writerows(self: csv.DictWriter[str], rows: Any) -> None:
            self.writerow({})  # some of it is on the disk
            raise OSError(number, os.strerror(number), str(path))

        patch.setattr(csv.DictWriter, "writerows", writerows)
        with pytest.raises(DataError, match=f"metrics.csv.*{os.strerror(number)}.*ckpt_path last"):
            logged(logger, 2, **({"loss": 0.4, "nll": 3.0} if new_column else {"loss": 0.4}))
    assert path.read_text(encoding="utf-8") == earlier
    logger.save()  # the disk has room again: nothing that was logged is missing
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "0.5"), ("2", "0.4")]
    assert not new_column or rows[1]["nll"] == "3.0"


def test_a_training_outlives_its_figures_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", full)
    run = tmp_path / "run"
    small = ["--trainer.max_steps", "2", "--data.init_args.num_train", "16", "--data.init_args.num_test", "8"]
    main(["fit", "--config", str(SMOKE), "--run", str(run), *small])
    told = [record.getMessage() for record in caplog.records if "figure" in record.getMessage()]
    assert {name for name in ("loss_curves", "gate_maps", "captions") if any(name in line for line in told)} == {
        "loss_curves",
        "gate_maps",
        "captions",
    }
    assert all("No space left" in line for line in told)
    assert "test/nll/nll" in json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert [environment[stage]["outcome"] for stage in ("fit", "test")] == ["finished", "finished"]
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_metrics_that_cannot_be_written_end_a_training_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))

    run = tmp_path / "run"

    def full(self: ExperimentWriter) -> None:
        if (run / "checkpoints" / "last.ckpt").is_file():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ExperimentWriter, "save", full)
    small = [
        "--trainer.max_steps",
        "3",
        "--checkpoint_every",
        "1",
        "--data.init_args.num_train",
        "16",
        "--test_after_fit",
        "false",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(SMOKE), "--run", str(run), *small])
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("visexpert: Cannot write") and "metrics.csv" in last and "No space left" in last
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("cut", ["row", "header", "zeros"])
def test_a_row_that_a_kill_cut_spoils_no_other(cut: str, tmp_path: Path) -> None:
    """The next start goes on behind the last whole row."""
    logger = RunLogger(str(tmp_path))
    for step in (1, 2):
        logged(logger, step, loss=0.5, nll=step)
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes()
    path.write_bytes({"row": whole[:-3], "header": whole[:4], "zeros": whole + bytes(512)}[cut])
    logged(RunLogger(str(tmp_path)), 3, loss=0.25, nll=3)
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    expected = {"row": ["1", "3"], "header": ["3"], "zeros": ["1", "2", "3"]}[cut]
    assert [row["step"] for row in rows] == expected and rows[-1]["loss"] == "0.25" and rows[-1]["nll"] == "3"
