"""Run an export in a fresh process and compare it with its model."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from visexpert.errors import WeightsError
from visexpert.export import reload
from visexpert.export.fidelity import CheckInputs, check_inputs, check_levels, compare, difference, equal_ids, levels
from visexpert.export.llava import CONVERSATION, PromptCheck, check_prompt, check_text
from visexpert.export.reload import BATCHES
from visexpert.export.rounding import computing_in_float32
from visexpert.export.source import LOGITS, ExportSource, Format, layer_name, reference_outputs
from visexpert.vision import VisionEncoder, decision_margins
from visexpert.vision.saving import prepares_squares

log = logging.getLogger(__name__)

HEARTBEAT = 10.0
"""Seconds between log messages while the fresh process runs."""


@dataclass(frozen=True)
class Fidelity:
    """Result of a reload.

    Args:
        outputs: Differences by output (see :class:`~visexpert.export.fidelity.Difference`).
        levels: Largest difference of preprocessing in levels of 0-255, by image; empty if the format has none.
        tolerance: Limit of ``relative``.
        versions: Library versions of the fresh process.
        num_images: Number of images compared.
        rounding: Differences, by output, between the model with rounded and with original weights, both computing in
            float32; empty if nothing was rounded.
        prompt: How the processor frames a question; None if the format has none.
    """

    outputs: dict[str, dict[str, float]]
    levels: dict[str, float]
    tolerance: float
    versions: dict[str, str]
    num_images: int = sum(BATCHES)
    prompt: PromptCheck | None = None
    rounding: dict[str, dict[str, float]] = field(default_factory=dict)


def verify(source: ExportSource, name: str, form: Format, folder: Path, *, tolerance: float) -> Fidelity:
    """Reload ``folder`` in a fresh process and compare all outputs.

    Args:
        source: What was exported.
        name: Name of the format.
        form: The format.
        folder: The export.
        tolerance: Largest allowed error, relative to the root mean square of the reference.

    Raises:
        WeightsError: The export does not load, or differs.
    """
    clip, inputs = source.clip, check_inputs(source.clip.image_size)
    with computing_in_float32(source, source.dtype):
        check = _check(source, form, inputs)
    results, versions = _fresh_process(name, folder, check.tensors, check.facts)
    if LOGITS in results:  # tokens that the export added come last
        results[LOGITS] = results[LOGITS][..., : check.reference[LOGITS].shape[-1]]
        equal_ids(results["input_ids"], check.tensors["input_ids"][:1], what=name)
    found = {
        key: levels(results[key], _expected(source, photo), clip.std) for key, photo in _photos(source, form, inputs)
    }
    check_levels(found, what=name)
    rows, reference = _decided(clip, inputs.images_BCHW), check.reference
    if len(rows) < len(inputs.images_BCHW):
        results = {key: value[rows] if key in reference else value for key, value in results.items()}
        reference = {key: value[rows] for key, value in reference.items()}
    compared = compare(results, reference, tolerance=tolerance, what=name)
    rounding = _rounding(source, form, inputs, check.reference)
    return Fidelity(compared, found, tolerance, versions, len(rows), _prompt(source, results), rounding)


def _rounding(
    source: ExportSource, form: Format, inputs: CheckInputs, rounded: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Return the differences that rounding the weights made; empty if they were not rounded."""
    if source.dtype in (None, torch.float32):
        return {}
    with computing_in_float32(source, None):
        exact = _check(source, form, inputs).reference
    return {name: asdict(difference(rounded[name], value)) for name, value in exact.items()}


def _prompt(source: ExportSource, results: Mapping[str, Tensor]) -> PromptCheck | None:
    """Check how the processor of the reloaded folder frames a question."""
    if "prompt" not in results or source.language is None:
        return None
    text = bytes(results["prompt"].tolist()).decode()
    image_id = check_text(source.language.tokenizer).image_id
    return check_prompt(source.language.encoder, text, results["prompt_ids"].tolist(), image_id=image_id)


UNDECIDED = 2e-6
"""Margin of the best expert's probability below which rounding may choose another expert. On a random ViT-B/16 with
MoLE, merging weights changes probabilities by up to 2.4e-7; the smallest margin of an image is 1e-5 to 1e-4."""


def _decided(clip: VisionEncoder, images_BCHW: Tensor) -> Tensor:
    """Return the rows to compare: those with a clear choice of every router, else the one with the largest margin."""
    margins_B = decision_margins(clip, images_BCHW)
    rows = (margins_B >= UNDECIDED).nonzero()[:, 0]
    return rows if len(rows) else margins_B.argmax()[None]


@dataclass(frozen=True)
class _Check:
    """Inputs of the fresh process and the outputs that it must give."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    reference: dict[str, Tensor]


@torch.no_grad()
def _check(source: ExportSource, form: Format, inputs: CheckInputs) -> _Check:
    pixels_BCHW = source.clip.preprocess(inputs.images_BCHW)
    layers = {layer_name(layer): layer for layer in source.layers}
    known = reference_outputs(source, pixels_BCHW)
    reference = {key: known[key] for key in (*layers, *form.outputs) if key in known}
    tensors: dict[str, Tensor] = {"pixel_values": pixels_BCHW} | dict(_photos(source, form, inputs))
    facts: dict[str, Any] = {"layers": layers}
    if LOGITS not in form.outputs:
        return _Check(tensors, facts, reference)
    assert source.language is not None
    text = check_text(source.language.tokenizer)
    num_image = source.clip.grid_hw[0] * source.clip.grid_hw[1]
    batch = len(pixels_BCHW)
    tensors["input_ids"] = torch.tensor([[text.image_id] * num_image + list(text.ids)]).repeat(batch, 1)
    reference[LOGITS] = source.language.logits(inputs.images_BCHW, torch.tensor([text.ids]).repeat(batch, 1))
    return _Check(
        tensors, {**facts, "text": text.prompt, "num_image_tokens": num_image, "conversation": CONVERSATION}, reference
    )


def _photos(source: ExportSource, form: Format, inputs: CheckInputs) -> list[tuple[str, Tensor]]:
    """Return the images for the image processor, unless it makes patches of images of any shape."""
    compared = form.preprocesses and prepares_squares(source.clip.model)
    return [*inputs.photos.items(), *inputs.noise.items()] if compared else []


def _expected(source: ExportSource, photo_HWC: Tensor) -> Tensor:
    return source.clip.preprocess(photo_HWC.permute(2, 0, 1)[None].float() / 255.0)


def _fresh_process(
    name: str, folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="visexpert-export-") as scratch:
        inputs, outputs = Path(scratch) / "inputs.safetensors", Path(scratch) / "outputs.safetensors"
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, inputs, metadata={"facts": json.dumps(facts)})
        command = [sys.executable, "-I", str(reload.__file__), name, str(folder.resolve()), str(inputs), str(outputs)]
        _wait(command, name, Path(scratch) / "log.txt", cwd=scratch)
        with safe_open(outputs, "pt") as file:
            versions = json.loads(file.metadata()["versions"])
            return {key: file.get_tensor(key).clone() for key in file.keys()}, versions


def _wait(command: list[str], name: str, errors: Path, *, cwd: str) -> None:
    """Run a command to its end, with a log message now and then."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with errors.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=cwd, env=environment)
        seconds = 0.0
        try:
            while True:
                try:
                    code = process.wait(HEARTBEAT)
                    break
                except subprocess.TimeoutExpired:
                    seconds += HEARTBEAT
                    log.info("%s: reloading in a fresh process, %.0f s so far", name, seconds)
        finally:
            process.kill()
            process.wait()
    if code != 0:
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else f"exit code {code}"
        raise WeightsError(f"The {name} export does not load in a fresh process ({last[:300]}); nothing was written.")
