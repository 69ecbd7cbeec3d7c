"""Experts from open_clip: the image tower of any of its models, be it a plain ViT or a timm trunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visexpert.experts.maps import MapExpert, SummarizedMap
from visexpert.experts.timm import last_features, map_of_last
from visexpert.io.weights import fill_module
from visexpert.networks.open_clip import DescribedOpenClip
from visexpert.networks.preprocessing import Framing, Interpolation
from visexpert.typed import typed

OWNER = "OpenClipExpert"


@typed
class OpenClipExpert(MapExpert):
    """Patch tokens of an open_clip image tower, as they enter its pooling.

    They have been through the final norm, unless that comes after the pooling (CLIPA, CoCa). The tower's image
    embedding is its summary, if the last features are read (``layer`` null).

    If the weights come with an ``open_clip_config.json`` (in a folder or on the Hugging Face Hub, or beside a file with
    a name that open_clip publishes), it sets network, activation, normalization and interpolation, whatever ``model``
    is. Otherwise the tag sets them; a file without a tag gets what all published weights of ``model`` share, and is
    refused if their means differ.

    Args:
        model: Name in ``open_clip.list_models()``, such as ``convnext_xxlarge``.
        weights: A tag of that model (``open_clip.list_pretrained_tags_by_model``), a ``.safetensors``, ``.bin`` or
            ``.pt`` file, a folder or a Hugging Face id; ``random`` for random weights.
        image_size: Side of the input in pixels; null for the model's own. Position embeddings are interpolated.
        layer: Index of a block or stage, -1 for the last, before the final norm (or MobileCLIP's last convolution);
            later ones are not run. Null for the last features.
        framing: What to do with images that are not square: ``squash`` (as CLIP does here, so that patches show the
            same parts as CLIP's), ``crop`` or ``pad``; null or ``own`` for the model's own way (``resize_mode``).
        interpolation: ``bilinear`` or ``bicubic``; null for the model's own.
        license: License of the weights; null for the one in the model card.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str,
        image_size: int | None = None,
        layer: int | None = None,
        framing: Framing | None = None,
        interpolation: Interpolation | None = None,
        license: str | None = None,
    ) -> None:
        described = DescribedOpenClip.describe(weights, model=model, framing=framing, owner=OWNER)
        preprocessing = described.preprocessing().adapted(
            owner=OWNER, image_size=image_size, framing=framing, interpolation=interpolation
        )
        network = OpenClipMap(described.build(preprocessing.image_size), layer=layer)
        facts = {"layer": layer, "model": model, "quick_gelu": described.settings["quick_gelu"]}
        super().__init__(
            network=network,
            preprocessing=preprocessing,
            license=license or described.license(),
            facts=facts if layer is not None or network.normed else {**facts, "normed": False},
        )
        self.described, self.source = described, described.source

    @property
    def weights_from(self) -> str | None:
        """See :attr:`VisionExpert.weights_from`."""
        return None if self.source is None else self.source.text

    def load_weights(self) -> None:
        """Read the image tower of the weights; a random network keeps its own.

        Raises:
            WeightsError: They are missing, or do not fit; the message says how to fetch them.
        """
        if self.source is None:
            return
        visual = self.network.get_submodule("visual")
        path, state = self.described.read(visual, image_size=self.preprocessing.image_size)
        fill_module(visual, state, owner=OWNER, path=path)


class OpenClipMap(SummarizedMap):
    """Map pixels (B, 3, H, W) to features (B, E, h, w) with an image tower.

    Args:
        visual: Image tower of open_clip.
        layer: See :class:`OpenClipExpert`.
    """

    def __init__(self, visual: Any, *, layer: int | None) -> None:
        super().__init__()
        self.visual = visual
        self.layer = layer
        # CoCa's norm comes after its pooling, unless it pools twice; CLIPA's flag counts without attention pooling.
        pools = [getattr(visual, name, None) is not None for name in ("attn_pool", "attn_pool_contrastive")]
        behind = not pools[1] if pools[0] else getattr(visual, "final_ln_after_pool", False)
        self.normed = layer is None and not behind

    def read(self, pixels_BCHW: Tensor, *, summarize: bool) -> tuple[Tensor, Tensor | None]:
        """Return the feature map of the last or the chosen layer, and the image embedding."""
        trunk = getattr(self.visual, "trunk", None)
        summarize = summarize and self.layer is None
        if trunk is not None and self.layer is None:
            features = last_features(trunk, pixels_BCHW)
            embedding_BF = self.visual.head(trunk.forward_head(features)) if summarize else None
            return map_of_last(trunk, features), embedding_BF
        found = self.visual.forward_intermediates(
            pixels_BCHW,
            indices=1 if self.layer is None else [self.layer],
            stop_early=True,
            intermediates_only=not summarize,
            normalize_intermediates=self.normed,
            output_fmt="NCHW",
        )
        (map_BEHW,) = found["image_intermediates"]
        return map_BEHW, found["image_features"] if summarize else None
