"""Tune rates and weight of distillation for `make results-movekd`, on the validation scenes of seed 0.

    python -m benchmarks.tune_movekd

Writes docs/results/movekd-tune.md. Test scenes are not used. Finished trials are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.ablations import run_of
from benchmarks.results import OUT, trial_table
from benchmarks.runs import Run, execute, slug

PAGE = OUT / "movekd-tune.md"
TRIALS: dict[str, tuple[str, str, str | None]] = {
    "text-1e-3": ("text-only", "1e-3", None),
    "text-3e-3": ("text-only", "3e-3", None),
    "text-6e-3": ("text-only", "6e-3", None),
    "kd-1e-3": ("base", "1e-3", "2.0"),
    "kd-3e-3": ("base", "3e-3", "2.0"),
    "kd-6e-3": ("base", "6e-3", "2.0"),
    "kd-3e-3-half": ("base", "3e-3", "0.5"),
    "kd-6e-3-half": ("base", "6e-3", "0.5"),
    "paper-3e-3": ("paper-form", "3e-3", "0.5"),
    "paper-6e-3": ("paper-form", "6e-3", "0.5"),
}
"""Ablation, rate of the student and weight of the distillation loss, by folder."""

FIXED: dict[str, dict[str, str]] = {
    "weight .5, five teachers, CLIP at .3": {},
    "weight .2": {"kd_weight": "0.2"},
    "weight 1": {"kd_weight": "1.0"},
    "depth and normals": {"use": "[depth, normals]"},
    "normals": {"use": "[normals]"},
    "CLIP at .1": {"weighting.clip_teacher_weight": "0.1"},
    "CLIP no teacher": {"weighting.clip_teacher_weight": "null"},
    "CLIP at .1, weight .2": {"weighting.clip_teacher_weight": "0.1", "kd_weight": "0.2"},
    "CLIP at .1, depth and normals": {"weighting.clip_teacher_weight": "0.1", "use": "[depth, normals]"},
    "CLIP at .1, depth and normals, token weights by attention": {
        "weighting.clip_teacher_weight": "0.1",
        "use": "[depth, normals]",
        "weighting.tokens": "attention",
    },
    "CLIP at .1, rate 1e-2": {"weighting.clip_teacher_weight": "0.1", "optimizer.clip_lr": "1e-2"},
    "heads (to_teacher), CLIP at .3": {"heads.alignment": "to_teacher"},
    "heads (to_teacher), CLIP at .1": {"heads.alignment": "to_teacher", "weighting.clip_teacher_weight": "0.1"},
    "heads (to_teacher), CLIP at .1, depth and normals": {
        "heads.alignment": "to_teacher",
        "weighting.clip_teacher_weight": "0.1",
        "use": "[depth, normals]",
    },
    "heads (to_teacher), CLIP no teacher": {"heads.alignment": "to_teacher", "weighting.clip_teacher_weight": "null"},
}
"""Settings of direction fixed without MoLE, at the rate of the base: one changed at a time, then with the best ones."""

FIRST_STEPS = {300: 830, 600: 650}
"""Steps of distillation alone, and steps on text after them, in about the time of 1000 steps on text: one step takes
.58 of the time of one on text (`python -m benchmarks.movekd_step`)."""

SCORES = {
    "val/nll/kind/dense": "dense NLL",
    "val/vqa/accuracy": "VQA",
    "val/vsr/accuracy": "VSR",
    "val/pope/adversarial/accuracy": "POPE adv.",
}
INTRO = """# Rates and weight of distillation, on validation scenes

Written by `python -m benchmarks.tune_movekd`: seed 0, 1000 steps of 12 images, 500 validation scenes, one run per line.
The language model learns at 1e-3 (6e-4 with a student at 1e-3). Each kind of row in
[movekd-tabletop.md](movekd-tabletop.md) uses the best rate that was tried for it; for heads this is the highest rate
tried, for fixed maps it is not (1e-2, below, is worse).
"""


FIXED_INTRO = """
## Direction fixed, without MoLE

The same scenes and steps, at the rate of the base (6e-3): one setting changed at a time, then with the best of them.
*Distilled first*: steps of distillation alone, without a language model, and then of text alone, in about the time of
1000 steps on text.
"""


def main() -> None:
    """Do the missing trials and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tune-movekd"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel (default: 2)")
    options = parser.parse_args()
    rates = {name: _rate_trial(options.runs, name) for name in TRIALS}
    fixed = {
        title: _trial(options.runs / slug(f"fixed {title}"), "fixed-no-mole", more) for title, more in FIXED.items()
    }
    starts = {steps: _trial(options.runs / f"distilled-{steps}", "distil-fixed", {}, steps) for steps in FIRST_STEPS}
    after = {steps: _after(options.runs, steps, run) for steps, run in starts.items()}
    for runs in (rates, fixed, starts, after):
        execute(list(runs.values()), jobs=options.jobs)
    lines = [
        INTRO,
        *trial_table(["kind", "rate", "weight of KD"], [(_cells(name), run) for name, run in rates.items()], SCORES),
    ]
    named = [*fixed.items(), *((f"distilled first, {a} + {b} steps", after[a]) for a, b in FIRST_STEPS.items())]
    lines += [FIXED_INTRO, *trial_table(["setting"], [([title], run) for title, run in named], SCORES)]
    PAGE.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def _cells(name: str) -> list[str]:
    kind, rate, weight = TRIALS[name]
    return [kind, rate, weight or "–"]


def _rate_trial(root: Path, name: str) -> Run:
    kind, rate, weight = TRIALS[name]
    settings = {
        "optimizer.clip_lr": rate,
        "optimizer.mole_lr": rate,
        "optimizer.language_lr": "6e-4" if rate == "1e-3" else "1e-3",
    }
    if weight is not None:
        settings["kd_weight"] = weight
    return _trial(root / name, kind, settings)


def _after(root: Path, steps: int, first: Run) -> Run:
    start = {"init_from": str(first.folder / "checkpoints" / "last.ckpt")}
    return _trial(root / f"distilled-{steps}-then-text", "text-only", start, FIRST_STEPS[steps])


def _trial(folder: Path, kind: str, settings: Mapping[str, str], steps: int = 1000) -> Run:
    extra = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps), "--test_after_fit", "false"]
    extra += [f"--model.init_args.{key}={value}" for key, value in settings.items()]
    return Run(folder, (*run_of("movekd", kind, seed=0, scale="full").arguments, *extra), 0, folder.name)


if __name__ == "__main__":
    main()
