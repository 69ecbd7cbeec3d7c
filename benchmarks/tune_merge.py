"""Tune rate and length of merging, and the rate of its controls, on the validation scenes of one base run.

    python -m benchmarks.tune_merge

Writes docs/results/merge-tune.md. Test scenes are not used. Finished trials are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.results import OUT, trial_table
from benchmarks.results_merge import TEXT
from benchmarks.results_tove import BASE, OVERLAYS
from benchmarks.runs import Run, execute

TRIALS: dict[str, list[str]] = {
    "tokens, 2000 steps, rate 2e-3": ["--optimizer.lr", "2e-3"],
    "tokens, 2000 steps, rate 4e-3": ["--optimizer.lr", "4e-3"],
    "tokens, 2000 steps, rate 8e-3": ["--optimizer.lr", "8e-3"],
    "tokens, 3000 steps, rate 4e-3": ["--optimizer.lr", "4e-3", "--steps", "3000"],
    "text, decoder frozen, 2000 steps, rate 1e-3": [*TEXT, "--optimizer.lr", "1e-3"],
    "text, decoder frozen, 2000 steps, rate 4e-3": [*TEXT, "--optimizer.lr", "4e-3"],
}
FRESH = {f"text, CLIP and a fresh decoder, 2900 steps, rate {rate}": rate for rate in ("1e-3", "2e-4")}
SCORES = {"val/nmse": "NMSE", "val/nll/kind/dense": "dense NLL", "val/vqa/accuracy": "VQA", "val/vsr/accuracy": "VSR"}


def main() -> None:
    """Do the missing trials and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/results-tove/grounded/all-five-experts/seed0"))
    parser.add_argument("--runs", type=Path, default=Path("runs/tune-merge"), help="folder of the other runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel (default: 2)")
    options = parser.parse_args()
    trials = [_merge(options.base, name, extra) for name, extra in TRIALS.items()]
    trials += [_fresh(options.runs, name, rate) for name, rate in FRESH.items()]
    execute(trials, jobs=options.jobs)
    lines = trial_table(["trial"], [([trial.variant], trial) for trial in trials], SCORES)
    text = "\n".join([INTRO, *lines, ""])
    (OUT / "merge-tune.md").write_text(text, encoding="utf-8")
    print(text)


INTRO = """# Rates of merging and of its controls, on validation scenes

Written by `python -m benchmarks.tune_merge`: one base run (seed 0), 500 validation scenes, one run per line.
The settings of [merge.md](merge.md) lie between those of the lines: 2500 steps at 5e-3 for tokens, and for text with
ToVE's decoder.
"""


def _merge(base: Path, name: str, extra: list[str]) -> Run:
    folder = "tune-" + "-".join(part.lstrip("-") for part in extra)
    options = ["--eval_every", "1000", "--test", "false", *extra, "--name", folder]
    return Run(base / folder, ("merge", str(base), *options), 0, name)


def _fresh(runs: Path, name: str, rate: str) -> Run:
    arguments = (
        "fit",
        "--config",
        BASE,
        "--config",
        str(OVERLAYS / "clip-only.yaml"),
        "--model.init_args.optimizer.clip_lr",
        rate,
        "--trainer.max_steps",
        "2900",
        "--trainer.val_check_interval",
        "725",
        "--seed_everything",
        "0",
        "--data.init_args.seed",
        "0",
        "--test_after_fit",
        "false",
    )
    return Run(runs / f"fresh-{rate}", arguments, 0, name)


if __name__ == "__main__":
    main()
