"""What an export is made of, and what a format does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from visexpert.types import TextEncoder
from visexpert.vision import ClipEncoder, MoLESettings, RouterUsage

PATCH_TOKENS = "patch_tokens"
POOLED = "pooled"
LOGITS = "logits"

Treatment = Literal["exact", "fold", "flatten"]


@dataclass(frozen=True)
class LanguageParts:
    """The prefix LM behind a CLIP, in the form that LLaVA has a place for.

    Args:
        model: A ``transformers`` causal language model.
        linear_1: First layer of the projector, CLIP's width to the language width.
        linear_2: Second layer, behind a GELU.
        tokenizer: Its fast tokenizer.
        encoder: What frames a question in training, with that tokenizer.
        side: The run's language model, whose ``model`` is the same without its low-rank updates added.
        logits: Images (B, 3, H, W) in [0, 1] and token ids (B, N) of one text per image to the logits (B, N - 1, V) of
            its tokens from the second on, by visexpert's own forward: what the export is compared with.
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
    """What CLIP's source has and ``CLIPVisionModel`` has no place for: the way into the space of its text tower.

    Args:
        dim: Width of that space.
        source: The CLIP that has the weights, as the run's configuration names it.
    """

    dim: int
    source: str


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


@dataclass(frozen=True)
class ExportSource:
    """What is exported.

    Args:
        clip: The merged or student CLIP, weights loaded, in eval mode.
        layers: Hidden states to compare: -1 the last, -2 the one before, ...
        pooled_trained: Whether the run trained the pooled output; None where that cannot be told.
        licenses: License of ``clip`` and of each expert whose knowledge went into it.
        origin: How it came about, for the report: title to value.
        language: The language model, where LLaVA has a place for it.
        mole: What becomes of the student's MoLE; None where it never had one.
        projection: What stays behind in CLIP's source; None where that has no projection.
        dtype: What all weights are rounded to and stored in; None for float32, the language model in its own.
    """

    clip: ClipEncoder
    layers: tuple[int, ...]
    pooled_trained: bool | None
    licenses: Mapping[str, str]
    origin: Mapping[str, str] = field(default_factory=dict)
    language: LanguageParts | None = None
    mole: MoLEReport | None = None
    projection: Projection | None = None
    dtype: torch.dtype | None = None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How an image becomes pixel values."""
        side = self.clip.image_size
        # str() of a float32 is the shortest decimal that rounds to it.
        mean, std = ([float(str(value)) for value in b.flatten().numpy()] for b in (self.clip.mean, self.clip.std))
        return {
            "resize": "square, aspect ratio not kept, no crop",
            "size": [side, side],
            "interpolation": "bicubic, antialiased",
            "mean": mean,
            "std": std,
        }


def layer_name(layer: int) -> str:
    """Name of a hidden state in exports and reports: -2 is ``layer_minus_2`` (a name that ONNX allows)."""
    return f"layer_minus_{-layer}"


@torch.no_grad()
def reference_outputs(source: ExportSource, pixel_values: Tensor) -> dict[str, Tensor]:
    """The same by ``CLIPVisionModel``'s own forward, which no exporter wrote."""
    output = source.clip.model(pixel_values, output_hidden_states=True)
    return {
        **{layer_name(layer): output.hidden_states[layer] for layer in source.layers},
        PATCH_TOKENS: output.hidden_states[source.clip.layer][:, 1:],
        POOLED: output.pooler_output,
    }


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        write: Writes the files into a folder that exists and is empty.
        packages: Modules that writing and reloading need beyond visexpert's own requirements.
        usage: Lines of Python that load it.
        outputs: What the reload hands back beside hidden states and pooled output.
        preprocesses: Whether the folder brings an image processor of the library's own.
        mole: How it keeps MoLE: ``merged`` - a plain MLP per expert, where tokens go through one, unweighed; else as
            trained; ``trained`` - always as trained; None - it has no place for it.
    """

    write: Callable[[ExportSource, Path], None]
    packages: tuple[str, ...]
    usage: str
    outputs: tuple[str, ...] = ()
    preprocesses: bool = True
    mole: Literal["merged", "trained"] | None = None
