"""Cards of the shipped weights: Markdown written from their JSON facts, so that no number is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARDS = Path(__file__).parent / "cards"
"""Folder of the shipped cards."""

PROBE_COLUMNS: Mapping[str, str] = {
    "depth": "depth R2",
    "normals": "normals R2",
    "object_depth": "object depth R2",
    "colour": "colour",
    "shape": "shape",
    "size": "size",
    "material": "material",
}
"""Columns of the linear-probe table: key and title."""


def encoder_facts(cards: Path = CARDS) -> dict[str, dict[str, Any]]:
    """Return facts of every entry that encodes images, by name, CLIP first; a language model has a card but no grid."""
    facts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in cards.glob("*.json")}
    names = sorted((name for name in facts if "grid" in facts[name]), key=lambda name: (name != "clip", name))
    return {name: facts[name] for name in names}


def write_card(facts_path: Path) -> Path:
    """Write ``NAME.md`` beside ``NAME.json`` and return it."""
    facts = json.loads(facts_path.read_text(encoding="utf-8"))
    path = facts_path.with_suffix(".md")
    path.write_text(card_text(facts), encoding="utf-8")
    return path


def card_text(facts: Mapping[str, Any]) -> str:
    """Return the card of one entry as Markdown."""
    data, grid = facts["data"], facts["grid"]
    total = sum(facts["files"].values())
    rows = {
        "Model": f"{facts['kind']}, {facts['parameters']:,} parameters",
        "Input and tokens": f"{facts['input_px']} px RGB; {grid[0]}x{grid[1]} tokens of width {facts['token_dim']}",
        "Learnt": facts["trained_on"],
        "Data": f"Tabletop world `{data['world']}`, {data['train_scenes']:,} scenes of split `{data['train_split']}`",
        "Training": f"{facts['steps']:,} steps of {facts['batch_size']} images, seed {data['seed']}, "
        f"{facts['training_seconds']} s on {facts['training_hardware']}",
        "Recipe": f"`visexpert fit --config {facts['recipe']}`",
        "Files": f"{', '.join(f'`{name}`' for name in facts['files'])} ({total / 1e6:.2f} MB, fp16)",
        "License": facts["license"],
    }
    lines = [
        f"# zoo:{facts['name']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
    ]
    lines += ["", f"## Held-out score: {facts['headline']} = {facts['score']:.2f}", ""]
    lines += [
        f"{_sentence(facts['score_definition'])} Measured on {data['held_out_scenes']:,} scenes of split "
        f"`{data['held_out_split']}`, never trained on; one seed, so no spread is known.",
        "",
    ]
    others = {name: value for name, value in facts["scores"].items() if name != facts["headline"]}
    if others:
        lines += ["Also: " + ", ".join(f"{name} {value:.2f}" for name, value in others.items()) + ".", ""]
    if "probes" in facts:
        lines += ["## Linear probes", "", *probe_lines(facts["probes"]), "", PROBE_NOTE, ""]
    return "\n".join(lines)


PROBE_NOTE = (
    "Ridge probes on tokens resampled to 8x8, fitted on other held-out scenes: R2 x100 of log-depth and normals in all "
    "cells; in cells that objects fill by more than half, R2 x100 of the objects' log-depth and accuracy (%) of "
    "colour, shape, size and material. Written by `python -m visexpert.tabletop.zoo.probe_table --write`."
)


def probe_lines(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the probe table as Markdown lines; ``rows`` maps a name to its scores."""
    lines = [f"| tokens | {' | '.join(PROBE_COLUMNS.values())} |", "|---" * (len(PROBE_COLUMNS) + 1) + "|"]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{scores[column]:.1f}" for column in PROBE_COLUMNS) + " |")
    return lines


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
