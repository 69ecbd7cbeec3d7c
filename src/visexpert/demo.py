"""``visexpert demo``: CLIP-only and ToVE, trained at equal steps from the same start, scored side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visexpert.commands.ending import Ending
from visexpert.commands.parser import Parser
from visexpert.shipped import shipped

if TYPE_CHECKING:
    from rich.table import Table

CONFIGS = ("tove/tabletop", "tove/demo")
SMOKE = "scales/smoke"
START = "zoo:language.safetensors"

SCORES = {
    "test/nll/kind/dense": ("NLL per token of dense captions (lower is better)", 1.0, -1),
    "test/vqa/accuracy": ("questions right, %", 100.0, 1),
    "test/vqa/family/distance": ("  how far? %", 100.0, 1),
    "test/vqa/family/size": ("  how large? %", 100.0, 1),
    "test/vsr/accuracy": ("spatial statements judged right, %", 100.0, 1),
    "test/pope/adversarial/accuracy": ("adversarial 'is there a ...?', %", 100.0, 1),
    "test/caption/relation": ("generated captions that are true, %", 100.0, 1),
    "cost/gflop_vision": ("vision GFLOP per image", 1.0, 0),
}


def run(arguments: list[str]) -> Ending:
    """Train and score both models, then say what came out."""
    options = parser().parse_args(arguments)
    from rich.console import Console

    from visexpert.interruption import stoppable
    from visexpert.io.run_files import read_json
    from visexpert.tabletop.zoo.ship import CARDS
    from visexpert.training import run_lightning  # heavy: after --help

    console, started = Console(), time.perf_counter()
    configs = (*CONFIGS, SMOKE) if options.smoke else CONFIGS
    base = [argument for name in configs for argument in ("--config", str(shipped(name)))]
    if options.steps is not None:
        base += ["--trainer.max_steps", str(options.steps), "--trainer.val_check_interval", str(options.steps)]
    folders = {"CLIP only": options.run / "clip-only", "ToVE": options.run / "tove"}
    for name, folder in folders.items():
        console.rule(f"{name}: from {START}")
        extra = ["--model.init_args.use=[]"] if name == "CLIP only" else []
        with stoppable(go_on="the same command begins it anew"):  # the demo has no --ckpt_path
            run_lightning(["fit", *base, *extra, "--run", str(folder), "--overwrite"])
    if options.smoke:
        console.print("The scores of --smoke mean nothing: they tell that everything runs.")
    scores = {name: read_json(folder / "metrics.json") for name, folder in folders.items()}
    console.print(comparison(scores))
    console.print(
        f"Both start from {START}, a language model that was trained on other scenes (its card: "
        f"{CARDS / 'language.json'}); adapters, gate and projector are new. Most of the scores "
        "rests on that start and on the shipped encoders, the difference between the columns on the experts."
    )
    made = f"{options.run}, figures in {folders['ToVE'] / 'figures'} ({time.perf_counter() - started:.0f} s in all)"
    return Ending(made, (("caption", folders["ToVE"], "IMAGE"), ("merge", folders["ToVE"])))


def comparison(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """One line per score, one column per model; the better one in green."""
    from rich.table import Table

    table = Table("on held-out scenes", *scores, title="CLIP alone against CLIP with experts")
    for key, (label, scale, better) in SCORES.items():
        values = [model[key] for model in scores.values()]
        best = max(values, key=lambda value: better * value) if better else None
        cells = [f"{value * scale:.3g}" for value in values]
        table.add_row(label, *(f"[green]{c}[/green]" if v == best else c for c, v in zip(cells, values, strict=True)))
    return table


def parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(
        prog="visexpert demo",
        description="Train CLIP alone and CLIP with experts from the same start, score both, draw figures.",
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of both runs (default: runs/demo)")
    parser.add_argument("--steps", type=int, default=None, help="training steps of each model (default: the config's)")
    parser.add_argument("--smoke", action="store_true", help="few steps on few scenes: whether it runs; no scores")
    return parser
