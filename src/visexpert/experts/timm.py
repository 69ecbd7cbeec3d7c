"""Experts from timm: EVA-02, DINOv2, DINOv3, ConvNeXt and every other model with feature maps."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from visexpert.errors import ConfigError, WeightsError
from visexpert.experts.maps import RANDOM, MapExpert, map_of
from visexpert.experts.preprocessing import Framing, Interpolation, Preprocessing
from visexpert.io.source import ModelSource
from visexpert.io.weights import LoadedState, fill_module, read_source

OWNER = "TimmExpert"


class TimmExpert(MapExpert):
    """Patch tokens of any timm model with feature maps, without [CLS] and registers.

    Input size, normalization, interpolation, crop and license come from timm's ``pretrained_cfg``. timm interpolates
    position embeddings and, for another patch size, the patch convolution.

    Args:
        model: Name with its tag, such as ``eva02_large_patch14_448.mim_m38m_ft_in22k_in1k``
            (``timm.list_pretrained()``).
        weights: A ``.safetensors``, ``.bin`` or ``.pt`` file, a folder or a Hugging Face id; null for the tag's own
            weights on the Hugging Face Hub; ``random`` for random weights.
        image_size: Side of the input in pixels; null for the model's own.
        layer: Index of a block or stage, -1 for the last, before the final norm; later ones are not run. Null for
            timm's last features, after the final norm.
        framing: What to do with images that are not square: ``squash`` (as CLIP does here), ``crop``, ``pad``, or
            ``own`` for the model's own way.
        interpolation: ``bilinear`` or ``bicubic``; null for the model's own.
        license: License of the weights; null for the one that timm states.
        arguments: Further arguments of the timm model, such as ``{patch_size: 16}``.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str | None = None,
        image_size: int | None = None,
        layer: int | None = None,
        framing: Framing = "squash",
        interpolation: Interpolation | None = None,
        license: str | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        settings = published_settings(model)
        own = own_preprocessing(settings, interpolation)
        preprocessing = own.adapted(owner=OWNER, image_size=image_size, framing=framing, interpolation=interpolation)
        self_arguments = dict(arguments or {})
        if settings["fixed_input_size"] and preprocessing.image_size != own.image_size:
            self_arguments.setdefault("img_size", preprocessing.image_size)
        super().__init__(
            network=TimmMap(build(model, self_arguments), layer=layer),
            preprocessing=preprocessing,
            license=license or settings["license"],
            facts={"layer": layer, "model": model, "arguments": sorted(self_arguments.items())},
        )
        self.model_name = model
        self.arguments = self_arguments
        self.weights = weights or settings["hf_hub_id"]

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
        adapted = self._adapted(found)
        fill_module(self.network.get_submodule("model"), adapted.state_dict(), owner=OWNER, path=found.path)

    def _adapted(self, found: LoadedState) -> nn.Module:
        """Return a second network, without its head, into which timm's own loader has read the weights, strictly."""
        import timm

        settings = published_settings(self.model_name)
        heads = settings["classifier"]
        names = (heads,) if isinstance(heads, str) else tuple(heads or ())
        classes = settings["num_classes"] if any(f"{name}.weight" in found.tensors for name in names) else 0
        overlay = {"state_dict": dict(found.tensors), "num_classes": classes, "custom_load": False}
        try:
            model: Any = timm.create_model(
                self.model_name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **self.arguments
            )
        except (RuntimeError, KeyError) as error:
            reason, size, own = (
                " ".join(str(error).split())[:300],
                self.preprocessing.image_size,
                settings["input_size"][-1],
            )
            at, step = ("", "") if size == own else (f" at {size} px", f", or its own image_size {own}")
            raise WeightsError(
                f"{OWNER}: the weights in {found.path} do not fit {self.model_name}{at} ({reason}); use weights of "
                f"this model{step}."
            ) from error
        model.reset_classifier(0)
        adapted: nn.Module = model
        return adapted


class TimmMap(nn.Module):
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

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the feature map of the last or the chosen layer."""
        if self.layer is not None:
            (map_BEHW,) = self.model.forward_intermediates(
                pixels_BCHW,
                indices=[self.layer],
                norm=False,
                stop_early=True,
                output_fmt="NCHW",
                intermediates_only=True,
            )
            return map_BEHW  # type: ignore[no-any-return]
        return last_map(self.model, pixels_BCHW)


def last_map(model: Any, pixels_BCHW: Tensor) -> Tensor:
    """Return the last features (B, E, h, w) of a timm model, before pooling.

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
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return map_of(features, channels_last=channels_last, prefix=getattr(model, "num_prefix_tokens", None))


def published_settings(model: str) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` of a model.

    Raises:
        ConfigError: There is no such model or tag.
    """
    import timm
    from timm.models import get_pretrained_cfg, is_model

    name = model.partition(".")[0]
    try:
        found = get_pretrained_cfg(model, allow_unregistered=False)
    except RuntimeError as error:  # what timm raises for an unknown name or tag
        near = timm.list_pretrained(f"{name}.*") if is_model(name) else get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(f"{OWNER}: timm has no settings of '{model}'; did you mean one of {near}?") from error
    assert found is not None  # timm raises instead of returning None
    return dict(vars(found))


def own_preprocessing(settings: dict[str, Any], interpolation: Interpolation | None) -> Preprocessing:
    """Return the preprocessing of timm's own transform for a model.

    Raises:
        ConfigError: Its interpolation is not available here, or its images are not square.
    """
    from timm.data import DEFAULT_CROP_PCT

    _, height, width = settings["input_size"]
    if height != width:
        raise ConfigError(
            f"{OWNER}: {settings['architecture']} reads images of {height} x {width} px, but experts read squares; use "
            "another model."
        )
    own = settings["interpolation"]
    if own not in ("bilinear", "bicubic") and interpolation is None:
        raise ConfigError(
            f"{OWNER}: this model resizes with {own} interpolation, which is not available here; set interpolation to "
            "bicubic or bilinear."
        )
    share = settings["crop_pct"] or DEFAULT_CROP_PCT
    mode = settings["crop_mode"] or "center"
    framing: Framing = "crop" if mode == "center" else "squash" if (mode, share) == ("squash", 1.0) else "own"
    return Preprocessing(
        image_size=height,
        mean=settings["mean"],
        std=settings["std"],
        interpolation=own if own in ("bilinear", "bicubic") else "bicubic",
        framing=framing,
        crop_share=share,
    )


def build(model: str, arguments: dict[str, Any]) -> nn.Module:
    """Build a timm model without its head, with random weights.

    Raises:
        ConfigError: The model rejects an argument.
    """
    import timm

    try:
        network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{OWNER}: {model} does not take {arguments} ({error}).") from error
    return network.eval()  # in train mode BatchNorm refuses the one image of the probe
