"""``fidelity.json``, ``fidelity.md`` and ``README.md`` of an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visexpert.export.graphs import for_inference
from visexpert.export.llava import QUESTION, prompt_lines
from visexpert.export.reload import BATCHES, FORBIDDEN
from visexpert.export.rounding import weights_told
from visexpert.export.source import ExportSource, Format, layer_name
from visexpert.export.verify import Fidelity
from visexpert.vision import VisionEncoder
from visexpert.vision.saving import prepares_squares

POOLED_TEXT = {
    True: "The run trained the pooled output.",
    False: "The run did not train the pooled output: what comes after the layer read is that of the original encoder, "
    "on tokens that the run changed. Measure before you use it for zero-shot "
    "classification or retrieval.",
    None: "Whether the pooled output was trained is unknown: no file holds the weights that the run started from.",
}


USAGE_HEAD = (
    "from PIL import Image",
    "",
    'FOLDER = "."  # this folder',
    'image = Image.open("photo.jpg").convert("RGB")',
    "",
)

OWN_SHAPES = (
    "the source's own, which cuts images of any shape into patches; the run saw each image stretched to a square"
)


def write_reports(source: ExportSource, name: str, form: Format, fidelity: Fidelity, folder: Path) -> None:
    """Write all three; ``fidelity.json`` last."""
    facts = report_facts(source, name, form, fidelity)
    (folder / "README.md").write_text(card(source, name, form, facts), encoding="utf-8")
    (folder / "fidelity.md").write_text(fidelity_text(facts), encoding="utf-8")
    (folder / "fidelity.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def report_facts(source: ExportSource, name: str, form: Format, fidelity: Fidelity) -> dict[str, Any]:
    """Return the content of ``fidelity.json``."""
    clip = for_inference(source.clip) if form.mole == "merged" else source.clip
    act = source.clip.activation
    left = None if source.projection is None or name == "native" else asdict(source.projection)
    outputs = _by_layer(source, fidelity.outputs)
    return {
        "format": name,
        "layer_read": source.clip.layer,
        "tolerance": fidelity.tolerance,
        **outputs,
        "pooled_trained": source.pooled_trained,
        "projection": left,
        "encoder": type(source.clip).__name__,
        **({} if act is None else {"activation": {"hidden_act": act, "quick_gelu": act == "quick_gelu"}}),
        "preprocessing": {
            **source.preprocessing,
            "difference_in_levels_of_255": fidelity.levels,
            **({} if prepares_squares(clip.model) or not form.preprocesses else {"image_processor": OWN_SHAPES}),
        },
        "licenses": dict(source.licenses),
        "origin": dict(source.origin),
        "weights": weights_told(source),
        **({"rounding": _by_layer(source, fidelity.rounding)} if fidelity.rounding else {}),
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        **({} if fidelity.prompt is None else {"prompt": fidelity.prompt.facts()}),
        **({} if source.mole is None else {"mole": source.mole.facts()}),
        "text_alignment": source.alignment.facts(),
        "reload": {
            "batch_sizes": list(BATCHES),
            "images_compared": fidelity.num_images,
            "not_importable": list(FORBIDDEN[name]),
            "versions": fidelity.versions,
        },
    }


def _by_layer(source: ExportSource, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Put the entries of hidden states under ``layers``, by number; keep the others."""
    names = {layer_name(layer): str(layer) for layer in source.layers}
    others = {key: value for key, value in outputs.items() if key not in names}
    return {"layers": {names[key]: outputs[key] for key in names}, **others}


def _titles(outputs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the differences by the title of their row."""
    rows = {f"hidden state {layer}": entry for layer, entry in outputs["layers"].items()}
    return rows | {key.replace("_", " "): value for key, value in outputs.items() if _is_difference(value)}


def _rounding_lines(facts: dict[str, Any]) -> list[str]:
    """Return the section of ``fidelity.md`` on weights in fewer bits."""
    if "rounding" not in facts:
        return []
    lines = [
        f"The weights of the model above are rounded to {facts['weights']}, as stored; it computes in float32. "
        "Rounding alone changed:",
        "",
        "| rounded against float32 weights | max error / RMS | min cosine | mean cosine |",
        "|---|---|---|---|",
    ]
    for title, entry in _titles(facts["rounding"]).items():
        lines.append(f"| {title} | {entry['relative']:.2e} | {entry['min_cosine']:.8f} | {entry['mean_cosine']:.8f} |")
    return [*lines, ""]


def fidelity_text(facts: dict[str, Any]) -> str:
    """Return ``fidelity.md``."""
    rows = _titles(facts)
    lines = [
        f"# Fidelity of the {facts['format']} export",
        "",
        f"Reloaded in a fresh process{_without(facts['reload']['not_importable'])}, and run on the same {sum(BATCHES)} "
        f"images (scenes, noise, one flat) in batches of {', '.join(map(str, BATCHES))}.{_left_out(facts)}",
        "",
        "| output | max error | mean error | max error / RMS | min cosine | mean cosine |",
        "|---|---|---|---|---|---|",
    ]
    for title, entry in rows.items():
        errors = " | ".join(f"{entry[key]:.2e}" for key in ("max_abs", "mean_abs", "relative"))
        lines.append(f"| {title} | {errors} | {entry['min_cosine']:.8f} | {entry['mean_cosine']:.8f} |")
    lines += ["", f"Allowed: max error / RMS of {facts['tolerance']:.0e}. {POOLED_TEXT[facts['pooled_trained']]}", ""]
    lines += [*_rounding_lines(facts), *_projection_lines(facts), *_alignment_lines(facts["text_alignment"])]
    if "mole" in facts:
        lines += mole_lines(facts["mole"], [int(layer) for layer in facts["layers"]])
    lines += [*_facts_table(facts), ""]
    return "\n".join(lines)


def _alignment_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the section of ``fidelity.md`` on text alignment."""
    title = ["## Text alignment", ""]
    if "not_measured" in found:
        return [*title, f"Not measured: {found['not_measured'].rstrip('.')}.", ""]
    rows = [
        f"| {name.replace('/', ', ').replace('_', ' ')} | {before:.1%} | {found['after'][name]:.1%} |"
        for name, before in found["before"].items()
    ]
    return [
        *title,
        f"Through the text tower of the encoder's source, on {found['images']} validation images of the run.",
        "",
        "| | before training | this export |",
        "|---|---:|---:|",
        *rows,
        "",
    ]


def card(source: ExportSource, name: str, form: Format, facts: dict[str, Any]) -> str:
    """Return the README: what the folder is, how to load it, which licenses apply."""
    clip = source.clip
    grid = "x".join(map(str, clip.grid_hw))
    lines = [
        f"# Vision encoder ({type(clip.model).__name__}), {name} export",
        "",
        f"{facts['parameters']:,} parameters, input {clip.image_size} px, {grid} patch tokens of width {clip.width}. "
        f"Read hidden state {clip.layer} without {_before_patches(clip)}the final norm: those are the tokens that the "
        f"run used. {POOLED_TEXT[source.pooled_trained]}",
        "",
        *_projection_lines(facts),
        *_mole_notice(facts),
        "```python",
        *USAGE_HEAD,
        _usage(source, form),
        "```",
        "",
        *(
            []
            if source.language is None or "prompt" not in facts
            else prompt_lines(facts["prompt"], source.language.tokenizer)
        ),
        *_facts_table(facts),
        "",
        "Fidelity of the export: fidelity.md, fidelity.json.",
        "",
    ]
    return "\n".join(lines)


def _usage(source: ExportSource, form: Format) -> str:
    """Return the code that reads an image with the folder."""
    clip, how = source.clip, source.preprocessing
    return (form.usage or clip.usage).format(
        layer=clip.layer,
        index=clip.depth + clip.layer,
        side=clip.image_size,
        prefix=clip.prefix,
        question=QUESTION,
        mean=list(how["mean"]),
        std=list(how["std"]),
        resampling=clip.interpolation.upper(),
    )


def _before_patches(clip: VisionEncoder) -> str:
    """Name the tokens before the patches, for the sentence that goes on."""
    if not clip.prefix:
        return ""
    found = f"the first {clip.prefix} tokens" if clip.prefix > 1 else "[CLS]" if clip.has_cls else "the first token"
    return f"{found} and without "


def _facts_table(facts: dict[str, Any]) -> list[str]:
    how = facts["preprocessing"]
    rows = {
        "weights": facts["weights"],
        **_activation_row(facts),
        "preprocessing": f"{how['interpolation']} resize to {how['size'][0]}x{how['size'][1]} ({how['resize']}), "
        f"mean {how['mean']}, std {how['std']}",
    }
    if how["difference_in_levels_of_255"]:
        worst = ", ".join(f"{key} {value:.2f}" for key, value in how["difference_in_levels_of_255"].items())
        rows["this folder's image processor"] = f"largest difference from training, in levels of 255: {worst}"
    if "image_processor" in how:
        rows["this folder's image processor"] = how["image_processor"]
    rows |= {f"license of {'the encoder' if key == 'clip' else key}": value for key, value in facts["licenses"].items()}
    rows |= facts["origin"]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _activation_row(facts: dict[str, Any]) -> dict[str, str]:
    """Return the row on the activation, which users of CLIP's weights may mistake."""
    if "activation" not in facts:
        return {}
    act = facts["activation"]
    return {"activation": f"{act['hidden_act']} ({'quick-GELU' if act['quick_gelu'] else 'not quick-GELU'})"}


def _projection_lines(facts: dict[str, Any]) -> list[str]:
    """Say that this folder gives no image embedding of CLIP, and where its projection is."""
    left = facts["projection"]
    if left is None:
        return []
    return [
        f"CLIP's projection of the pooled output into the space of its text tower (`visual_projection`, to "
        f"{left['dim']} dimensions) is not in this folder; the CLIP that the run started from has it: {left['source']}",
        "",
    ]


def _mole_notice(facts: dict[str, Any]) -> list[str]:
    """Say, before anything else, that this may not be the student."""
    return (
        [f"MoLE ({facts['mole']['treatment']}): {MEANING[facts['mole']['treatment']]}", ""] if "mole" in facts else []
    )


def _without(packages: list[str]) -> str:
    return f" that cannot import {', '.join(packages)}" if packages else ""


def _left_out(facts: dict[str, Any]) -> str:
    """Say how many images were not compared, if any."""
    left = sum(BATCHES) - facts["reload"]["images_compared"]
    if not left:
        return ""
    return (
        f" {left} of them were left out of the comparison: there, a router's two best experts are so close that "
        "rounding alone may switch between them."
    )


def _is_difference(value: Any) -> bool:
    return isinstance(value, dict) and "max_abs" in value


IMAGES = ("validation", "training", "named")
"""Images that a student can be folded and measured on."""

MEANING = {
    "exact": "The architecture is kept: the export computes what the student computes.",
    "fold": "One plain encoder: the low-rank experts of each layer, averaged by how much images of the run's data use "
    "them. It is not the student; fidelity.md gives the difference.",
    "flatten": "One plain encoder: a fold (experts averaged by their use), then briefly trained to give the student's "
    "tokens. It is not the student; fidelity.md gives the difference.",
}


def mole_lines(facts: Mapping[str, Any], layers: Sequence[int]) -> list[str]:
    """Return the section of ``fidelity.md`` on MoLE.

    Args:
        facts: Result of :meth:`MoLEReport.facts`.
        layers: Hidden states compared.
    """
    student = facts["student"]
    lines = [
        f"## MoLE: {facts['treatment']}",
        "",
        f"The student has {student['num_experts']} low-rank experts of rank {student['rank']} (routing "
        f"{student['routing']}, router {student['router']}) in blocks {', '.join(map(str, student['layers']))}. "
        f"{MEANING[facts['treatment']]}",
        "",
    ]
    if "usage" in facts and facts["usage"]["images"] != "validation":
        lines += [f"Folded and measured on {facts['usage']['images']} images, not on the run's validation images.", ""]
    if errors := next((facts[key] for key in map(_errors_key, IMAGES) if key in facts), None):
        lines += _val_table(facts, errors)
    if "against_student_on_check_images" in facts:
        titles = {layer_name(layer): f"hidden state {layer}" for layer in layers}
        lines += [
            "| against the student, check images | max error / RMS | min cosine | mean cosine |",
            "|---|---|---|---|",
        ]
        for name, entry in facts["against_student_on_check_images"].items():
            cosines = f"{entry['min_cosine']:.4f} | {entry['mean_cosine']:.4f}"
            lines.append(f"| {titles.get(name, name.replace('_', ' '))} | {entry['relative']:.2e} | {cosines} |")
        lines.append("")
    return lines + (_usage_table(facts["usage"]) if "usage" in facts else [])


def _errors_key(images: str) -> str:
    return f"against_student_on_{images}_images"


def _val_table(facts: Mapping[str, Any], errors: Mapping[str, Any]) -> list[str]:
    which = facts["usage"]["images"]
    lines = [f"| against the student, {which} images | images | NMSE | RMS error / RMS | mean cosine | min cosine |"]
    lines.append("|---|---|---|---|---|---|")
    for name, entry in errors.items():
        title = f"{name}, {facts['steps']} steps" if name == "flatten" else name
        lines.append(
            f"| {title} | {entry['num_images']} | {entry['nmse']:.2e} | {entry['relative']:.2e} | "
            f"{entry['mean_cosine']:.4f} | {entry['min_cosine']:.4f} |"
        )
    return [*lines, ""]


def _usage_table(usage: Mapping[str, Any]) -> list[str]:
    shares = usage["mean_gates_by_block"]
    num_experts = len(next(iter(shares.values())))
    images = usage["images"]
    lines = [
        f"| mean gate, {usage[f'{images}_images']} {images} images | "
        + " | ".join(f"expert {index}" for index in range(num_experts))
        + " |"
    ]
    lines.append("|---" * (num_experts + 1) + "|")
    lines += [f"| block {block} | " + " | ".join(f"{g:.3f}" for g in gates) + " |" for block, gates in shares.items()]
    return [*lines, ""]
