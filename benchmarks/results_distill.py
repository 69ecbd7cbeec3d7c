"""Measure what agglomerative encoders add to plain distillation: `make results-distill` writes its page.

    python -m benchmarks.results_distill --jobs 2

Every student is the shipped CLIP, distilled from the five shipped experts without any text, for the same number of
steps on the same images; rows of plain distillation with more steps take as much CPU time as a dearer variant. Probes
are fitted on the first half of the validation scenes and scored on the second; test scenes are not used. Interrupted
runs resume, and finished ones are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.results import Page, Table
from benchmarks.runs import Run, add_arguments, execute, slug
from visexpert.grids import resample_tokens
from visexpert.metrics.neighbors import knn_accuracy
from visexpert.metrics.tokens import CLASS_TARGETS, TokenProbes, cell_targets, ridge_r2
from visexpert.report import Column, ResultRow
from visexpert.runs import SavedRun, load_run
from visexpert.tabletop import TabletopData
from visexpert.types import Batch

ROOT = Path("runs/distill")
STEPS, BATCH, SCENES = 250, 12, 1000
GFLOP = 0.044
"""Of the student's forward pass, per image; the same for all rows."""

PROBES, OTHER_SIZES = "probes-val.json", "probes-sizes.json"
SIDES = (48, 96)
"""Image sizes besides the student's own that it is probed at."""

CLOCK, CLOCK_STEPS, CLOCK_SKIPPED = "cpu.json", 40, 4


def longer(steps: int) -> dict[str, str]:
    """Return the settings of plain distillation for more steps."""
    return {"trainer.max_steps": str(steps), "trainer.val_check_interval": str(steps)}


PLAIN = "plain: MSE, standardized by channel"
LIVE = "plain, teachers live"
SIZES = "image sizes 48, 64, 96"
SHIFT = "shifted by 1 patch"
WITH_CLIP = "plain, CLIP at .2"
ROWS: dict[str, dict[str, str]] = {
    PLAIN: {},
    "plain, 295 steps": longer(295),
    "plain, 313 steps": longer(313),
    "plain, 792 steps": longer(792),
    "PHI-S": {"heads.standardize": "phi_s"},
    "relations": {"agglomeration.relations": "3.0"},
    "relations, asymmetric": {"agglomeration.relations": "3.0", "agglomeration.relation_form": "asymmetric"},
    "teachers dropped at .5": {"agglomeration.drop": "0.5"},
    "losses balanced": {"agglomeration.balance": "running_mean"},
    SIZES: {"agglomeration.image_sizes": "[48, 64, 96]"},
    SHIFT: {"agglomeration.shift": "1", "store.folder": "null"},
    WITH_CLIP: {"weighting.clip_teacher_weight": "0.2"},
    "CLIP at .2, summary": {"weighting.clip_teacher_weight": "0.2", "agglomeration.summary": "1.0"},
}
"""Settings by title: those with a dot whose first word is ``trainer`` as they are, others of the model."""

AT_OTHER_SIZES = [PLAIN, SIZES]
"""Rows that are also probed at other image sizes."""

COLUMNS = [
    Column("knn/object", "kNN, objects", digits=1, scale=100, better="max"),
    Column("linear/object", "linear, objects", digits=1, scale=100, better="max"),
    Column("dense/depth", "depth", digits=1, scale=100, better="max"),
    Column("dense/object_depth", "object depth", digits=1, scale=100, better="max"),
    Column("dense/normals", "normals", digits=1, scale=100, better="max"),
    Column("cls/content", "content by [CLS]", digits=1, scale=100, better="max"),
    Column("cpu/train_seconds", "CPU s (training)", digits=0),
]
SIZED = [
    column
    for side in SIDES
    for column in (
        Column(f"linear/object@{side}", f"linear, objects, {side} px", digits=1, scale=100, better="max"),
        Column(f"dense/object_depth@{side}", f"object depth, {side} px", digits=1, scale=100, better="max"),
        Column(f"agreement@{side}", f"agreement, {side} px", digits=1, scale=100, better="max"),
    )
]


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--report_only", action="store_true", help="write the page from finished runs")
    parser.add_argument("--clock_only", action="store_true", help="measure the CPU time of the variants, and end")
    options = parser.parse_args()
    if not options.report_only:
        execute(clock_runs(options.seeds), jobs=options.jobs)
    if options.clock_only:
        for title, settings in CLOCKED.items():
            if (seconds := cpu_per_step(settings)) is not None:
                print(f"{seconds * 1e3:7.1f} ms a step: {title}")
        return
    runs = distill_runs(options.seeds)
    if not options.report_only:
        execute(runs, jobs=options.jobs)
    rows = [row_of(run) for run in tqdm([run for run in runs if run.done], desc="probes", unit="run")]
    page().write(rows)


def distill_runs(seeds: Sequence[int]) -> list[Run]:
    """Return the runs, seed by seed, so that an interruption leaves whole comparisons."""
    return [
        Run(ROOT / slug(title) / f"seed{seed}", arguments(settings, seed), seed, title)
        for seed in seeds
        for title, settings in ROWS.items()
    ]


CLOCKED = {title: settings for title, settings in ROWS.items() if "trainer.max_steps" not in settings}
CLOCKED |= {LIVE: {"store.folder": "null"}}
"""What a step of each variant costs; that of plain distillation is the same however many there are."""


def clock_runs(seeds: Sequence[int]) -> list[Run]:
    """Return short runs that measure CPU time, one variant after the other and all of them once per seed."""
    return [clock_run(title, settings, seed) for seed in seeds for title, settings in CLOCKED.items()]


def clock_run(title: str, settings: Mapping[str, str], seed: int) -> Run:
    """Return the short run of one variant."""
    short = {**settings, "trainer.max_steps": str(CLOCK_STEPS), "trainer.limit_val_batches": "0"}
    given = (*arguments(short, seed), "--trainer.callbacks+=benchmarks.results_distill.Clock")
    return Run(ROOT / "clock" / slug(title) / f"seed{seed}", given, seed, title)


class Clock(Callback):
    """Writes the mean CPU time of a training step, of all threads of the process; the first steps do not count."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if batch_idx + 1 == CLOCK_SKIPPED:
            self.begun = time.process_time()
        if batch_idx + 1 == CLOCK_STEPS:
            mean = (time.process_time() - self.begun) / (CLOCK_STEPS - CLOCK_SKIPPED)
            Path(trainer.default_root_dir, CLOCK).write_text(json.dumps({"seconds": mean}) + "\n", encoding="utf-8")


def cpu_per_step(settings: Mapping[str, str]) -> float | None:
    """Return the CPU seconds of a step: the least of the repeats, which other work on the machine disturbed least."""
    own = {key: value for key, value in settings.items() if not key.startswith("trainer.")}
    title = next(title for title, clocked in CLOCKED.items() if clocked == own)
    files = (ROOT / "clock" / slug(title)).glob(f"seed*/{CLOCK}")
    return min((float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) for path in files), default=None)


def arguments(settings: Mapping[str, str], seed: int) -> tuple[str, ...]:
    """Return the arguments of one run: a plain CLIP and heads to five teachers, changed by ``settings``."""
    model = {"clip.init_args.mole": "null", "auxiliary.balance_weight": "0", "weighting.clip_teacher_weight": "null"}
    others = {"trainer.max_steps": str(STEPS), "trainer.val_check_interval": str(STEPS)}
    for key, value in settings.items():
        (others if key.startswith("trainer.") else model)[key] = value
    return (
        *("fit", "--config", "configs/movekd/encoder-only.yaml", "--seed_everything", str(seed)),
        *("--data.init_args.seed", "0", "--data.init_args.batch_size", str(BATCH)),
        *("--data.init_args.num_val", str(SCENES), "--test_after_fit", "false"),
        *(f"--model.init_args.{key}={value}" for key, value in model.items()),
        *(f"--{key}={value}" for key, value in others.items()),
    )


def row_of(run: Run) -> ResultRow:
    """Return a finished run as a row, with its probes."""
    settings = ROWS[run.variant]
    scores = kept(run.folder / PROBES, lambda: probe(load_run(run.folder)))
    if run.variant in AT_OTHER_SIZES:
        scores |= kept(run.folder / OTHER_SIZES, lambda: probe_sizes(load_run(run.folder)))
    steps = int(settings.get("trainer.max_steps", STEPS))
    parameters = int(scores.pop("parameters"))
    if (seconds := cpu_per_step(settings)) is not None:
        scores["cpu/train_seconds"] = steps * seconds
    speed = run.metrics().get("train/images_per_s", 0.0)
    return ResultRow(run.variant, run.seed, steps, parameters, GFLOP, speed, scores)


def kept(path: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the scores in a file, computed first if it is not there."""
    if not path.is_file():
        path.write_text(json.dumps(compute(), indent=2) + "\n", encoding="utf-8")
    scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return scores


@torch.no_grad()
def probe_sizes(run: SavedRun) -> dict[str, float]:
    """Return scores of the student's tokens at other image sizes, with probes of their own.

    ``agreement``: mean cosine of the tokens, resampled to the grid of the own size, and those at the own size.
    """
    clip, scores = run.model.clip.eval(), {}
    for side in SIDES:
        batches, alike = _validation(run), []
        probes = TokenProbes(max_images=SCENES)
        for batch in batches:
            own_BTD = clip(batch.images_01()).tokens_BTD
            with clip.at_size(side):
                seen = clip(batch.images_01())
            probes.update(seen.tokens_BTD, seen.grid_hw, batch.targets)
            resampled_BTD = resample_tokens(seen.tokens_BTD, seen.grid_hw, clip.grid_hw)
            alike.append(torch.nn.functional.cosine_similarity(own_BTD, resampled_BTD, dim=-1).mean(1))
        linear = probes.compute()
        scores[f"linear/object@{side}"] = fmean(linear[name] for name in CLASS_TARGETS)
        scores[f"dense/object_depth@{side}"] = linear["object_depth"]
        scores[f"agreement@{side}"] = float(torch.cat(alike).mean())
    return scores


@torch.no_grad()
def probe(run: SavedRun) -> dict[str, float]:
    """Return scores of the student's tokens on validation scenes, and the number of trained parameters."""
    clip, found = run.model.clip.eval(), []
    for batch in _validation(run):
        seen = clip(batch.images_01())
        assert seen.cls_BD is not None
        found.append((batch, seen.tokens_BTD, seen.cls_BD))
    tokens_BTD, cls_BD = torch.cat([part[1] for part in found]), torch.cat([part[2] for part in found])
    probes = TokenProbes(max_images=len(tokens_BTD))
    for batch, part_BTD, _ in found:
        probes.update(part_BTD, clip.grid_hw, batch.targets)
    linear = probes.compute()
    cells = _cells([batch for batch, _, _ in found], clip.grid_hw)
    trained = {id(p): p.numel() for g in run.model.trained_groups() for m in g.modules for p in m.parameters()}
    return {
        "knn/object": fmean(_neighbors(tokens_BTD, cells, name) for name in CLASS_TARGETS),
        "linear/object": fmean(linear[name] for name in CLASS_TARGETS),
        **{f"dense/{name}": linear[name] for name in ("depth", "object_depth", "normals")},
        "cls/content": _content(cls_BD, cells),
        "parameters": sum(trained.values()),
    }


_BATCHES: list[Batch] = []


def _validation(run: SavedRun) -> list[Batch]:
    """Return the validation scenes with their ground truth; the same for all runs."""
    if not _BATCHES:
        assert isinstance(run.data, TabletopData)
        run.data.with_targets = True
        run.data.prepare_data()
        run.data.setup("validate")
        _BATCHES.extend(run.data.image_dataloader("val", batch_size=50))
    return _BATCHES


def _cells(batches: Sequence[Batch], grid_hw: tuple[int, int]) -> dict[str, Tensor]:
    parts = [cell_targets(batch.targets, grid_hw) for batch in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _neighbors(tokens_BTD: Tensor, cells: Mapping[str, Tensor], name: str) -> float:
    """Return the accuracy of the nearest object tokens of other images, by cosine."""
    half = len(tokens_BTD) // 2
    first_BT, second_BT = cells["object"][:half], cells["object"][half:]
    return knn_accuracy(
        tokens_BTD[half:][second_BT],
        [str(label) for label in cells[name][half:][second_BT].tolist()],
        train_MD=tokens_BTD[:half][first_BT],
        train_labels=[str(label) for label in cells[name][:half][first_BT].tolist()],
    )


def _content(cls_BD: Tensor, cells: Mapping[str, Tensor]) -> float:
    """Return the R2 of a ridge probe from [CLS] to how many tokens of an image show each color, shape and material."""
    counts = []
    for name in ("colour", "shape", "material"):
        one_hot_BTC = torch.nn.functional.one_hot(cells[name]).float() * cells["object"][..., None]
        counts.append(one_hot_BTC.sum(1))
    first_B = torch.arange(len(cls_BD)) < len(cls_BD) // 2
    return ridge_r2(cls_BD, torch.cat(counts, dim=1), fit_N=first_B, evaluate_N=~first_B)


def page() -> Page:
    """Return the page."""
    at_own = Table(f"{STEPS} steps of {BATCH} images", list(ROWS), [("", COLUMNS)])
    at_others = Table("At other image sizes", AT_OTHER_SIZES, [("", SIZED)])
    return Page("distill", [at_own, at_others])


if __name__ == "__main__":
    main()
