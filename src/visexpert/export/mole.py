"""What an export does with a student's MoLE, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from visexpert.export.fidelity import difference
from visexpert.export.inputs import check_inputs
from visexpert.export.source import ExportSource, layer_name, reference_outputs
from visexpert.vision import ClipEncoder, MoLESettings, RouterUsage

Treatment = Literal["exact", "fold", "flatten"]

IMAGES = ("validation", "training", "named")
"""What images a student was folded by and measured on."""

MEANING = {
    "exact": "The architecture is kept: the export computes what the student computes.",
    "fold": "One plain CLIP: the low-rank experts of each layer averaged by how much images of the run's data use "
    "them. It is not the student; fidelity.md says how far it is from it.",
    "flatten": "One plain CLIP: a fold (experts averaged by their use), then trained for a while to give the student's "
    "tokens. It is not the student; fidelity.md says how far it is from it.",
}


@dataclass(frozen=True)
class MoLEReport:
    """What became of MoLE in one export.

    Args:
        treatment: ``exact``, ``fold`` or ``flatten``.
        settings: The student's MoLE.
        usage: How much each expert was used; None where nobody looked.
        on_checks: Differences from the student by output on the check images; None for ``exact``, whose export itself
            is compared with the student.
        on_val: Errors of patch tokens against the student on the run's validation images, of ``fold`` and, behind it,
            ``flatten``: ``nmse``, ``relative`` (root mean squares), ``mean_cosine``, ``min_cosine``, ``num_images``.
        steps: Optimizer steps of ``flatten``.
        images: Which images ``usage`` and ``on_val`` are from: ``validation``, ``training`` or ``named`` (--data).
    """

    treatment: Treatment
    settings: MoLESettings
    usage: RouterUsage | None = None
    on_checks: Mapping[str, Mapping[str, float]] | None = None
    on_val: Mapping[str, Mapping[str, float]] | None = None
    steps: int = 0
    images: str = "validation"

    def facts(self) -> dict[str, Any]:
        """For ``fidelity.json``."""
        facts: dict[str, Any] = {"treatment": self.treatment, "student": asdict(self.settings)}
        if self.usage is not None:
            shares = {str(block): gates_E.tolist() for block, gates_E in self.usage.gates.items()}
            facts["usage"] = {
                f"{self.images}_images": self.usage.num_images,
                "images": self.images,
                "mean_gates_by_block": shares,
            }
        if self.on_checks is not None:
            facts["against_student_on_check_images"] = {name: dict(entry) for name, entry in self.on_checks.items()}
        if self.on_val is not None:
            facts[f"against_student_on_{self.images}_images"] = {
                name: dict(entry) for name, entry in self.on_val.items()
            }
        if self.treatment == "flatten":
            facts["steps"] = self.steps
        return facts


@torch.no_grad()
def differences(student: ClipEncoder, plain: ClipEncoder, layers: Sequence[int]) -> dict[str, dict[str, float]]:
    """Differences of a plain CLIP's outputs from the student's on the check images, by output."""
    pixels_BCHW = student.preprocess(check_inputs(student.image_size).images_BCHW)
    ours, theirs = (
        reference_outputs(ExportSource(clip, tuple(layers), None, {}), pixels_BCHW) for clip in (student, plain)
    )
    return {name: asdict(difference(theirs[name], value)) for name, value in ours.items()}


def mole_lines(facts: Mapping[str, Any], layers: Sequence[int]) -> list[str]:
    """The section of ``fidelity.md``.

    Args:
        facts: What :meth:`MoLEReport.facts` gave.
        layers: Hidden states that were compared.
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
