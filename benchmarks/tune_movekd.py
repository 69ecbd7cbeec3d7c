"""Rates and weight of distillation for `make results-movekd`, on the validation scenes of seed 0.

    python -m benchmarks.tune_movekd

Writes docs/results/movekd-tune.md. The test scenes are not looked at. A finished trial is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.ablations import run_of
from benchmarks.runs import Run, execute

OUT = Path("docs/results/movekd-tune.md")
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
"""Ablation, rate of the student, weight of the distillation loss, by folder."""

SCORES = {
    "val/nll/kind/dense": "dense NLL",
    "val/vqa/accuracy": "VQA",
    "val/vsr/accuracy": "VSR",
    "val/pope/adversarial/accuracy": "POPE adv.",
}
INTRO = """# Rates and weight of distillation, on validation scenes

Written by `python -m benchmarks.tune_movekd`: seed 0, 1000 steps of 12 images, 500 validation scenes, one run a line.
The language side learns at 1e-3 (6e-4 beside a student at 1e-3). Each kind of row of
[movekd-tabletop.md](movekd-tabletop.md) has the best rate that was tried for it; the distilled ones stand at the upper
end of what was tried.
"""


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tune-movekd"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    options = parser.parse_args()
    trials = {name: _trial(options.runs, name) for name in TRIALS}
    execute(list(trials.values()), jobs=options.jobs)
    lines = [f"| kind | rate | weight of KD | {' | '.join(SCORES.values())} |", f"|---|---|---|{'---:|' * len(SCORES)}"]
    for name, run in trials.items():
        if run.done:
            kind, rate, weight = TRIALS[name]
            scores = run.metrics()
            cells = [kind, rate, weight or "–", *(f"{scores[key]:.3f}" for key in SCORES)]
            lines.append(f"| {' | '.join(cells)} |")
    OUT.write_text("\n".join([INTRO, *lines, ""]), encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


def _trial(root: Path, name: str) -> Run:
    kind, rate, weight = TRIALS[name]
    settings = {"clip_lr": rate, "mole_lr": rate, "language_lr": "6e-4" if rate == "1e-3" else "1e-3"}
    if weight is not None:
        settings["kd_weight"] = weight
    extra = ["--trainer.max_steps", "1000", "--trainer.val_check_interval", "1000", "--test_after_fit", "false"]
    extra += [f"--model.init_args.{key}={value}" for key, value in settings.items()]
    return Run(root / name, (*run_of("movekd", kind, seed=0, scale="full").arguments, *extra), 0, name)


if __name__ == "__main__":
    main()
