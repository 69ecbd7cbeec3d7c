"""Linear probes of the tokens of each zoo entry: ``python -m visexpert.tabletop.zoo.probe_table``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from visexpert.grids import resample_tokens
from visexpert.io.run_files import write_json, write_text
from visexpert.metrics.tokens import ridge_accuracy, ridge_r2
from visexpert.tabletop import TabletopData
from visexpert.tabletop.datamodule import TextSettings
from visexpert.tabletop.tiny import TinyExpert
from visexpert.tabletop.zoo.base import images_of
from visexpert.tabletop.zoo.ship import CARDS, PROBE_NOTE, encoder_facts, probe_lines, write_card
from visexpert.types import Batch, ExpertTokens, VisionTokens
from visexpert.vision.clip import ClipEncoder

GRID = (8, 8)
"""Grid on which tokens of all entries are compared: CLIP's own."""

ATTRIBUTES = ("colour", "shape", "size", "material")

Encoder = Callable[[Tensor], ExpertTokens | VisionTokens]


@dataclass(frozen=True)
class CellTruth:
    """Truth per cell of :data:`GRID`, one row per cell, scenes in order.

    Args:
        depth_N: Mean log-depth.
        normals_N3: Mean normal.
        object_N: bool: objects cover more than half of the cell.
        object_depth_N: Mean log-depth of the cell's object pixels (0 without any).
        classes: By attribute, int64 class of most of the cell's object pixels (0 without any).
    """

    depth_N: Tensor
    normals_N3: Tensor
    object_N: Tensor
    object_depth_N: Tensor
    classes: Mapping[str, Tensor]


def main() -> None:
    """Print the table; with ``--write`` put it into the cards and ``docs/results/zoo.md``."""
    parser = argparse.ArgumentParser(prog="python -m visexpert.tabletop.zoo.probe_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into the cards and --results")
    parser.add_argument("--results", type=Path, default=Path("docs/results/zoo.md"), help="page that holds the table")
    parser.add_argument(
        "--scenes", type=int, default=1000, help="held-out scenes; 70 %% fit the probes, 30 %% score them"
    )
    arguments = parser.parse_args()
    data = TabletopData(
        num_val=arguments.scenes,
        texts=TextSettings(train={}, eval={}),
        with_targets=True,
        train_split="zoo",
        eval_batch_size=100,
    )
    rows: dict[str, dict[str, float]] = {}
    entries = zoo_encoders()
    batches = list(tqdm(data.image_dataloader("val"), desc="scenes", unit="batch"))
    truth = cell_truth(batches)
    for name, encoder in tqdm(entries.items(), desc="probes", unit="entry"):
        rows[name] = probe(encode_cells(encoder, batches), truth, scenes=arguments.scenes)
    print("\n".join(probe_lines(rows)))
    if arguments.write:
        write_results(rows, arguments.results, scenes=arguments.scenes)


def zoo_encoders(cards: Path = CARDS) -> dict[str, Encoder]:
    """Return every encoder that has a card, loaded: CLIP at its last two layers, then the experts by name."""
    entries: dict[str, Encoder] = {}
    for name, facts in encoder_facts(cards).items():
        if facts["kind"] == "CLIPVisionModel":
            for layer in (-2, -1):
                clip = ClipEncoder(source=f"zoo:{name}", layer=layer)
                clip.load_weights()
                entries[f"{name}, layer {layer}"] = clip.eval()
        else:
            expert = TinyExpert(source=f"zoo:{name}")
            expert.load_weights()
            entries[name] = expert.eval()
    return entries


@torch.no_grad()
def encode_cells(encoder: Encoder, batches: Iterable[Batch]) -> Tensor:
    """Return tokens of all scenes on :data:`GRID`, one row per cell: (scenes * 64, E)."""
    rows = []
    for batch in batches:
        output = encoder(images_of(batch))
        tokens_BSE = output.tokens_BSE if isinstance(output, ExpertTokens) else output.tokens_BTD
        rows.append(resample_tokens(tokens_BSE, output.grid_hw, GRID).flatten(0, 1))
    return torch.cat(rows)


def cell_truth(batches: Iterable[Batch]) -> CellTruth:
    """Reduce the dense truth of all scenes to the cells of :data:`GRID`."""
    parts = [_truth_of(batch.targets) for batch in batches]
    return CellTruth(
        depth_N=torch.cat([part.depth_N for part in parts]),
        normals_N3=torch.cat([part.normals_N3 for part in parts]),
        object_N=torch.cat([part.object_N for part in parts]),
        object_depth_N=torch.cat([part.object_depth_N for part in parts]),
        classes={name: torch.cat([part.classes[name] for part in parts]) for name in ATTRIBUTES},
    )


def probe(tokens_NE: Tensor, truth: CellTruth, *, scenes: int, fit_share: float = 0.7) -> dict[str, float]:
    """Fit ridge probes on the first scenes and score them on the others.

    Args:
        tokens_NE: Tokens per cell.
        truth: Truth per cell, same rows.
        scenes: Number of scenes in the rows.
        fit_share: Share of the scenes that fit.

    Returns:
        R2 x100 of depth, normals, object_depth; accuracy of the attributes in percent.
    """
    fit_N = torch.arange(len(tokens_NE)) < round(fit_share * scenes) * (len(tokens_NE) // scenes)
    everywhere = {"depth": truth.depth_N, "normals": truth.normals_N3}
    scores = {
        name: 100 * ridge_r2(tokens_NE, value, fit_N=fit_N, evaluate_N=~fit_N) for name, value in everywhere.items()
    }
    inside_NE, fit_M = tokens_NE[truth.object_N], fit_N[truth.object_N]
    scores["object_depth"] = 100 * ridge_r2(
        inside_NE, truth.object_depth_N[truth.object_N], fit_N=fit_M, evaluate_N=~fit_M
    )
    for name in ATTRIBUTES:
        labels_M = truth.classes[name][truth.object_N]
        scores[name] = 100 * ridge_accuracy(inside_NE, labels_M, fit_N=fit_M, evaluate_N=~fit_M)
    return scores


def write_results(rows: Mapping[str, Mapping[str, float]], page: Path, *, scenes: int, cards: Path = CARDS) -> None:
    """Put the table into every card (its own rows) and write the page with all of them."""
    facts_by_name = encoder_facts(cards)
    for name, facts in facts_by_name.items():
        own = {key: row for key, row in rows.items() if key.split(",")[0] == name}
        facts["probes"] = {key: {column: round(value, 2) for column, value in row.items()} for key, row in own.items()}
        path = cards / f"{name}.json"
        write_json(path, facts)
        write_card(path)
    write_text(page, page_text(rows, facts_by_name, scenes=scenes))


def page_text(
    rows: Mapping[str, Mapping[str, float]], facts_by_name: Mapping[str, dict[str, Any]], *, scenes: int
) -> str:
    """Return the results page: entries with sizes and held-out scores, then the probe table."""
    lines = [
        "# The zoo",
        "",
        "Small pretrained models that ship with visexpert. Cards lie in `src/visexpert/tabletop/zoo/cards/`.",
        "",
    ]
    lines += [
        "| entry | input | tokens | parameters | steps | seconds | held-out score |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in facts_by_name.items():
        grid = facts["grid"]
        lines.append(
            f"| {name} | {facts['input_px']} px | {grid[0]}x{grid[1]} x {facts['token_dim']} | "
            f"{facts['parameters']:,} | {facts['steps']} | {facts['training_seconds']} | "
            f"{facts['headline']} {facts['score']} |"
        )
    lines += ["", "What each score means is on the entry's card. Seconds are wall time on a shared CPU core.", ""]
    lines += [f"## Linear probes, {scenes} held-out scenes", "", *probe_lines(rows), "", PROBE_NOTE, ""]
    return "\n".join(lines)


def _truth_of(targets: Mapping[str, Tensor]) -> CellTruth:
    log_depth_B1HW = targets["depth_BHW"].log()[:, None]
    inside_B1HW = (targets["instance_BHW"] > 0).float()[:, None]
    share_B1HW = F.adaptive_avg_pool2d(inside_B1HW, GRID)
    object_depth_B1HW = F.adaptive_avg_pool2d(log_depth_B1HW * inside_B1HW, GRID) / share_B1HW.clamp(min=1e-6)
    classes = {}
    for name in ATTRIBUTES:
        classes_BHW = targets[f"{name}_BHW"]
        one_hot_BHWC = F.one_hot(classes_BHW + 1)[..., 1:]
        shares_BCHW = F.adaptive_avg_pool2d(one_hot_BHWC.permute(0, 3, 1, 2).float(), GRID)
        classes[name] = shares_BCHW.argmax(1).flatten()
    return CellTruth(
        depth_N=F.adaptive_avg_pool2d(log_depth_B1HW, GRID).flatten(),
        normals_N3=F.adaptive_avg_pool2d(targets["normals_B3HW"], GRID).permute(0, 2, 3, 1).flatten(0, 2),
        object_N=(share_B1HW > 0.5).flatten(),
        object_depth_N=object_depth_B1HW.flatten(),
        classes=classes,
    )


if __name__ == "__main__":
    main()
