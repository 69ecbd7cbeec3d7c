"""Run one ablation, as make/ablations.mk and the results pages do.

    python -m benchmarks.ablations movekd fixed --seed 0 --scale default

The configuration is the method's base, then the overlays that benchmarks/ablations.yaml lists before NAME, then NAME
itself, then the scale; `base` has no overlay. A hybrid starts from ToVE's run of the same seed and scale. An
interrupted run resumes from its last checkpoint. `--show` prints the `visexpert fit` command instead.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.runs import STOPPED, Run, run_here

CONFIGS = Path("configs")
MATRIX: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
"""By method: the files of the base, the folder of the overlays, and what some rows need besides their own file."""

SCALES = ("smoke", "default", "full")
ROOT = Path("runs/ablations")
FAILED = "failed"
"""File with the last line of a run that failed."""


def main() -> None:
    """Run the ablation; exit with 1 if it fails, with 130 or 143 if a signal stops it (the next call resumes it)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(MATRIX))
    parser.add_argument("name", help="base, or an overlay of configs/METHOD/ablations or configs/hybrid, without .yaml")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("--scale", choices=SCALES, default="default", help="length of the runs (default: default)")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"folder of the runs (default: {ROOT})")
    parser.add_argument("--show", action="store_true", help="print the command and run nothing")
    options = parser.parse_args()
    known = names(options.method)
    if options.name not in known:
        parser.error(f"there is no ablation {options.name!r} of {options.method}; use one of {', '.join(known)}")
    run = run_of(options.method, options.name, seed=options.seed, scale=options.scale, root=options.root)
    if options.show:
        print(shlex.join(("visexpert", *run.arguments, "--run", str(run.folder))))
        return
    print(f"ablation {run.variant}, seed {run.seed} ({options.scale}) -> {run.folder}", flush=True)
    failed = run.folder / FAILED
    failed.unlink(missing_ok=True)
    code = run_here(run)
    if code in STOPPED:
        print(f"stopped: {run.variant}, seed {run.seed}; repeat the command to resume it", file=sys.stderr)
        sys.exit(code)
    if code:
        reason = (run.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
        failed.write_text(reason + "\n", encoding="utf-8")
        sys.exit(f"failed: {run.variant}, seed {run.seed}: {reason} (full log: {run.folder / 'log.txt'})")


def names(method: str) -> list[str]:
    """Return the ablations of a method, the base first."""
    base = [] if method == "hybrid" else ["base"]
    return [*base, *sorted(path.stem for path in (CONFIGS / MATRIX[method]["folder"]).glob("*.yaml"))]


def overlays(method: str, name: str) -> list[Path]:
    """Return the files of an ablation in the order in which they override the base."""
    if name == "base":
        return []
    before = MATRIX[method].get("after", {}).get(name, [])
    return [CONFIGS / MATRIX[method]["folder"] / f"{other}.yaml" for other in (*before, name)]


def base_of(method: str, name: str = "base") -> list[Path]:
    """Return the files that the overlays of an ablation override."""
    owner = MATRIX[method].get("bases", {}).get(name, method)
    return [CONFIGS / file for file in MATRIX[owner]["base"]]


def run_of(method: str, name: str, *, seed: int, scale: str, root: Path = ROOT) -> Run:
    """Return the run of one ablation and seed."""
    files = [*base_of(method, name), *overlays(method, name), CONFIGS / "scales" / f"{scale}.yaml"]
    start: tuple[str, ...] = ()
    if name in MATRIX[method].get("starts", {}):
        run, checkpoint = MATRIX[method]["starts"][name]
        start = ("--model.init_args.init_from", str(root / scale / "tove" / run / f"seed{seed}" / checkpoint))
    arguments = (
        "fit",
        *(part for file in files for part in ("--config", str(file))),
        "--seed_everything",
        str(seed),
        "--data.init_args.seed",
        "0",
        "--model.init_args.evaluation.meteor=false",
        *start,
    )
    return Run(root / scale / method / name / f"seed{seed}", arguments, seed, f"{method}/{name}")


if __name__ == "__main__":
    main()
