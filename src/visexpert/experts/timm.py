"""Experts from timm: EVA-02, DINOv2, DINOv3, ConvNeXt and every other model with feature maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.maps import MapExpert, SummarizedMap, map_of
from visexpert.io.source import ModelSource
from visexpert.io.weights import fill_module, read_source
from visexpert.networks import RANDOM
from visexpert.networks.preprocessing import Framing, Interpolation
from visexpert.networks.timm import DescribedTimm
from visexpert.typed import typed
from visexpert.vision.anatomy import OF_TIMM

OWNER = "TimmExpert"


@typed
class TimmExpert(MapExpert):
    """Patch tokens of any timm model with feature maps, without [CLS] and registers.

    The pooled output of a vision transformer that pools by its [CLS] token or by attention is its summary, if the last
    features are read (``layer`` null); others give none, since the mean of patch tokens is not one.

    Input size, normalization, interpolation, crop and license come from timm's ``pretrained_cfg``. timm interpolates
    position embeddings and, for another patch size, the patch convolution.

    Args:
        model: Name with its tag, such as ``eva02_large_patch14_448.mim_m38m_ft_in22k_in1k``
            (``timm.list_pretrained()``); null for that of the folder in ``weights``.
        weights: A ``.safetensors``, ``.bin`` or ``.pt`` file, a folder or a Hugging Face id; null for the tag's own
            weights on the Hugging Face Hub; ``random`` for random weights. Where timm's ``config.json`` lies beside
            them, it says model, sizes and preprocessing.
        image_size: Side of the input in pixels; null for the model's own.
        layer: Index of a block or stage, -1 for the last, before the final norm; later ones are not run. Null for
            timm's last features, after the final norm.
        framing: What to do with images that are not square: ``squash`` (as CLIP does here), ``crop``, ``pad``, or
            ``own`` for the model's own way.
        interpolation: ``bilinear`` or ``bicubic``; null for the model's own.
        license: License of the weights; null for the one that timm states.
        arguments: Further arguments of the timm model, such as ``{patch_size: 16}``.

    Raises:
        ConfigError: There is neither a model nor a folder that names one, or the two contradict each other.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        weights: str | None = None,
        image_size: int | None = None,
        layer: int | None = None,
        framing: Framing = "squash",
        interpolation: Interpolation | None = None,
        license: str | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        source = None if weights == RANDOM else weights
        if model is None and source is None:
            raise ConfigError(
                f"{OWNER} needs model (a name of timm), or weights (a folder or Hugging Face id of timm's)."
            )
        described = DescribedTimm.describe(source, model=model, arguments=arguments, owner=OWNER).without_head()
        preprocessing = described.preprocessing(interpolation).adapted(
            owner=OWNER, image_size=image_size, framing=framing, interpolation=interpolation
        )
        self.arguments = described.sized(preprocessing.image_size)
        self.model_name = model or described.architecture
        super().__init__(
            network=TimmMap(described.build(preprocessing.image_size), layer=layer),
            preprocessing=preprocessing,
            license=license or described.license(),
            facts={"layer": layer, "model": self.model_name, "arguments": sorted(self.arguments.items())},
        )
        self.described = described
        self.weights = weights or described.settings["hf_hub_id"]

    @property
    def weights_from(self) -> str | None:
        """See :attr:`VisionExpert.weights_from`."""
        return None if self.weights == RANDOM else self.weights

    def load_weights(self) -> None:
        """Read the weights, which timm's own code fits to image and patch size; a random network keeps its own.

        Raises:
            WeightsError: They are missing, or do not fit; the message says how to fetch them.
        """
        if self.weights == RANDOM:
            return
        if not self.weights:
            raise WeightsError(f"{OWNER}: timm publishes no weights of '{self.model_name}'; set weights to a file.")
        found = read_source(ModelSource.parse(self.weights), owner=OWNER)
        adapted = self.described.adapted(found, image_size=self.preprocessing.image_size)
        fill_module(self.network.get_submodule("model"), adapted, owner=OWNER, path=found.path)


class TimmMap(SummarizedMap):
    """Map pixels (B, 3, H, W) to features (B, E, h, w) with a timm model.

    Args:
        model: Model built without a head.
        layer: See :class:`TimmExpert`.

    Raises:
        ConfigError: ``layer`` is given, but the model has no intermediate features.
    """

    def __init__(self, model: Any, *, layer: int | None) -> None:
        super().__init__()
        if layer is not None and not hasattr(model, "forward_intermediates"):
            raise ConfigError(f"{OWNER}: timm gives no intermediate features of {type(model).__name__}; remove layer.")
        self.model = model
        self.layer = layer

    def read(self, pixels_BCHW: Tensor, *, summarize: bool) -> tuple[Tensor, Tensor | None]:
        """Return the feature map of the last or the chosen layer, and the pooled output of the last."""
        if self.layer is not None:
            (map_BEHW,) = self.model.forward_intermediates(
                pixels_BCHW,
                indices=[self.layer],
                norm=False,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
            return map_BEHW, None
        features = last_features(self.model, pixels_BCHW)
        pools = type(self.model).__name__ in OF_TIMM and getattr(self.model, "global_pool", "") in ("token", "map")
        summary_BF = self.model.forward_head(features, pre_logits=True) if summarize and pools else None
        return map_of_last(self.model, features), summary_BF


def last_features(model: Any, pixels_BCHW: Tensor) -> Tensor:
    """Return the last features of a timm model, before pooling, in its own form.

    Raises:
        ValueError: The model returns several maps, or only a class token.
    """
    features = model.forward_features(pixels_BCHW)
    if not isinstance(features, Tensor):
        other = "set layer to -1" if hasattr(model, "forward_intermediates") else "none of them is the last"
        raise ValueError(f"{type(model).__name__} returns several maps at once; {other}")
    classes = getattr(model, "cls_token", None)
    if features.ndim == 3 and isinstance(classes, Tensor) and features.shape[1] == classes.shape[1]:
        raise ValueError(f"{type(model).__name__} returns only its class token; set layer to -1")
    return features


def map_of_last(model: Any, features: Tensor) -> Tensor:
    """Return the last features of a timm model as a map (B, E, h, w)."""
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return map_of(features, channels_last=channels_last, prefix=getattr(model, "num_prefix_tokens", None))
