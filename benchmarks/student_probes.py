"""Measure what a trained student's own tokens contain, before the projector: probes, teachers' tokens, variance.

    python -m benchmarks.student_probes RUN...

Writes RUN/probes.json and prints it. Ridge probes are fitted on the first half of 600 test images and scored on the
second. Standardized probes read information at any scale; raw probes have one fixed penalty in units of the initial
CLIP's variance, so that tokens that shrink score lower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from visexpert.grids import resample_tokens
from visexpert.losses import across_image_variance
from visexpert.metrics.tokens import TokenProbes, cell_targets, ridge_r2
from visexpert.runs import SavedRun, load_run
from visexpert.tabletop import TinyExpert
from visexpert.types import Batch
from visexpert.vision import ClipEncoder

IMAGES = 600
TEACHERS = ("semantic", "depth", "normals", "edges", "segmentation")
RAW_PENALTY = 0.1
"""Penalty of raw probes, as a share of the initial CLIP's mean variance per channel."""

FILE = "probes.json"


def main() -> None:
    """Probe the runs that have no probes.json yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs on Tabletop")
    parser.add_argument("--again", action="store_true", help="also probe runs that have probes.json")
    options = parser.parse_args()
    table = Table("score", *("/".join(folder.resolve().parts[-2:]) for folder in options.runs))
    table.columns[0].no_wrap = True
    columns = [ensure(folder, again=options.again) for folder in tqdm(options.runs, unit="run")]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(f"{column[name]:.3f}" if name in column else "–" for column in columns))
    Console().print(table)


def ensure(folder: Path, *, again: bool = False) -> Mapping[str, float]:
    """Return the probes of a run, computed if they are missing or if ``again``."""
    path = folder / FILE
    if again or not path.is_file():
        scores = probe(load_run(folder))
        path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    loaded: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@torch.no_grad()
def probe(run: SavedRun) -> dict[str, float]:
    """Return scores by name: ``probe/...``, ``raw/...``, ``teacher/NAME`` (R2), ``variance`` across images, and
    ``variance_between``, its share of the variance around the mean token, near 0 if all images get the same tokens.
    """
    clip = run.model.clip
    assert isinstance(clip, ClipEncoder)
    batches = _images(run)
    tokens = torch.cat([clip(batch.images_01()).tokens_BTD for batch in batches])
    probes = TokenProbes(max_images=IMAGES)
    start = 0
    for batch in batches:
        probes.update(tokens[start : start + len(batch)], clip.grid_hw, batch.targets)
        start += len(batch)
    scores = {f"probe/{name}": value for name, value in probes.compute().items()}
    scores |= _raw(tokens, [cell_targets(batch.targets, clip.grid_hw) for batch in batches])
    fit_N, evaluate_N = _halves(tokens)
    for name in TEACHERS:
        target = _teacher(name, run, clip.grid_hw).flatten(0, 1)
        scores[f"teacher/{name}"] = ridge_r2(tokens.flatten(0, 1), target, fit_N=fit_N, evaluate_N=evaluate_N)
    variance = float(across_image_variance(tokens))
    return {**scores, "variance": variance, "variance_between": variance / float(tokens.flatten(0, 1).var(0).mean())}


def _raw(tokens_BTD: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return R2 of depth and object depth with probes that are sensitive to scale."""
    features_NE = tokens_BTD.flatten(0, 1).double()
    fit_N, evaluate_N = _halves(tokens_BTD)
    depth_N1 = torch.cat([part["depth"] for part in targets]).flatten(0, 1).double()
    object_N = torch.cat([part["object"] for part in targets]).flatten()
    scores = {}
    for name, where_N in (("depth", torch.ones_like(fit_N)), ("object_depth", object_N)):
        x_NE, y_N1 = features_NE[fit_N & where_N], depth_N1[fit_N & where_N]
        mean_E, bias = x_NE.mean(0), y_N1.mean(0)
        x_NE = x_NE - mean_E
        gram_EE = x_NE.T @ x_NE / len(x_NE) + RAW_PENALTY * _scale() * torch.eye(x_NE.shape[1], dtype=x_NE.dtype)
        weight_E1 = torch.linalg.solve(gram_EE, x_NE.T @ (y_N1 - bias) / len(x_NE))
        held_N = evaluate_N & where_N
        truth_N1 = depth_N1[held_N]
        error = truth_N1 - ((features_NE[held_N] - mean_E) @ weight_E1 + bias)
        scores[f"raw/{name}"] = float(1 - error.square().sum() / (truth_N1 - truth_N1.mean(0)).square().sum())
    return scores


def _halves(tokens_BTD: Tensor) -> tuple[Tensor, Tensor]:
    image_N = torch.arange(len(tokens_BTD)).repeat_interleave(tokens_BTD.shape[1])
    first_N = image_N < len(tokens_BTD) // 2
    return first_N, ~first_N


_BATCHES: dict[int, list[Batch]] = {}


def _images(run: SavedRun) -> list[Batch]:
    """The first test images; the same for all runs, which differ in nothing that they depend on."""
    if not _BATCHES:
        run.data.prepare_data()
        run.data.setup("test")
        found: list[Batch] = []
        for batch in run.data.test_dataloader():
            found.append(batch)
            if sum(map(len, found)) >= IMAGES:
                break
        found[-1] = _cut(found[-1], IMAGES - sum(map(len, found[:-1])))
        _BATCHES[0] = found
    return _BATCHES[0]


def _cut(batch: Batch, size: int) -> Batch:
    return Batch(
        images_BCHW=batch.images_BCHW[:size],
        index_B=batch.index_B[:size],
        split=batch.split,
        targets={name: value[:size] for name, value in batch.targets.items()},
    )


_TEACHERS: dict[str, Tensor] = {}


def _teacher(name: str, run: SavedRun, grid_hw: tuple[int, int]) -> Tensor:
    if name not in _TEACHERS:
        expert = TinyExpert(source=f"zoo:{name}")
        expert.load_weights()
        expert.eval()
        tokens = [resample_tokens(expert(b.images_01()).tokens_BSE, expert.grid_hw, grid_hw) for b in _images(run)]
        _TEACHERS[name] = torch.cat(tokens)
    return _TEACHERS[name]


@cache
def _scale() -> float:
    """Mean variance of the start CLIP's channels over the test images."""
    clip = ClipEncoder(source="zoo:clip", layer=-2)
    clip.load_weights()
    tokens = torch.cat([clip.eval()(batch.images_01()).tokens_BTD for batch in _BATCHES[0]])
    return float(tokens.flatten(0, 1).var(0).mean())


if __name__ == "__main__":
    main()
