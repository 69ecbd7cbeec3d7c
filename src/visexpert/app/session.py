"""What the page shows, without its layout: examples, and every model's answer to one image and one prompt."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray
from PIL import Image

from visexpert.captioning import Captioner
from visexpert.data import read_image
from visexpert.errors import DataError, UserError
from visexpert.io.run_files import read_json
from visexpert.report.figures import gate_figure
from visexpert.report.palette import Floats, as_written
from visexpert.report.world import training_sets, warning_for
from visexpert.runs import load_run

MAX_PIXELS = 16_000_000
"""Largest image that the page decodes (48 MB as RGB), since anyone may upload files."""

COST = "cost/gflop_vision"
BESIDE = ("detached", "merged")
"""Runs inside a run's folder that are shown beside it."""

log = logging.getLogger(__name__)

Pixels: TypeAlias = NDArray[np.uint8]


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
    def warning(self) -> str:
        """Which images the run's own model knows, and what it does with others; empty where its data is unknown."""
        return warning_for(training_sets(self.main.captioner.run.config))

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
        except DataError as error:  # the message must not show where uploads are kept
            raise DataError(str(error).replace(str(path), path.name)) from error
        answer = captioner.answer([captioner.frame(image_CHW)], prompt, experts=experts)[0]
        rows = [(_chosen(self.main, answer.experts), answer.text, _cost(self.main, answer.experts))]
        for model in (self.main, *self.others) if len(answer.experts) < len(self.experts) else self.others:
            other = model.captioner
            text = other.answer([other.frame(image_CHW)], prompt)[0].text
            rows.append((_chosen(model, other.experts), text, _cost(model, other.experts)))
        overlay = None
        if answer.gates_HWK is not None:
            overlay = gate_overlay(answer.image_HW3, answer.gates_HWK, answer.experts)
        unknown = captioner.unknown_words(prompt)
        note = f"The vocabulary lacks: {', '.join(unknown)}. The model reads <unk> instead." if unknown else ""
        return Reply(answer.text, overlay, tuple(rows), note)


def open_session(run: Path, *, device: str | None = None, max_pixels: int = MAX_PIXELS) -> Session:
    """Open a finished run, and the detached and merged ones inside its folder, where there are any.

    Raises:
        ConfigError: ``run`` is not a run.
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
        return f"{model.name}: encoder alone"
    if len(experts) == len(model.captioner.experts):
        return f"{model.name}: all of its {len(experts)} experts"
    return f"{model.name}: {', '.join(experts) or 'no expert'}"


def _cost(model: Model, experts: Sequence[str]) -> str:
    if model.gflop is None:
        return "not measured"
    if len(experts) == len(model.captioner.experts):
        return f"{model.gflop:.3f}"
    return f"below {model.gflop:.3f}"


def gate_overlay(image_HW3: Floats, gates_HWK: Floats, names: Sequence[str]) -> Pixels:
    """Draw the image and one map of each expert's gate, as :func:`~visexpert.report.figures.gate_figure` does.

    Args:
        image_HW3: RGB in [0, 1].
        gates_HWK: Gate weights per token on their own grid; they sum to 1 over K.
        names: K expert names in the gate's order.

    Returns:
        uint8 RGB, (H, W, 3).
    """
    figure = gate_figure(image_HW3[None], gates_HWK[None], names)
    as_written(figure)
    drawing: Any = FigureCanvasAgg(figure)  # typed in part
    drawing.draw()
    return np.asarray(drawing.buffer_rgba())[..., :3].copy()


def example_prompts(captioner: Captioner) -> tuple[str, ...]:
    """Prompts that the run's data offers to show; none where it offers none."""
    return tuple(getattr(captioner.run.data, "example_prompts", ()))


def write_examples(captioner: Captioner, folder: Path, *, count: int = 4) -> list[Path]:
    """Write images that the run's data offers to show into PNG files; none where it offers none."""
    make = getattr(captioner.run.data, "example_images", None)
    images = [] if make is None else make(count)
    paths = [folder / f"example{index + 1}.png" for index in range(len(images))]
    for path, pixels_HW3 in zip(paths, images, strict=True):
        Image.fromarray(pixels_HW3.numpy()).save(path)
    return paths
