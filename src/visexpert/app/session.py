"""What the page does, without the page: one image and one prompt to the answers of all models at hand."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from visexpert.app.overlay import Pixels, gate_overlay
from visexpert.captioning import Captioner
from visexpert.data import read_image
from visexpert.errors import DataError, UserError
from visexpert.io.run_files import read_json
from visexpert.report.palette import colors
from visexpert.runs import load_run

MAX_PIXELS = 16_000_000
"""Largest image that the page decodes (48 MB as RGB): it answers strangers' files, too."""

COST = "cost/gflop_vision"
BESIDE = ("detached", "merged")
"""Runs inside a run's folder that are shown beside it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One model that answers.

    Args:
        name: What the page calls it.
        captioner: The model.
        gflop: Cost of its vision side per image, where its run has measured it.
    """

    name: str
    captioner: Captioner
    gflop: float | None


@dataclass(frozen=True)
class Reply:
    """What the page shows.

    Args:
        text: The chosen model's answer.
        overlay: Its gate over the image, uint8 (H, W, 3); None without a gate.
        rows: Name, answer and cost of each model, the chosen one first.
        note: What the user should know about the prompt; mostly empty.
    """

    text: str
    overlay: Pixels | None
    rows: tuple[tuple[str, str, str], ...]
    note: str


class Session:
    """Answers for the page.

    Args:
        models: The run's own model first, then those to compare it with.
        max_pixels: Largest image that is decoded.
    """

    def __init__(self, models: Sequence[Model], *, max_pixels: int = MAX_PIXELS) -> None:
        self.main, self.others = models[0], tuple(models[1:])
        self.max_pixels = max_pixels

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts that can be switched off."""
        return self.main.captioner.experts

    def ask(self, path: str | Path, prompt: str, experts: Collection[str]) -> Reply:
        """Let every model answer.

        Args:
            path: An image file.
            prompt: The question.
            experts: Those that the run's own model may listen to.

        Raises:
            DataError: The image cannot be read or has too many pixels, or the prompt is too long.
            ConfigError: An expert that the run does not use.
        """
        path, captioner = Path(path), self.main.captioner
        try:
            image_CHW = read_image(path, max_pixels=self.max_pixels)
        except DataError as error:  # where the upload lies is nobody's business
            raise DataError(str(error).replace(str(path), path.name)) from error
        answer = captioner.answer([captioner.frame(image_CHW)], prompt, experts=experts)[0]
        rows = [(_chosen(self.main, answer.experts), answer.text, _cost(self.main, answer.experts))]
        for model in (self.main, *self.others) if len(answer.experts) < len(self.experts) else self.others:
            other = model.captioner
            text = other.answer([other.frame(image_CHW)], prompt)[0].text
            rows.append((_chosen(model, other.experts), text, _cost(model, other.experts)))
        overlay = None
        if answer.gates_HWK is not None:
            own = dict(zip(self.experts, colors(len(self.experts)), strict=True))  # of its own, whoever else is off
            overlay = gate_overlay(answer.image_HW3, answer.gates_HWK, {name: own[name] for name in answer.experts})
        unknown = captioner.unknown_words(prompt)
        note = f"The vocabulary lacks: {', '.join(unknown)}. The model reads <unk> instead." if unknown else ""
        return Reply(answer.text, overlay, tuple(rows), note)


def open_session(run: Path, *, device: str | None = None, max_pixels: int = MAX_PIXELS) -> Session:
    """Open a finished run, and the detached and merged ones inside its folder, where there are any.

    Raises:
        ConfigError: ``run`` is no run.
        WeightsError: Its checkpoint cannot be read.
    """
    models = [_model(None, run, device)]
    for name in BESIDE:
        if not (run / name / "config.yaml").is_file():
            continue
        try:
            models.append(_model(name, run / name, device))
        except UserError as error:
            log.warning("The %s run is left out: %s", name, error)
    return Session(models, max_pixels=max_pixels)


def _model(name: str | None, run: Path, device: str | None) -> Model:
    """A run to answer; by the name of its method, where it has no other."""
    saved = load_run(run)
    captioner, name = Captioner(saved, device=device), name or type(saved.model).__name__
    metrics = run / "metrics.json"
    measured = read_json(metrics) if metrics.is_file() else {}
    gflop = measured.get(COST) if isinstance(measured, dict) else None
    return Model(name if captioner.experts or name == "merged" else "this run", captioner, gflop)


def _chosen(model: Model, experts: Sequence[str]) -> str:
    if not model.captioner.experts:
        return f"{model.name}: CLIP alone"
    if len(experts) == len(model.captioner.experts):
        return f"{model.name}: all of its {len(experts)} experts"
    return f"{model.name}: {', '.join(experts) or 'no expert'}"


def _cost(model: Model, experts: Sequence[str]) -> str:
    if model.gflop is None:
        return "not measured"
    if len(experts) == len(model.captioner.experts):
        return f"{model.gflop:.3f}"
    return f"below {model.gflop:.3f}"
