"""What an export is made of, and what a format does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from visexpert.types import TextEncoder
from visexpert.vision import ClipEncoder, equipped_blocks, merge_for_inference

if TYPE_CHECKING:
    from visexpert.export.mole import MoLEReport

PATCH_TOKENS = "patch_tokens"
POOLED = "pooled"
LOGITS = "logits"


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


class NamedOutputs(nn.Module):
    """A CLIP as one graph: normalized pixels to named tensors.

    Args:
        clip: The encoder.
        layers: Hidden states to hand out.
    """

    def __init__(self, clip: ClipEncoder, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = clip.model
        self.layer, self.layers = clip.layer, layers

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) to hidden states (B, 1 + T, D), patch tokens (B, T, D) of the layer read, pooled (B, D)."""
        states = [self.model.pre_layrnorm(self.model.embeddings(pixel_values))]
        for layer in self.model.encoder.layers:
            states.append(layer(states[-1], None))
        return {
            **{layer_name(layer): states[layer] for layer in self.layers},
            PATCH_TOKENS: states[self.layer][:, 1:],
            POOLED: self.model.post_layernorm(states[-1][:, 0]),
        }


def for_inference(clip: ClipEncoder) -> ClipEncoder:
    """What graphs are made of: a plain CLIP itself, or MoLE with merged weights wherever that is exact."""
    return merge_for_inference(clip, keep_weighed=True) if equipped_blocks(clip) else clip


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
