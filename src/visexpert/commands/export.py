"""``visexpert export RUN --format NAME --out DIR``: a run's CLIP for transformers, open_clip, ONNX, torch or LLaVA."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visexpert.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from visexpert.export import ExportSource, LanguageParts
    from visexpert.methods import Method
    from visexpert.runs import SavedRun
    from visexpert.vision import ClipEncoder

log = logging.getLogger(__name__)

NAMES = ("hf", "open_clip", "onnx", "torch_export", "llava")
"""Formats, said here so that --help need not import them."""

MERGED = "merged"
FACTS = "merge.json"
TOLD = ("steps", "distance", "adaptation", "normalise", "token_weight", "text_weight", "fusion_space", "teacher_steps")
"""Entries of ``merge.json`` that the report repeats."""


def run(arguments: list[str]) -> None:
    """Export, and say how faithful each export is.

    Raises:
        ConfigError: The run, the target or a setting cannot work.
        WeightsError: An export differs after reloading; nothing is left behind.
    """
    options = _parser().parse_args(arguments)
    from visexpert.export import check_formats, check_target, export  # heavy: after --help

    formats = list(dict.fromkeys(name.strip() for entry in options.format for name in entry.split(",")))
    check_formats(formats)
    check_target(options.out)
    if not options.tolerance > 0:
        raise ConfigError(f"--tolerance {options.tolerance} must be above 0.")
    folder = run_with_clip(options.run)
    log.info("Opening %s", folder)
    from visexpert.runs import open_run

    source = source_of(open_run(folder), options.layers, with_language="llava" in formats)
    found = export(source, formats, options.out, tolerance=options.tolerance)
    for name, fidelity in found.items():
        where = options.out if len(found) == 1 else options.out / name
        worst = max(entry["relative"] for entry in fidelity.outputs.values())
        print(f"{name}: {where} (largest error after reloading {worst:.1e} of the outputs' root mean square)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visexpert export",
        description="Write a run's trained CLIP in another library's format. Each export is loaded again in a fresh "
        "process that cannot import visexpert, and compared; one that differs leaves nothing behind.",
    )
    parser.add_argument(
        "run",
        type=Path,
        help="a run that `visexpert merge` has merged, its merged folder, or any run that trained CLIP",
    )
    parser.add_argument(
        "--format", action="append", required=True, metavar="NAME",
        help=f"{', '.join(NAMES)}; several separated by commas, each then in a folder of its name inside DIR",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N",
        help="hidden states to hand out and compare, -1 for the last (default: the layer that the run reads, and -1)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X",
        help="largest error allowed, over the root mean square of the output (default: %(default)s)",
    )  # fmt: skip
    return parser


def run_with_clip(folder: Path) -> Path:
    """The folder to open: RUN/merged where it is, else a run whose checkpoint holds its CLIP.

    Raises:
        ConfigError: The folder is no run, or its CLIP was neither merged nor trained.
    """
    from visexpert.runs import read_checkpoint
    from visexpert.training import checkpoint_of, config_of

    config_of(folder)
    merged = folder / MERGED
    if merged.is_dir():
        if not (merged / "checkpoints" / "last.ckpt").is_file() or not (merged / "config.yaml").is_file():
            raise ConfigError(
                f"'{merged}' is not finished; run `visexpert merge {folder}` again, which goes on from there."
            )
        return merged
    if not any(key.startswith("clip.") for key in read_checkpoint(checkpoint_of(folder))["state_dict"]):
        raise ConfigError(
            f"'{folder}' has no merged CLIP, and its own CLIP stayed frozen; run `visexpert merge {folder}` first."
        )
    return folder


def source_of(saved: SavedRun, layers: Sequence[int] | None, *, with_language: bool) -> ExportSource:
    """What an opened run has to export.

    Args:
        saved: The run.
        layers: Hidden states to compare; None for the one that is read and the last.
        with_language: Take the language side, too (for LLaVA).

    Raises:
        ConfigError: A layer that the CLIP does not have, or a language side that LLaVA has no place for.
    """
    from visexpert.export import ExportSource
    from visexpert.report.files import read_json

    model: Any = saved.model
    clip: ClipEncoder = model.clip
    clip.requires_grad_(False)
    depth = int(clip.config.num_hidden_layers)
    wanted = tuple(dict.fromkeys((clip.layer, -1) if layers is None else layers))
    for layer in wanted:
        if not -depth - 1 <= layer <= -1:
            raise ConfigError(f"--layers {layer} is outside -{depth + 1}..-1 of a CLIP with {depth} layers.")
    path = saved.folder / FACTS
    facts = read_json(path) if path.is_file() else {}
    name = saved.folder.resolve()
    origin = {"run": f"{name.parent.name}/{name.name}", "optimiser steps in all": str(saved.steps)}
    origin |= {f"merge: {key.replace('_', ' ')}": str(facts[key]) for key in TOLD if key in facts}
    return ExportSource(
        clip, wanted, _pooled_trained(clip), _licences(model, facts), origin,
        _language_parts(saved) if with_language else None,
    )  # fmt: skip


def _licences(model: Any, facts: Mapping[str, Any]) -> dict[str, str]:
    """Of CLIP, and of the experts that were merged into it or, without a merge, trained beside it."""
    experts = facts.get("experts")
    if experts is None:
        experts = {name: model.hub[name].licence for name in model.hub.names}
    clip = str(facts.get("clip_licence", model.clip.licence))
    return {"clip": clip, **{f"expert {name}": str(licence) for name, licence in experts.items()}}


def _pooled_trained(clip: ClipEncoder) -> bool | None:
    """Whether the final LayerNorm, which the pooled output alone reads, has left the weights of CLIP's source."""
    import torch

    from visexpert.vision import ClipEncoder

    if clip.source is None:
        return None
    before = ClipEncoder(source=str(clip.source), layer=clip.layer)
    before.load_weights()
    pairs = zip(before.model.post_layernorm.parameters(), clip.model.post_layernorm.parameters(), strict=True)
    return not all(torch.equal(old, new) for old, new in pairs)


def _language_parts(saved: SavedRun) -> LanguageParts:
    """The language side in LLaVA's form.

    Raises:
        ConfigError: A setting of the run that LLaVA has no place for, by name.
    """
    from torch import nn

    from visexpert.export import LanguageParts
    from visexpert.language import PrefixLM

    model: Any = saved.model
    language, projector = model.language, model.projector
    layers = list(projector.layers) if isinstance(projector.layers, nn.Sequential) else []
    attached = list(model.hub.attached)
    problems = {
        f"language: {type(language).__name__} (it needs PrefixLM)": not isinstance(language, PrefixLM),
        f"position_scale: {getattr(language, 'position_scale', 0)} (it needs 0)": getattr(
            language, "position_scale", 0
        ),
        "a projector other than mlp2x_gelu": len(layers) != 3,
        "projector_norm: true (it needs false)": not isinstance(projector.norm, nn.Identity),
        f"use: {attached} (its language side reads experts: merge first)": attached,
        "blind: true": model.blind,
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(f"--format llava has no place for {problem}; export '{saved.folder}' as hf, or train so.")
    assert isinstance(language, PrefixLM)
    first, last = layers[0], layers[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return LanguageParts(language.model, first, last, saved.tokenizer, lambda *given: _logits(model, *given))


def _logits(model: Method, images_BCHW: Tensor, ids_BN: Tensor) -> Tensor:
    """Logits (B, N - 1, V) of one text per image, by the run's own forward."""
    import torch

    from visexpert.types import IGNORE_INDEX, Batch, TextBatch

    batch, length = ids_BN.shape
    labels_BN = ids_BN.clone()
    labels_BN[:, 0] = IGNORE_INDEX
    positions_BN = torch.arange(length).expand(batch, -1)
    text = TextBatch(ids_BN, labels_BN, torch.ones_like(ids_BN), positions_BN)
    vision = model.encode(Batch(images_BCHW, torch.arange(batch), split="export"))
    logits_MV: Tensor = model.language(vision, text)
    return logits_MV.view(batch, length - 1, -1)
