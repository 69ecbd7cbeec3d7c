"""Measure what training does to the alignment with the text tower, and what keeping it costs, on Tabletop.

    python -m benchmarks.text_alignment run [--seeds 0 1 2]   # resumes; finished runs are not repeated
    python -m benchmarks.text_alignment page                  # writes docs/results/text-alignment.md

Short runs: STEPS optimizer steps on 2,000 scenes, from the shipped CLIP. The gain is the rise of the mean score of
ridge probes (depth, normals, object depth, color, shape, size, material) on the encoder's tokens. Results of validation
and of test scenes are both stored; the weight is chosen on validation scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch
from torch import Tensor

from visexpert.language import CrossAttentionDecoder, NoLanguage
from visexpert.language.base import ProjectorSettings
from visexpert.methods import MergeStudent, Merging, Method, MoVEKD, ToVE
from visexpert.methods.alignment import text_alignment
from visexpert.methods.settings import (
    AuxiliarySettings,
    HeadSettings,
    MergeSettings,
    MergingOptimizer,
    MoVEKDOptimizer,
    ToVEOptimizer,
    WeightingSettings,
)
from visexpert.metrics.tokens import TokenProbes
from visexpert.tabletop import TabletopData, TinyExpert
from visexpert.tabletop.text_tower import CLASSES, TabletopTextTower
from visexpert.vision import ClipEncoder, MoLESettings, VisionEncoder

OUT = Path("docs/results/text-alignment.json")
PAGE = Path("docs/results/text-alignment.md")
TEACHER_STEPS, STEPS = 150, 150
WEIGHTS = (0.0, 0.3, 1.0)
RECIPES = ("MoVE-KD, MoLE alone (stage 1)", "MoVE-KD, full", "merging, full", "merging, LoRA", "merging, MoLE")
EXPERTS = ("semantic", "depth", "normals", "edges", "segmentation")
SPLITS = ("val", "test")
COLUMNS = {
    "image_to_text/R@1": "image to text R@1",
    "text_to_image/R@1": "text to image R@1",
    "image_to_text/R@10": "image to text R@10",
    "text_to_image/R@10": "text to image R@10",
    "zero_shot": "zero-shot",
    "probes": "mean probe",
}
GOAL_SCORES = ("image_to_text/R@1", "text_to_image/R@1", "zero_shot")
LOST, KEPT = 1.0, 80.0  # the goal: at most so many points lost, at least so many percent of the gain kept
Results = Mapping[str, Mapping[str, float]]  # scores by "RECIPE | WEIGHT | SEED", and of "CLIP"


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--weights", type=float, nargs="+", choices=WEIGHTS, default=WEIGHTS)
    options = parser.parse_args()
    if options.what == "page":
        PAGE.write_text(page(_read()), encoding="utf-8")
        return
    torch.set_num_threads(1)
    for seed in options.seeds:
        for weight in options.weights:
            for recipe in options.recipes:
                _run(recipe, weight, seed)


def _run(recipe: str, weight: float, seed: int) -> None:
    name = f"{recipe} | {weight:g} | {seed}"
    if "CLIP" not in _read():
        _write("CLIP", scores(ClipEncoder(source="zoo:clip", layer=-2)))
    if name in _read():
        return
    start = time.monotonic()
    model = student(recipe, weight, seed)
    _fit(model, seed, STEPS)
    seconds = time.monotonic() - start
    if isinstance(model, Merging):
        model.merged()
    _write(name, scores(model.clip) | {"seconds": seconds})
    print(name, f"{seconds:.0f} s", flush=True)


def student(recipe: str, weight: float, seed: int) -> Method:
    """Return the method of a recipe, ready to train."""
    L.seed_everything(seed, verbose=False)
    mole = MoLESettings(num_experts=3, rank=32, init="identity")
    if recipe.startswith("MoVE-KD"):
        full = recipe.endswith("full")
        return MoVEKD(
            clip=ClipEncoder(source="zoo:clip", layer=-2, mole=None if full else mole),
            experts=_experts(),
            language=NoLanguage(),
            heads=HeadSettings(alignment="to_teacher"),
            weighting=WeightingSettings(clip_teacher_weight=0.3, teachers="uniform", tokens="uniform"),
            kd_weight=0.5,
            lm_weight=0.0,
            auxiliary=AuxiliarySettings(keep_pooled=weight),
            optimizer=MoVEKDOptimizer(
                lr=2e-3, mole_lr=6e-3, clip_lr=6e-3 if full else 0.0, language_lr=0.0, warmup_steps=15
            ),
        )
    teacher = _teacher(seed)
    L.seed_everything(seed, verbose=False)
    return Merging(
        teacher=teacher,
        student=MergeStudent(mole=mole) if recipe.endswith("MoLE") else None,
        merging=MergeSettings(adaptation="lora" if recipe.endswith("LoRA") else "full", keep_pooled=weight),
        optimizer=MergingOptimizer(lr=5e-3, warmup_steps=15),
    )


@cache
def _trained(seed: int) -> Mapping[str, Tensor]:
    model = _tove(seed)
    _fit(model, seed, TEACHER_STEPS)
    return {key: value.clone() for key, value in model.state_dict().items()}


def _teacher(seed: int) -> ToVE:
    """Return ToVE with five experts, trained once per seed."""
    state = _trained(seed)
    model = _tove(seed)
    model.load_weights()
    model.load_state_dict(dict(state))
    model.mark_loaded()
    return model


def _tove(seed: int) -> ToVE:
    L.seed_everything(seed, verbose=False)
    sizes: dict[str, Any] = {"vocab_size": 96, "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2}
    return ToVE(
        clip=ClipEncoder(source="zoo:clip", layer=-2),
        experts=_experts(),
        language=CrossAttentionDecoder(**sizes, position_scale=0.7, source="zoo:language.safetensors"),
        adapter_hidden=128,
        projector=ProjectorSettings(),
        optimizer=ToVEOptimizer(warmup_steps=15),
    )


def _experts() -> dict[str, Any]:
    return {name: TinyExpert(source=f"zoo:{name}") for name in EXPERTS}


def _data(seed: int) -> TabletopData:
    return TabletopData(num_train=2000, num_val=500, num_test=500, batch_size=16, order_seed=seed)


def _fit(model: Method, seed: int, steps: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    trainer.fit(model, datamodule=_data(seed))


@torch.no_grad()
def scores(encoder: VisionEncoder) -> dict[str, float]:
    """Return alignment and mean probe score on validation and test scenes, by ``SPLIT/NAME``."""
    encoder.read_on_first_use(torch.device("cpu"))
    encoder.eval()
    found: dict[str, float] = {}
    for split in SPLITS:
        images, captions, truth, targets = _scenes(split)
        labels = {name: TabletopTextTower.class_text(name) for name in CLASSES}
        tower = TabletopTextTower("zoo:clip")
        own = text_alignment(encoder, tower, images, captions, labels, truth)
        probes = TokenProbes(max_images=len(images))
        for start in range(0, len(images), 100):
            part = slice(start, start + 100)
            tokens = encoder(images[part].float() / 255).tokens_BTD
            probes.update(tokens, encoder.grid_hw, {name: value[part] for name, value in targets.items()})
        own["probes"] = mean(probes.compute().values())
        found |= {f"{split}/{name}": value for name, value in own.items()}
    return found


@cache
def _scenes(split: str) -> tuple[Tensor, list[list[str]], list[str], dict[str, Tensor]]:
    data = TabletopData(num_train=2000, num_val=500, num_test=500, with_targets=True)
    graphs = data.split_cache(split).graphs
    batches = list(data.image_dataloader(split, batch_size=100))
    images = torch.cat([batch.images_BCHW for batch in batches])
    names = batches[0].targets
    targets = {name: torch.cat([batch.targets[name] for batch in batches]) for name in names}
    return images, [[graph.caption] for graph in graphs], [graph.label for graph in graphs], targets


def page(results: Results) -> str:
    """Return both tables and the goal as Markdown, with the findings from ``text-alignment.notes.md``."""
    weight = chosen_weight(results)
    notes = PAGE.with_suffix(".notes.md")
    parts = [
        INTRO,
        "## Test scenes\n",
        _table(results, "test"),
        "\n## The goal, on test scenes\n",
        GOAL_TEXT.format(weight=weight),
        _goal_table(results, weight),
        "",
        notes.read_text(encoding="utf-8") if notes.is_file() else "",
        "## Validation scenes\n",
        _table(results, "val"),
        "",
    ]
    return "\n".join(parts)


def chosen_weight(results: Results) -> float:
    """Return the weight that reaches the goal in most recipes on validation scenes; of equals, what keeps more gain."""

    def rank(weight: float) -> tuple[int, float]:
        kept = [_mean_kept(results, recipe, weight, "val") for recipe in RECIPES]
        reached = sum(goal_reached(results, recipe, weight, "val") is True for recipe in RECIPES)
        return reached, mean([value for value in kept if value is not None] or [0.0])

    return max((weight for weight in WEIGHTS if weight > 0), key=rank)


def goal_reached(results: Results, recipe: str, weight: float, split: str) -> bool | None:
    """Return whether at most LOST points are lost in each score and at least KEPT % of the gain stays; None unknown."""
    losses = [mean(lost(results, recipe, weight, split, name)) for name in GOAL_SCORES if _of(results, recipe, weight)]
    kept = _mean_kept(results, recipe, weight, split)
    if not losses or kept is None:
        return None
    return max(losses) <= LOST and kept >= KEPT


def lost(results: Results, recipe: str, weight: float, split: str, name: str) -> list[float]:
    """Return what each seed's run lost of a score of CLIP, in points; negative where it won."""
    key = f"{split}/{name}"
    return [100 * (results["CLIP"][key] - run[key]) for run in _of(results, recipe, weight).values()]


def gain_kept(results: Results, recipe: str, weight: float, split: str) -> tuple[list[float], list[float]]:
    """Return the gains in the mean probe with a weight and without, in points, of the seeds that both have."""
    runs, plain = _of(results, recipe, weight), _of(results, recipe, 0.0)
    key, shared = f"{split}/probes", sorted(set(runs) & set(plain))
    base = results["CLIP"][key]
    return [100 * (runs[seed][key] - base) for seed in shared], [100 * (plain[seed][key] - base) for seed in shared]


def _mean_kept(results: Results, recipe: str, weight: float, split: str) -> float | None:
    with_weight, without = gain_kept(results, recipe, weight, split)
    if not without or mean(without) <= 0:
        return None
    return 100 * mean(with_weight) / mean(without)


def _table(results: Results, split: str) -> str:
    lines = [
        f"| recipe | `keep_pooled` | seeds | {' | '.join(COLUMNS.values())} | gain kept, % |",
        "|---|---:|---:" + "|---:" * (len(COLUMNS) + 1) + "|",
    ]
    base = results["CLIP"]
    cells = [f"{100 * base[f'{split}/{name}']:.1f}" for name in COLUMNS]
    lines.append(f"| CLIP, before | – | – | {' | '.join(cells)} | – |")
    for recipe in RECIPES:
        for weight in WEIGHTS:
            runs = _of(results, recipe, weight)
            if not runs:
                continue
            cells = [_cell([100 * run[f"{split}/{name}"] for run in runs.values()]) for name in COLUMNS]
            kept = _mean_kept(results, recipe, weight, split) if weight > 0 else None
            last = "–" if kept is None else f"{kept:.0f}"
            lines.append(f"| {recipe} | {weight:g} | {len(runs)} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def _goal_table(results: Results, chosen: float) -> str:
    heads = " | ".join(f"{COLUMNS[name]}, lost" for name in GOAL_SCORES)
    lines = [
        f"| recipe | `keep_pooled` | {heads} | gain in mean probe | gain kept, % | goal |",
        "|---|---:" + "|---:" * (len(GOAL_SCORES) + 2) + "|---|",
    ]
    for recipe in RECIPES:
        for weight in (0.0, chosen):
            if not _of(results, recipe, weight):
                continue
            losses = " | ".join(_cell(lost(results, recipe, weight, "test", name)) for name in GOAL_SCORES)
            gains, _ = gain_kept(results, recipe, weight, "test")
            kept, reached = _mean_kept(results, recipe, weight, "test"), goal_reached(results, recipe, weight, "test")
            said = {True: "reached", False: "missed", None: "–"}[reached]
            lines.append(
                f"| {recipe} | {weight:g} | {losses} | {_cell(gains) if gains else '–'} "
                f"| {'–' if kept is None else f'{kept:.0f}'} | {said} |"
            )
    return "\n".join(lines)


def _of(results: Results, recipe: str, weight: float) -> dict[str, Mapping[str, float]]:
    start = f"{recipe} | {weight:g} | "
    return {name.removeprefix(start): scores for name, scores in results.items() if name.startswith(start)}


def _cell(values: list[float]) -> str:
    # Adding 0 makes -0.0 plain.
    return f"{round(mean(values), 1) + 0.0:.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _read() -> dict[str, dict[str, float]]:
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}


def _write(name: str, values: Mapping[str, float]) -> None:
    known = _read()  # two processes may run: each reads again before it writes
    rounded = {key: round(value, 4) for key, value in values.items()}
    part = OUT.with_suffix(f".{os.getpid()}")
    part.write_text(_lines(known | {name: rounded}), encoding="utf-8")
    part.replace(OUT)


def _lines(results: Results) -> str:
    """Return results as JSON, a run per line."""
    rows = (f"{json.dumps(name)}: {json.dumps(scores)}" for name, scores in sorted(results.items()))
    return "{\n" + ",\n".join(rows) + "\n}\n"


INTRO = f"""# What happens to text alignment

Printed by `python -m benchmarks.text_alignment page`. **Short runs**: {STEPS} steps of 16 images on 2,000 Tabletop
scenes from the shipped CLIP (layer -2), after {TEACHER_STEPS} steps of ToVE where something is merged. MoVE-KD learns
from the five shipped experts and the frozen CLIP (.3), without text; *MoLE alone* trains adapters and leaves CLIP's
weights, *full* trains CLIP's weights and has no MoLE. ToVE itself is not here: its CLIP is frozen by default, so that
it loses nothing.

Scores on 500 scenes in %, mean ± standard deviation over seeds, through the shipped text tower. One caption per
scene names its largest objects (four at most); equal captions of several scenes match all of them (chance at R@1: 0.2).
Zero-shot: color and shape of the object with the most visible pixels, 24 classes. *Mean probe*: ridge probes on the
tokens (depth, normals, object depth, color, shape, size, material). *Gain kept*: rise of the mean probe over CLIP's, as
a share of the rise at `keep_pooled: 0` and the same seeds.
"""

GOAL_TEXT = f"""At most {LOST:g} point lost of R@1, both ways, and of zero-shot accuracy, at {KEPT:g} % of the gain
or more, in the mean over seeds. The weight, {{weight:g}}, is the one that reaches this in most recipes on validation
scenes (of equals, what keeps more of the gain). Negative losses are rises.
"""


if __name__ == "__main__":
    main()
