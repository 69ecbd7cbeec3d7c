"""One ablation run: what make/ablations.mk calls, and what the results pages share with it.

    python -m benchmarks.ablations movekd fixed --seed 0 --scale default

The configuration is the method's base, the overlays that the first line of NAME's file asks for ("# After a, b: ..."),
NAME itself, then the scale; `base` has no overlay. A hybrid starts from ToVE's run of the same seed and scale. An
interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.runs import STOPPED, Run, run_here

CONFIGS = Path("configs")
BASES = {
    "tove": ("tove/tabletop.yaml", "tove/tabletop/from-grounded.yaml"),
    "movekd": ("movekd/tabletop-stage2.yaml", "movekd/one-stage.yaml"),
    "hybrid": ("movekd/tabletop-stage2.yaml", "movekd/one-stage.yaml"),
}
OWN_BASES = {("hybrid", "merge-into-mole"): BASES["tove"]}
"""Of overlays that lie over another method's base."""

FOLDERS = {"tove": "tove/ablations", "movekd": "movekd/ablations", "hybrid": "hybrid"}
"""Where the overlays of each method lie."""

STARTS = {
    "gate-weighted": ("base", "checkpoints/last.ckpt"),
    "from-merged": ("merge", "merged/checkpoints/last.ckpt"),
}
"""Run of ToVE that a hybrid starts from, and the checkpoint in it (make/ablations.mk knows the order, too)."""

SCALES = ("smoke", "default", "full")
ROOT = Path("runs/ablations")
AFTER = re.compile(r"# After ([a-z0-9, -]+):")
FAILED = "failed"
"""File with the last line of a run that failed."""


def main() -> None:
    """Run it; exit 1 where it fails, 130 or 143 where a signal stops it, which is no failure: it goes on next time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(BASES))
    parser.add_argument("name", help="base, or an overlay of configs/METHOD/ablations or configs/hybrid, without .yaml")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("--scale", choices=SCALES, default="default", help="length of the runs (default: default)")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"folder of the runs (default: {ROOT})")
    options = parser.parse_args()
    known = names(options.method)
    if options.name not in known:
        parser.error(f"there is no ablation {options.name!r} of {options.method}; use one of {', '.join(known)}")
    run = run_of(options.method, options.name, seed=options.seed, scale=options.scale, root=options.root)
    print(f"ablation {run.variant}, seed {run.seed} ({options.scale}) -> {run.folder}", flush=True)
    failed = run.folder / FAILED
    failed.unlink(missing_ok=True)
    code = run_here(run)
    if code in STOPPED:
        print(f"stopped: {run.variant}, seed {run.seed}: the same command goes on with it", file=sys.stderr)
        sys.exit(code)
    if code:
        reason = (run.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
        failed.write_text(reason + "\n", encoding="utf-8")
        sys.exit(f"failed: {run.variant}, seed {run.seed}: {reason} (all of it: {run.folder / 'log.txt'})")


def names(method: str) -> list[str]:
    """Ablations of a method, the base first."""
    base = [] if method == "hybrid" else ["base"]
    return [*base, *sorted(path.stem for path in (CONFIGS / FOLDERS[method]).glob("*.yaml"))]


def overlays(method: str, name: str) -> list[Path]:
    """Files of an ablation in the order in which they are laid over the base."""
    if name == "base":
        return []
    folder = CONFIGS / FOLDERS[method]
    found = AFTER.match((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    before = [other.strip() for other in found[1].split(",")] if found else []
    return [folder / f"{other}.yaml" for other in (*before, name)]


def run_of(method: str, name: str, *, seed: int, scale: str, root: Path = ROOT) -> Run:
    """The run of one ablation and seed."""
    base = OWN_BASES.get((method, name), BASES[method])
    files = [CONFIGS / file for file in base] + overlays(method, name) + [CONFIGS / "scales" / f"{scale}.yaml"]
    start: tuple[str, ...] = ()
    if method == "hybrid" and name in STARTS:
        run, checkpoint = STARTS[name]
        start = ("--model.init_args.init_from", str(root / scale / "tove" / run / f"seed{seed}" / checkpoint))
    arguments = (
        "fit", *(part for file in files for part in ("--config", str(file))),
        "--seed_everything", str(seed), "--data.init_args.seed", "0", "--model.init_args.evaluation.meteor=false",
        *start,
    )  # fmt: skip
    return Run(root / scale / method / name / f"seed{seed}", arguments, seed, f"{method}/{name}")


if __name__ == "__main__":
    main()
