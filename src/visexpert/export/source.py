"""What an export is made of, and what a format does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from visexpert.types import TextEncoder
from visexpert.vision import MoLESettings, RouterUsage, VisionEncoder

PATCH_TOKENS = "patch_tokens"
POOLED = "pooled"
LOGITS = "logits"

Treatment = Literal["exact", "fold", "flatten"]


@dataclass(frozen=True)
class LanguageParts:
    """The prefix LM of a run, in the form of LLaVA.

    Args:
        model: Causal language model of ``transformers``.
        linear_1: First layer of the projector, CLIP's width to the language width.
        linear_2: Second layer of the projector, after a GELU.
        tokenizer: Fast tokenizer of the model.
        encoder: Frames a question as in training, with that tokenizer.
        side: The run's language model; its ``model`` is the same without the low-rank updates merged.
        logits: Maps images (B, 3, H, W) in [0, 1] and token ids (B, N), one text per image, to the logits (B, N - 1, V)
            of the tokens from the second on, by visexpert's own forward: the reference for the export.
    """

    model: PreTrainedModel
    linear_1: nn.Linear
    linear_2: nn.Linear
    tokenizer: Any
    encoder: TextEncoder
    side: nn.Module
    logits: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Projection:
    """The projection to the space of CLIP's text tower, which ``CLIPVisionModel`` lacks.

    Args:
        dim: Width of that space.
        source: The CLIP with the weights, as named in the run's configuration.
    """

    dim: int
    source: str


@dataclass(frozen=True)
class MoLEReport:
    """How one export treats MoLE.

    Args:
        treatment: ``exact``, ``fold`` or ``flatten``.
        settings: Settings of the student's MoLE.
        usage: Use of each expert; None if not measured.
        on_checks: Differences from the student by output on the check images; None for ``exact``, whose export itself
            is compared with the student.
        on_val: Errors of patch tokens against the student on the run's validation images, for ``fold`` and then
            ``flatten``: ``nmse``, ``relative`` (root mean squares), ``mean_cosine``, ``min_cosine``, ``num_images``.
        steps: Optimizer steps of ``flatten``.
        images: Images behind ``usage`` and ``on_val``: ``validation``, ``training`` or ``named`` (--data).
    """

    treatment: Treatment
    settings: MoLESettings
    usage: RouterUsage | None = None
    on_checks: Mapping[str, Mapping[str, float]] | None = None
    on_val: Mapping[str, Mapping[str, float]] | None = None
    steps: int = 0
    images: str = "validation"

    def facts(self) -> dict[str, Any]:
        """Return the entries for ``fidelity.json``."""
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


@dataclass(frozen=True)
class TextAlignmentReport:
    """What training did to retrieval and zero-shot use through the text tower of the encoder's source.

    Args:
        images: Number of validation images of the run.
        before: Scores in [0, 1] of the encoder that training started from, see
            :func:`~visexpert.metrics.alignment.retrieval_recall`.
        after: The same of the exported encoder.
        reason: Why nothing was measured; empty if it was.
    """

    images: int = 0
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def facts(self) -> dict[str, Any]:
        """Return the entries for ``fidelity.json``."""
        if self.reason:
            return {"not_measured": self.reason}
        return {"images": self.images, "before": dict(self.before), "after": dict(self.after)}


@dataclass(frozen=True)
class ExportSource:
    """What to export.

    Args:
        clip: The merged or student encoder, weights loaded, in eval mode.
        layers: Hidden states to compare: -1 is the last, -2 the one before, ...
        pooled_trained: Whether the run trained the pooled output; None if unknown.
        licenses: Licenses of ``clip`` and of each expert that it learned from.
        origin: Provenance for the report, title to value.
        language: The language model, if LLaVA has a place for it.
        mole: How the export treats the student's MoLE; None if it has none.
        projection: The projection that stays in CLIP's source; None if the source has none.
        alignment: Its alignment with the text tower, before training and now.
        dtype: Dtype that all weights are rounded to and stored in; None for float32, the language model in its own.
    """

    clip: VisionEncoder
    layers: tuple[int, ...]
    pooled_trained: bool | None
    licenses: Mapping[str, str]
    origin: Mapping[str, str] = field(default_factory=dict)
    language: LanguageParts | None = None
    mole: MoLEReport | None = None
    projection: Projection | None = None
    alignment: TextAlignmentReport = TextAlignmentReport(reason="not asked for")
    dtype: torch.dtype | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes ``pixel_values``."""
        side = self.clip.image_size
        # str() of a float32 is the shortest decimal that rounds to it.
        mean, std = ([float(str(value)) for value in b.flatten().numpy()] for b in (self.clip.mean, self.clip.std))
        return {
            "resize": "square, aspect ratio not kept, no crop",
            "size": [side, side],
            "interpolation": f"{self.clip.interpolation}, antialiased",
            "mean": mean,
            "std": std,
        }


def layer_name(layer: int) -> str:
    """Return the name of a hidden state in exports and reports: ``layer_minus_2`` for -2 (ONNX allows that name)."""
    return f"layer_minus_{-layer}"


@torch.no_grad()
def reference_outputs(source: ExportSource, pixel_values: Tensor) -> dict[str, Tensor]:
    """Return the named outputs, see :func:`outputs_of`."""
    return outputs_of(source.clip, source.layers, pixel_values)


def outputs_of(clip: VisionEncoder, layers: Sequence[int], pixel_values: Tensor) -> dict[str, Tensor]:
    """Map normalized pixels (B, 3, S, S) to named tensors, block by block.

    Returns:
        Hidden states (B, N, D), patch tokens (B, T, D) of the layer read, and pooled (B, P) where there is one.
    """
    hidden_BND, inputs = clip.anatomy.embed(clip.model, pixel_values)
    states = [hidden_BND]
    for block, given in zip(clip.blocks(), inputs, strict=True):
        states.append(block(states[-1], **given))
    found = {layer_name(layer): states[layer] for layer in layers}
    found[PATCH_TOKENS] = states[clip.layer][:, clip.prefix :]
    pooled_BP = clip.anatomy.pool(clip.model, states[-1])
    return found if pooled_BP is None else found | {POOLED: pooled_BP}


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        write: Writes the files into an existing, empty folder.
        packages: Modules needed for writing and reloading beyond visexpert's own requirements.
        usage: Python code that loads the folder; None for the encoder's own.
        outputs: Outputs of the reload beside the hidden states.
        preprocesses: Whether the folder has an image processor of the library.
        mole: How it keeps MoLE: ``merged`` - one plain MLP per expert if each token goes through one, unweighted, else
            as trained; ``trained`` - always as trained; None - not at all.
    """

    write: Callable[[ExportSource, Path], None]
    packages: tuple[str, ...]
    usage: str | None
    outputs: tuple[str, ...] = ()
    preprocesses: bool = True
    mole: Literal["merged", "trained"] | None = None
